"""Random numbers without a generator: each is a hash of a seed and a counter.

A generator has a state, so every draw changes the draws after it. A hash of (seed, counter) gives each token of each
answer its own number: the same one in any order, on any rank, in any process, and after a resume.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np


def seed_of(*identity: Any) -> int:
    """A seed in [0, 2^63), a hash of the values in ``identity``. A value that JSON cannot write counts as its text."""
    text = json.dumps(identity, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def uniform_numbers(seeds: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each (seed, counter): SplitMix64 (Steele et al., 2014) as a hash.

    Args:
        seeds: uint64, shape (n,).
        counters: uint64, same shape.

    Returns:
        float64, same shape: the same numbers on every machine.
    """

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    with np.errstate(over="ignore"):
        golden = np.uint64(0x9E3779B97F4A7C15)
        hashed = mix(mix(seeds + golden) + (counters + np.uint64(1)) * golden)
    return (hashed >> np.uint64(11)).astype(np.float64) * 2.0**-53
