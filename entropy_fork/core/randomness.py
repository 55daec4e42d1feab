"""Random numbers without a generator: each is a hash of a seed and a counter.

A generator has a state, so every draw changes the draws after it. A hash of (seed, counter) gives each token of each
answer its own number: the same one in any order, on any rank, in any process, and after a resume.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from torch import Tensor

from entropy_fork.core.flat import row_slices


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


def drawn(lengths: np.ndarray, seeds: Tensor, stream: int = 0) -> np.ndarray:
    """A number in [0, 1) for each token, from the seed of its response and its position: float64, (num_tokens,).

    Args:
        lengths: int, shape (num_responses,): tokens per response.
        seeds: int64, shape (num_responses,).
        stream: other streams give other numbers, independent of these.
    """
    numbers = np.empty(int(lengths.sum()))
    positions = np.arange(lengths.max(initial=0), dtype=np.uint64) + np.uint64(stream << 40)
    columns = seeds.cpu().numpy().astype(np.uint64)[:, None]
    for row, seed in zip(row_slices(lengths), columns, strict=True):
        numbers[row] = uniform_numbers(seed, positions[: row.stop - row.start])
    return numbers
