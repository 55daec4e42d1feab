"""One command that proves this package on a GPU, in stages: ``python -m benchmarks.gpu.run`` (``make gpu``).

Each stage is a module with the option ``--device cpu|cuda``. On a CPU it runs the same code on tiny shapes, so that
what can be wrong without a GPU is found without one. ``cases.py`` says how stages are run and what they write.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The scripts beside this folder import each other by their bare names, as ``python benchmarks/lm_head.py`` finds them.
_SCRIPTS = str(Path(__file__).resolve().parents[1])
if _SCRIPTS not in sys.path:
    sys.path.append(_SCRIPTS)
