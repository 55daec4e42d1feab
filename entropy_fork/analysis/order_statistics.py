"""Exact order statistics of any number of float32 values, in a fixed amount of memory, by counting.

The 32 bits of a float can be changed into an integer that has the order of the values. One pass counts the values by
their upper 16 bits. A second pass counts, by their lower 16 bits, the values that share their upper bits with a wanted
one. Nothing is sampled or interpolated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

#: the percentiles that tables and files have
PERCENTILES = (1, *range(5, 100, 5), 99)

_HALF = 1 << 16


def order_statistics(values: Callable[[], Iterable[np.ndarray]], ranks: Sequence[int]) -> np.ndarray:
    """The values at these places in ascending order.

    Args:
        values: called twice; returns the same float32 arrays, none of them with a NaN, both times.
        ranks: 0 for the smallest; each below the number of values, in any order.

    Returns:
        float32 of shape (ranks,). Zeros are equal whatever their sign.

    Raises:
        ValueError: a rank is not below the number of values.
    """
    wanted = np.asarray(ranks, dtype=np.int64)
    upper = np.zeros(_HALF, dtype=np.int64)
    for part in values():
        upper += np.bincount(_ordered(part) >> 16, minlength=_HALF)
    ends = upper.cumsum()
    if len(wanted) and not (wanted.min() >= 0 and wanted.max() < ends[-1]):
        raise ValueError(f"ranks must be in 0…{ends[-1] - 1}, got {wanted.tolist()}")
    bins = np.searchsorted(ends, wanted, side="right")
    lower = {int(number): np.zeros(_HALF, dtype=np.int64) for number in np.unique(bins)}
    for part in values():
        bits = _ordered(part)
        high = bits >> 16
        for number, counts in lower.items():
            counts += np.bincount(bits[high == number] & (_HALF - 1), minlength=_HALF)
    found = np.empty(len(wanted), dtype=np.uint32)
    for place, (rank, number) in enumerate(zip(wanted.tolist(), bins.tolist(), strict=True)):
        before = ends[number] - upper[number]
        found[place] = (number << 16) | int(np.searchsorted(lower[number].cumsum(), rank - before, side="right"))
    return _values(found)


def percentile_ranks(num_values: int, percentiles: Sequence[float]) -> list[int]:
    """The place of each percentile in ascending order: that of the smallest value that at least q% do not exceed."""
    return [min(num_values - 1, max(0, int(np.ceil(round(q / 100 * num_values, 6))) - 1)) for q in percentiles]


def _ordered(values: np.ndarray) -> np.ndarray:
    """uint32 in the order of the values: positive values get the sign bit, negative values get all bits inverted."""
    bits = (np.asarray(values, dtype=np.float32) + np.float32(0.0)).view(np.uint32)  # -0 + 0 is +0
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _values(ordered: np.ndarray) -> np.ndarray:
    return np.where(ordered >> 31, ordered & np.uint32((1 << 31) - 1), ~ordered).astype(np.uint32).view(np.float32)
