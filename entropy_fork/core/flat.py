"""Go through a flat batch row by row, or in pieces, without a second tensor of the batch's size.

A batch of the paper's size has 168 million tokens. A tensor with one number per token (a float64, a row number) takes
as much memory as the batch itself. To compute it at once also takes longer than in pieces that fit into a cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def count_per_row(mask: Tensor, lengths: Tensor) -> Tensor:
    """How many tokens of each row are set, int64, shape (num_rows,).

    It calls numpy once per row. That is many times faster than to write a row number for each token first.

    Args:
        mask: bool or 0/1 int, shape (num_tokens,).
        lengths: int, shape (num_rows,): tokens per row; sums to num_tokens.
    """
    values = mask.cpu().numpy()
    return torch.tensor([np.count_nonzero(values[row]) for row in row_slices(lengths.cpu().numpy())], dtype=torch.int64)


def row_slices(lengths: np.ndarray) -> Iterator[slice]:
    """One slice per row: where its tokens are in a flat tensor. ``lengths``: int, shape (num_rows,)."""
    end = 0
    for length in lengths.tolist():
        start, end = end, end + length
        yield slice(start, end)


def pieces(num_tokens: int, size: int = 2**15) -> Iterator[slice]:
    """Slices of ``size`` tokens that cover all tokens. The default fits into a cache, and torch uses one thread."""
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def groups(group_of_response: Tensor, lengths: Tensor) -> Iterator[tuple[Tensor, list[slice]]]:
    """For each group, its responses and the slices of their tokens. Neighbouring responses share a slice.

    Args:
        group_of_response: int64, shape (num_responses,): the number of each response's group, any number.
        lengths: int64, shape (num_responses,): tokens per response.
    """
    ends = lengths.cumsum(0)
    order = torch.argsort(group_of_response, stable=True)
    _, sizes = group_of_response.unique(return_counts=True)
    for members in order.split(sizes.tolist()):
        breaks = (members.diff() != 1).nonzero().squeeze(1) + 1
        runs = members.tensor_split(breaks)
        yield members, [slice(int(ends[run[0]] - lengths[run[0]]), int(ends[run[-1]])) for run in runs]


def gather(values: Tensor, tokens: list[slice]) -> Tensor:
    """The tokens in some slices, one slice after another, shape (n,); a view if there is one slice."""
    return values[tokens[0]] if len(tokens) == 1 else torch.cat([values[part] for part in tokens])


def scatter(target: Tensor, tokens: list[slice], values: Tensor) -> None:
    """Write values, shape (n,), into these slices of ``target``."""
    start = 0
    for part in tokens:
        target[part] = values[start : start + part.stop - part.start]
        start += part.stop - part.start
