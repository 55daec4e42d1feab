"""Everything of Entropy Fork that touches verl, one file per extension point.

This file contains the two imports below and nothing else. A process that imports any module of this package runs them
first, so the plugin is then active, or there is an error. That holds for a Ray actor too, which only unpickles one of
our classes.

The order of imports matters as well. Importing verl loads its plugins, and ours registers by importing the modules
beside it. If one of these modules were only half imported at that moment, it would silently not be registered, because
verl swallows the exception. So verl is imported here, before any of them.
"""

import verl  # noqa: F401

from entropy_fork.verl import plugin  # noqa: F401
