"""Everything of Entropy Fork that touches verl, one file per extension point.

The import below is the only thing that may stand here, and it must: importing verl loads its plugins, ours included,
and ours registers by importing its neighbours. A Ray actor that unpickles one of our classes imports that class's
module first; without this line verl would be imported half-way through it, and the registration would meet a
half-imported module and silently not happen (verl swallows the exception).
"""

import verl  # noqa: F401
