"""A whole batch at once: choose in each pool, weigh in each mini-batch.

A pool and a mini-batch need not be the same. A pool is a response, a micro-batch, a mini-batch or the whole batch.
Weights always belong to a mini-batch: verl takes a gradient step, and divides the loss, over a mini-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_fork.core.factors import factors_of
from entropy_fork.core.flat import gather, groups, scatter
from entropy_fork.core.rule import POOLS, Rule, Selector
from entropy_fork.core.selection import select_tokens, shuffled
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
        seeds: int64, shape (num_responses,): the seed of each response's draws.
        score: float, shape (num_tokens,): what the tokens are ranked by; None for the entropy.
        candidates: bool, shape (num_tokens,): the eligible tokens that are in a pool; None for all.
    """

    entropy: Tensor
    eligible: Tensor
    lengths: Tensor
    order: Tensor
    seeds: Tensor
    score: Tensor | None = None
    candidates: Tensor | None = None

    @property
    def ranked_by(self) -> Tensor:
        """What the tokens are ranked by: float, shape (num_tokens,)."""
        return self.entropy if self.score is None else self.score

    @property
    def in_pools(self) -> Tensor:
        """The tokens of the pools: bool or int, shape (num_tokens,)."""
        return self.eligible if self.candidates is None else self.candidates


@dataclass(frozen=True)
class Choice:
    """What a rule makes of the tokens of a batch.

    Attributes:
        kept: bool, shape (num_tokens,): with ``use=mask`` the tokens that are trained on, else those that are treated.
        pools: each pool's counts and threshold.
        factors: float32, shape (num_tokens,): the factor of each kept token, NaN for the others; None for
            ``use=mask``. See :func:`entropy_fork.core.factors.factors_of`.
        score: float, shape (num_tokens,): the score that belongs to each token's factor, or to its soft weight; None
            for ``use=mask`` with hard weights.
    """

    kept: Tensor
    pools: list[Pool]
    factors: Tensor | None = None
    score: Tensor | None = None


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


def choose(responses: Responses, pool_of_response: Tensor, rule: Rule) -> Choice:
    """Apply a rule to each pool: select, shuffle if it is a control, and compute the factors.

    Args:
        responses: of the batch, with the score and the candidates of the rule.
        pool_of_response: int64, shape (num_responses,), see :func:`pool_of_responses`.
        rule: of one step.

    Raises:
        ValueError: see :func:`entropy_fork.core.selection.select_tokens` and
            :func:`entropy_fork.core.factors.factors_of`.
    """
    kept, pools = select_in_pools(responses, pool_of_response, rule.selector)
    score = None if (rule.use, rule.weight) == ("mask", "hard") else responses.ranked_by
    if rule.control == "matched_random":
        kept, score = shuffled(kept, score, responses.in_pools, responses.lengths, responses.seeds)
    if rule.use == "mask":
        if rule.outside == "keep" and responses.candidates is not None:
            kept |= responses.eligible.bool() & ~responses.candidates
        return Choice(kept, pools, score=score)
    assert score is not None
    factors = torch.empty(kept.shape, dtype=torch.float32)
    for _, tokens in groups(pool_of_response, responses.lengths):
        scatter(factors, tokens, factors_of(gather(score, tokens), gather(kept, tokens), rule))
    return Choice(kept, pools, factors, score)


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
    for members, tokens in groups(pool_of_response, responses.lengths):
        selection = select_tokens(
            gather(responses.ranked_by, tokens),
            gather(responses.in_pools, tokens),
            responses.lengths[members],
            selector,
            responses.order[members],
            responses.seeds[members],
        )
        scatter(kept, tokens, selection.kept)
        pools.append(Pool(selection.num_tokens, selection.num_kept, selection.threshold))
    return kept, pools


def weigh_mini_batches(responses: Responses, choice: Choice, mini_batch: Tensor, rule: Rule) -> Tensor:
    """The token weights of a choice: see :func:`~entropy_fork.core.weighting.token_weights`.

    Args:
        responses: of the batch.
        choice: see :func:`choose`.
        mini_batch: int, shape (num_responses,): the mini-batch of each response.
        rule: its ``use``, ``loss_agg_mode``, ``denominator`` and ``weight`` are used.

    Returns:
        float32, shape (num_tokens,). With another ``use`` than ``mask``: 1 for every eligible token, or its factor with
        ``use=weight``.

    Raises:
        ValueError: an unknown ``loss_agg_mode`` or ``denominator``.
    """
    if rule.use != "mask":
        return soft_weights(choice, responses.eligible, rule)
    weights = torch.zeros(responses.entropy.numel(), dtype=torch.float32)
    for members, tokens in groups(mini_batch, responses.lengths):
        # No variable for the weights: it would hold those of one mini-batch while the next ones are computed.
        scatter(
            weights,
            tokens,
            token_weights(
                gather(choice.kept, tokens),
                gather(responses.eligible, tokens),
                responses.lengths[members],
                rule.loss_agg_mode,
                rule.denominator,
                None if choice.score is None else gather(choice.score, tokens),
            ),
        )
    return weights


def soft_weights(choice: Choice, eligible: Tensor, rule: Rule) -> Tensor:
    """The token weights for another ``use`` than ``mask``: float32, shape (num_tokens,).

    Args:
        choice: see :func:`choose`.
        eligible: bool or int, shape (num_tokens,): the response mask.
        rule: its ``use`` is used.
    """
    weights = eligible.to(torch.float32)
    if rule.use == "weight":
        assert choice.factors is not None
        weights *= torch.where(choice.factors.isnan(), 1.0, choice.factors)
    return weights
