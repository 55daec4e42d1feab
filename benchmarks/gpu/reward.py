"""A reward for models with random weights: right or wrong by a checksum of the answer, so that advantages are not 0."""

from __future__ import annotations

import zlib
from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: Any, **_: Any) -> dict[str, float]:
    """1 for about half of all answers, else 0."""
    right = float(zlib.crc32(solution_str.encode()) % 2)
    return {"score": right, "acc": right}
