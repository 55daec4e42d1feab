"""Mark the top ρ of all tokens of a folder, by the rule of ``core/selection.py``, without all of them in memory.

Exactly ceil(ρN) tokens are marked. Among tokens with the entropy of the threshold, those at an earlier position in
their answer come first, and at the same position those of an earlier answer. Three passes find the threshold and where
to cut the ties, a fourth one writes the column ``selected``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entropy_fork.analysis.order_statistics import order_statistics
from entropy_fork.core.selection import kept_count
from entropy_fork.tokens.store import parts, read_columns, write_selected


@dataclass(frozen=True)
class TopRatio:
    """Which tokens are in the top ρ: all above the threshold, and some of those at it.

    Attributes:
        threshold: τ in nats, the lowest entropy that is selected; NaN without tokens.
        position: tokens with entropy τ are selected before this position in their answer,
        rows: and at this position in this many answers, the first ones.
        num_tokens, num_selected: N and ceil(ρN).
    """

    threshold: float
    position: int
    rows: int
    num_tokens: int
    num_selected: int


def find_top(folder: Path, top_ratio: float) -> TopRatio:
    """Find the edge of the top ρ of a folder of tokens, whether it was marked before or not."""
    numbers = parts(folder)

    def entropies() -> Iterator[np.ndarray]:
        for number in numbers:
            yield read_columns(folder, number, "entropy")[0]

    num_tokens = sum(len(part) for part in entropies())
    if num_tokens == 0:
        return TopRatio(float("nan"), 0, 0, 0, 0)
    count = kept_count(num_tokens, top_ratio)
    threshold = order_statistics(entropies, [num_tokens - count])[0]
    above, tied = 0, np.zeros(0, dtype=np.int64)
    for number in numbers:
        position, entropy = read_columns(folder, number, "position", "entropy")
        above += int(np.count_nonzero(entropy > threshold))
        here = np.bincount(position[entropy == threshold])
        tied = np.pad(tied, (0, max(0, len(here) - len(tied))))
        tied[: len(here)] += here
    missing = count - above
    edge = int(np.searchsorted(tied.cumsum(), missing))
    rows = missing - int(tied[:edge].sum())
    return TopRatio(float(threshold), edge, rows, num_tokens, count)


def top_masks(folder: Path, top: TopRatio) -> Iterator[tuple[int, np.ndarray]]:
    """For each part its number, and which of its tokens are in the top: bool, shape (tokens of the part,)."""
    rows_left = top.rows
    for number in parts(folder):
        position, entropy = read_columns(folder, number, "position", "entropy")
        tied = entropy == np.float32(top.threshold)
        selected = (entropy > np.float32(top.threshold)) | (tied & (position < top.position))
        at_edge = np.flatnonzero(tied & (position == top.position))[:rows_left]
        selected[at_edge] = True
        rows_left -= len(at_edge)
        yield number, selected


def select_top(folder: Path, top_ratio: float) -> TopRatio:
    """Find the top ρ, and write the column ``selected`` of every part."""
    top = find_top(folder, top_ratio)
    for number, selected in top_masks(folder, top):
        write_selected(folder, number, selected)
    return top
