"""Paths, for tests in any folder."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent

#: the PYTHONPATH with which a process finds ``helpers`` and this copy of the package
PYTHONPATH = f"{TESTS}{os.pathsep}{REPOSITORY}"
