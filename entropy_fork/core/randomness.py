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
    with np.errstate(over="ignore"):
        hashed = _mixed(_mixed(seeds + GOLDEN) + (counters + np.uint64(1)) * GOLDEN)
    return _as_number(hashed)


#: the step of SplitMix64: 2^64 divided by the golden ratio
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(z: np.ndarray, scratch: np.ndarray | None = None) -> np.ndarray:
    """The output function of SplitMix64, in place in ``z``; ``scratch``: uint64, the shape of ``z``."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z ^= np.right_shift(z, np.uint64(shift), out=scratch)
        if factor != 1:
            z *= np.uint64(factor)
    return z


def _as_number(hashed: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The first 53 bits as a number in [0, 1), into ``out``. Changes ``hashed``."""
    hashed >>= np.uint64(11)
    return np.multiply(hashed, 2.0**-53, out=out)


def drawn(lengths: np.ndarray, seeds: Tensor, stream: int = 0) -> np.ndarray:
    """A number in [0, 1) for each token, from the seed of its response and its position: float64, (num_tokens,).

    Args:
        lengths: int, shape (num_responses,): tokens per response.
        seeds: int64, shape (num_responses,).
        stream: other streams give other numbers, independent of these.
    """
    numbers = np.empty(int(lengths.sum()))
    longest = int(lengths.max(initial=0))
    hashed, scratch = (np.empty(longest, dtype=np.uint64) for _ in range(2))
    with np.errstate(over="ignore"):
        steps = (np.arange(1, longest + 1, dtype=np.uint64) + np.uint64(stream << 40)) * GOLDEN
        starts = _mixed(seeds.cpu().numpy().astype(np.uint64) + GOLDEN)
        for row, start in zip(row_slices(lengths), starts, strict=True):  # in place, which takes half the time
            size = row.stop - row.start
            part = np.add(steps[:size], start, out=hashed[:size])
            _as_number(_mixed(part, scratch[:size]), out=numbers[row])
    return numbers
