"""Through VERL_USE_EXTERNAL_MODULES, which verl reads before its plugins: verl says that it is another version."""

import os

import verl

verl.__version__ = os.environ["PRETENDED_VERL"]
