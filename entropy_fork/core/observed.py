"""Compare scores that a run does not train on with the one that it does (``observe``)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from entropy_fork.core.flat import row_slices
from entropy_fork.core.responses import Responses, select_in_pools
from entropy_fork.core.rule import BLIND, Selector

#: the largest sample that a rank correlation is computed of
SAMPLE = 2**17


def overlap(responses: Responses, kept: Tensor, pool_of_response: Tensor, selector: Selector) -> float:
    """The share of the kept tokens of the pools that another score would keep too.

    Args:
        responses: of the batch, with the other score.
        kept: bool, shape (num_tokens,): what is kept. Tokens that are in no pool are not compared.
        pool_of_response: int64, shape (num_responses,): as for ``kept``.
        selector: as for ``kept``; the highest are compared if it looks at no score.

    Returns:
        A number in [0, 1]; NaN if nothing is kept.
    """
    if selector.select in BLIND:
        selector = replace(selector, select="top")
    other, _ = select_in_pools(responses, pool_of_response, selector)
    kept = kept & responses.in_pools.bool()
    count = int(torch.count_nonzero(kept))
    return int(torch.count_nonzero(kept & other)) / count if count else float("nan")


def sample_of(eligible: Tensor, lengths: Tensor, seeds: Tensor) -> Tensor:
    """Eligible tokens, evenly spaced within their responses: bool, shape (num_tokens,). The order of rows is no matter.

    Args:
        eligible: bool or int, shape (num_tokens,).
        lengths: int64, shape (num_responses,): tokens per response.
        seeds: int64, shape (num_responses,): where in each response the spacing begins.
    """
    mask = eligible.cpu().numpy().astype(bool)
    stride = -(-int(np.count_nonzero(mask)) // SAMPLE)
    if stride > 1:
        spaced = np.zeros_like(mask)
        for row, seed in zip(row_slices(lengths.cpu().numpy()), seeds.tolist(), strict=True):
            spaced[row][seed % stride :: stride] = True
        mask &= spaced
    return torch.from_numpy(mask)


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation; equal values share the middle of their ranks.

    Args:
        first: float, shape (n,).
        second: float, shape (n,).

    Returns:
        A number in [-1, 1]; NaN for fewer than two values, or if all values of one are equal.
    """
    ranks = [_middle_ranks(values.double().numpy()) for values in (first, second)]
    centred = [values - values.mean() for values in ranks if values.size]
    if len(centred) < 2:
        return float("nan")
    spread = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum() / spread) if spread > 0 else float("nan")


def _middle_ranks(values: np.ndarray) -> np.ndarray:
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / 2
