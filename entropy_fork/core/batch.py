"""A whole batch at once: select in each pool, weigh in each mini-batch.

The two need not be the same. What is selected is pooled over a response, a mini-batch or the batch; what verl divides
by is always counted over the mini-batch, because that is what a gradient step is taken on.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from entropy_fork.core.selection import Selector, select_tokens
from entropy_fork.core.statistics import PoolStatistics
from entropy_fork.core.weighting import token_weights

POOLS = ("response", "mini_batch", "batch")


def pool_of_rows(pool: str, mini_batch: Tensor) -> Tensor:
    """Which pool each row belongs to, int64, shape (num_rows,).

    Args:
        pool: one of :data:`POOLS`.
        mini_batch: int, shape (num_rows,): the mini-batch of each row.
    """
    if pool == "response":
        return torch.arange(mini_batch.numel())
    if pool == "mini_batch":
        return mini_batch
    if pool == "batch":
        return torch.zeros_like(mini_batch)
    raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")


def batch_weights(
    entropy: Tensor,
    eligible: Tensor,
    lengths: Tensor,
    mini_batch: Tensor,
    selector: Selector,
    pool: str,
    loss_agg_mode: str,
    denominator: str = "kept",
    weight: str = "hard",
    row_order: Tensor | None = None,
    row_seeds: Tensor | None = None,
) -> tuple[Tensor, list[PoolStatistics]]:
    """Token weights of a batch.

    Args:
        entropy: float, shape (num_tokens,), nats, rows behind one another.
        eligible: bool or int, shape (num_tokens,): the response mask.
        lengths: int, shape (num_rows,): tokens per row.
        mini_batch: int, shape (num_rows,): the mini-batch that each row is trained in.
        selector: what to keep of a pool.
        pool: over what the share is taken.
        loss_agg_mode: verl's.
        denominator, weight: see :func:`entropy_fork.core.weighting.token_weights`; ``soft`` weighs by entropy.
        row_order, row_seeds: see :func:`entropy_fork.core.selection.select_tokens`.

    Returns:
        float32 weights, shape (num_tokens,), and the statistics of each pool.
    """
    row_order = torch.arange(lengths.numel()) if row_order is None else row_order
    kept = torch.zeros(entropy.numel(), dtype=torch.bool)
    pools = []
    for rows, tokens in _groups(pool_of_rows(pool, mini_batch), lengths):
        pool_entropy, pool_eligible = _gather(entropy, tokens), _gather(eligible, tokens)
        seeds = None if row_seeds is None else row_seeds[rows]
        selection = select_tokens(pool_entropy, pool_eligible, lengths[rows], selector, row_order[rows], seeds)
        _scatter(kept, tokens, selection.kept)
        pools.append(PoolStatistics.of(selection, pool_entropy, pool_eligible))

    weights = torch.zeros(entropy.numel(), dtype=torch.float32)
    for rows, tokens in _groups(mini_batch, lengths):
        part = token_weights(
            _gather(kept, tokens),
            _gather(eligible, tokens),
            lengths[rows],
            loss_agg_mode,
            denominator,
            _gather(entropy, tokens) if weight == "soft" else None,
        )
        _scatter(weights, tokens, part)
    return weights, pools


def _groups(group_of_row: Tensor, lengths: Tensor) -> Iterator[tuple[Tensor, list[slice]]]:
    """The rows of each group, and where their tokens lie; neighbouring rows are one slice."""
    ends = lengths.cumsum(0)
    order = torch.argsort(group_of_row, stable=True)
    for rows in order.split(torch.bincount(group_of_row).tolist()):
        if rows.numel() == 0:
            continue
        breaks = (rows.diff() != 1).nonzero().squeeze(1) + 1
        runs = rows.tensor_split(breaks)
        yield rows, [slice(int(ends[run[0]] - lengths[run[0]]), int(ends[run[-1]])) for run in runs]


def _gather(values: Tensor, tokens: list[slice]) -> Tensor:
    return values[tokens[0]] if len(tokens) == 1 else torch.cat([values[part] for part in tokens])


def _scatter(target: Tensor, tokens: list[slice], values: Tensor) -> None:
    start = 0
    for part in tokens:
        target[part] = values[start : start + part.stop - part.start]
        start += part.stop - part.start
