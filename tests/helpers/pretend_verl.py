"""Give verl another version number. verl loads this through VERL_USE_EXTERNAL_MODULES, before its plugins."""

import os

import verl

verl.__version__ = os.environ["PRETENDED_VERL"]
