"""Everything of Entropy Fork that touches verl, one file per extension point.

The two imports below are all that may stand here, and they must. A Ray actor that unpickles one of our classes imports
that class's module first. Importing verl loads its plugins, ours included, and ours registers by importing its
neighbours: if that happened half-way through one of our modules, the registration would meet a half-imported module
and silently not happen (verl swallows the exception). And whoever imports anything of ours, be it only to unpickle
the config node, has the plugin active afterwards, or an error.
"""

import verl  # noqa: F401

from entropy_fork.verl import plugin  # noqa: F401
