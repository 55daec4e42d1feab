"""The top ρ of all tokens of a folder, as ``core/selection.py`` takes it of a pool, without all of them in memory.

Exactly ceil(ρN) tokens; among equals at the threshold the one that comes first in its answer, and among those the one
of the first answer. Three passes look for the threshold and the edge, a fourth one writes the column ``selected``.
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
    """Which tokens are above the edge.

    Attributes:
        threshold: τ in nats, the lowest entropy that is selected; NaN without tokens.
        position: of the tokens at τ those before this position are selected,
        rows: and of those at it, the first so many.
        num_tokens, num_selected: N and ceil(ρN).
    """

    threshold: float
    position: int
    rows: int
    num_tokens: int
    num_selected: int


def find_top(folder: Path, top_ratio: float) -> TopRatio:
    """Where the edge of the top ρ lies; ``folder`` may be any with tokens, selected already or not."""
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
    """Part by part: its number, and what is kept of its tokens: bool, shape (tokens of the part,)."""
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
    """Write the column ``selected`` of every part."""
    top = find_top(folder, top_ratio)
    for number, selected in top_masks(folder, top):
        write_selected(folder, number, selected)
    return top
