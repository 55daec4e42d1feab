"""A whole batch at once: select in each pool, weigh in each mini-batch.

A pool and a mini-batch need not be the same. A pool is a response, a micro-batch, a mini-batch or the whole batch.
Weights always belong to a mini-batch: verl takes a gradient step, and divides the loss, over a mini-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_fork.core.rule import POOLS, Rule, Selector
from entropy_fork.core.selection import select_tokens
from entropy_fork.core.tally import Pool
from entropy_fork.core.weighting import token_weights


@dataclass(frozen=True)
class Responses:
    """The responses of a batch, or of a part of it: one after another, without padding.

    Attributes:
        entropy: float, shape (num_tokens,), nats.
        eligible: bool or int, shape (num_tokens,): the response mask.
        lengths: int64, shape (num_responses,): tokens per response.
        order: int64, shape (num_responses,): decides between tokens of equal score; see
            :func:`entropy_fork.core.selection.select_tokens`.
        seeds: int64, shape (num_responses,): the seed of each response's draws, for ``select=random``.
    """

    entropy: Tensor
    eligible: Tensor
    lengths: Tensor
    order: Tensor
    seeds: Tensor


def pool_of_responses(pool: str, mini_batch: Tensor, micro_batch: Tensor | None = None) -> Tensor:
    """Which pool each response belongs to, int64, shape (num_responses,).

    Args:
        pool: one of :data:`entropy_fork.core.rule.POOLS`.
        mini_batch: int, shape (num_responses,): the mini-batch of each response.
        micro_batch: int, shape (num_responses,): the micro-batch of each response, if known.

    Raises:
        ValueError: there is no such pool, or it is ``micro_batch`` and no micro-batches are given.
    """
    if pool == "response":
        return torch.arange(mini_batch.numel())
    if pool == "mini_batch":
        return mini_batch
    if pool == "batch":
        return torch.zeros_like(mini_batch)
    if pool == "micro_batch" and micro_batch is not None:
        return micro_batch
    raise ValueError(f"pool must be one of {', '.join(POOLS)} (micro_batch needs micro-batches), got {pool!r}")


def select_in_pools(responses: Responses, pool_of_response: Tensor, selector: Selector) -> tuple[Tensor, list[Pool]]:
    """Keep a share of each pool.

    Args:
        responses: of the batch.
        pool_of_response: int64, shape (num_responses,), see :func:`pool_of_responses`.
        selector: what to keep of each pool.

    Returns:
        bool, shape (num_tokens,): which tokens are kept; and each pool's counts and threshold.

    Raises:
        ValueError: see :func:`entropy_fork.core.selection.select_tokens`.
    """
    kept = torch.zeros(responses.entropy.numel(), dtype=torch.bool)
    pools = []
    for members, tokens in _groups(pool_of_response, responses.lengths):
        selection = select_tokens(
            _gather(responses.entropy, tokens),
            _gather(responses.eligible, tokens),
            responses.lengths[members],
            selector,
            responses.order[members],
            responses.seeds[members],
        )
        _scatter(kept, tokens, selection.kept)
        pools.append(Pool(selection.num_tokens, selection.num_kept, selection.threshold))
    return kept, pools


def weigh_mini_batches(responses: Responses, kept: Tensor, mini_batch: Tensor, rule: Rule) -> Tensor:
    """The token weights of a selection: see :func:`~entropy_fork.core.weighting.token_weights`.

    Args:
        responses: of the batch.
        kept: bool, shape (num_tokens,), see :func:`select_in_pools`.
        mini_batch: int, shape (num_responses,): the mini-batch of each response.
        rule: its ``loss_agg_mode``, ``denominator`` and ``weight`` are used.

    Returns:
        float32, shape (num_tokens,).

    Raises:
        ValueError: an unknown ``loss_agg_mode`` or ``denominator``.
    """
    weights = torch.zeros(responses.entropy.numel(), dtype=torch.float32)
    for members, tokens in _groups(mini_batch, responses.lengths):
        # No variable for the weights: it would hold those of one mini-batch while the next ones are computed.
        _scatter(
            weights,
            tokens,
            token_weights(
                _gather(kept, tokens),
                _gather(responses.eligible, tokens),
                responses.lengths[members],
                rule.loss_agg_mode,
                rule.denominator,
                _gather(responses.entropy, tokens) if rule.weight == "soft" else None,
            ),
        )
    return weights


def _groups(group_of_response: Tensor, lengths: Tensor) -> Iterator[tuple[Tensor, list[slice]]]:
    """For each group, its responses and the slices of their tokens. Neighbouring responses share a slice."""
    ends = lengths.cumsum(0)
    order = torch.argsort(group_of_response, stable=True)
    for members in order.split(torch.bincount(group_of_response).tolist()):
        if members.numel() == 0:
            continue
        breaks = (members.diff() != 1).nonzero().squeeze(1) + 1
        runs = members.tensor_split(breaks)
        yield members, [slice(int(ends[run[0]] - lengths[run[0]]), int(ends[run[-1]])) for run in runs]


def _gather(values: Tensor, tokens: list[slice]) -> Tensor:
    return values[tokens[0]] if len(tokens) == 1 else torch.cat([values[part] for part in tokens])


def _scatter(target: Tensor, tokens: list[slice], values: Tensor) -> None:
    start = 0
    for part in tokens:
        target[part] = values[start : start + part.stop - part.start]
        start += part.stop - part.start
