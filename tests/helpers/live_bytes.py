"""Import ``benchmarks/live_bytes.py`` for tests: it counts the bytes of all living tensors."""

from __future__ import annotations

import importlib.util

from helpers.places import REPOSITORY

_SPECIFICATION = importlib.util.spec_from_file_location("live_bytes", REPOSITORY / "benchmarks" / "live_bytes.py")
assert _SPECIFICATION is not None
assert _SPECIFICATION.loader is not None
_module = importlib.util.module_from_spec(_SPECIFICATION)
_SPECIFICATION.loader.exec_module(_module)

LiveBytes, LiveBytesWithNumpy = _module.LiveBytes, _module.LiveBytesWithNumpy
