"""Counting by row, where the rows of a batch lie behind one another."""

from __future__ import annotations

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
    rows = np.split(mask.bool().cpu().numpy(), lengths.cpu().cumsum(0).numpy()[:-1])
    return torch.tensor([np.count_nonzero(row) for row in rows], dtype=torch.int64)
