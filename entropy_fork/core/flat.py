"""Going through a batch whose rows lie behind one another: row by row, or in pieces that do not need its memory again.

A batch of the paper's size has 168 million tokens. Whatever is made of all of them at once (a float64 of each, a row
number for each) takes as much memory as the batch itself, and more time than the same in pieces that a cache holds.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def count_per_row(mask: Tensor, lengths: Tensor) -> Tensor:
    """How many tokens of each row are set, int64, shape (num_rows,).

    One call per row: numpy counts bytes many times faster than anything that first writes a row number for each token.

    Args:
        mask: bool or 0/1 int, shape (num_tokens,).
        lengths: int, shape (num_rows,): tokens per row; sums to num_tokens.
    """
    values = mask.cpu().numpy()
    return torch.tensor([np.count_nonzero(values[row]) for row in row_slices(lengths.cpu().numpy())], dtype=torch.int64)


def row_slices(lengths: np.ndarray) -> Iterator[slice]:
    """Where the tokens of each row lie, one after the other; ``lengths``: int, shape (num_rows,)."""
    end = 0
    for length in lengths.tolist():
        start, end = end, end + length
        yield slice(start, end)


def pieces(num_tokens: int, size: int = 2**15) -> Iterator[slice]:
    """All tokens, so many at a time: what a cache holds, and what torch does in one thread without asking others."""
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))
