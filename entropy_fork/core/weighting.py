"""From kept tokens to token weights: 0 for a dropped token, a factor for a kept one.

verl multiplies the policy-gradient loss of each token by ``rollout_is_weights``, and then divides the sum by a number
of tokens (``verl/trainer/ppo/core_algos.py: agg_loss``). The paper's second version and the authors' code divide by
the number of *kept* tokens. The paper's first version, TRL and ms-swift divide by the number of *all* response tokens:
at ρ = 0.2 that loss is five times smaller. verl divides by all. So to divide by the kept tokens, a kept token gets the
weight all / kept, and verl's own aggregation does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_fork.core.flat import count_per_row, pieces
from entropy_fork.core.rule import LOSS_AGG_MODES, SEQ_MEAN_TOKEN_MEAN, TOKEN_MEAN, TOKEN_SUMS, check_value


@dataclass(frozen=True)
class Counts:
    """The counts that a weight is computed from, summed over a whole mini-batch on all ranks.

    Attributes:
        num_tokens, num_kept: eligible tokens, and those of them that were kept.
        score_kept: the summed score of the kept tokens; used by soft weights only.
    """

    num_tokens: int
    num_kept: int
    score_kept: float = 0.0

    @classmethod
    def of(cls, kept: Tensor, eligible: Tensor, score: Tensor | None = None) -> Counts:
        """Count the tokens given.

        Args:
            kept: bool, shape (num_tokens,).
            eligible: bool or int, same shape: the response mask.
            score: float, same shape; needed for soft weights only.
        """
        score_kept = 0.0
        if score is not None:
            for piece in pieces(kept.numel()):
                score_kept += float(_not_negative(score[piece][kept[piece]]).sum())
        return cls(int(torch.count_nonzero(eligible)), int(torch.count_nonzero(kept)), score_kept)


def token_weights(
    kept: Tensor,
    eligible: Tensor,
    lengths: Tensor,
    loss_agg_mode: str,
    denominator: str = "kept",
    soft_score: Tensor | None = None,
    counts: Counts | None = None,
) -> Tensor:
    """The weight of each token of one mini-batch, or of a part of one.

    If everything is kept with hard weights, every weight is exactly 1.0: so ρ = 1.0 is the plain run, bit for bit.

    Rollout correction may reject tokens. verl's token-mean still counts the rejected tokens in its divisor: it takes
    the divisor from ``loss_mask``, which rejection does not change (``verl/workers/engine/fsdp/transformer_impl.py:
    forward_backward_batch``). These weights do not change that. With ``denominator="kept"`` the loss is then the mean
    over the kept tokens, times the share of response tokens that was not rejected. The plain loss, ρ = 1.0, is its mean
    times the same share. So ρ changes the choice of tokens and nothing else.

    Args:
        kept: bool, shape (num_tokens,): the selection, flat.
        eligible: bool or int, shape (num_tokens,): the response mask.
        lengths: int, shape (num_rows,): tokens per row.
        loss_agg_mode: verl's ``actor.loss_agg_mode``.
        denominator: ``kept`` turns verl's mean over all tokens into the mean over the kept ones; ``all`` does not.
        soft_score: float, shape (num_tokens,): if given, a kept token weighs in proportion to its score (below 0 it
            counts as 0) instead of 1. The mean over the kept tokens is 1.
        counts: the counts of the whole mini-batch, if the tokens given are only a part of it (a micro-batch, a rank's
            share).

    Returns:
        float32, shape (num_tokens,). All zero if nothing is kept (never NaN).

    Raises:
        ValueError: a ``loss_agg_mode`` that verl 0.9 does not have, or an unknown ``denominator``.
    """
    check_value("denominator", denominator)
    counts = Counts.of(kept, eligible, soft_score) if counts is None else counts
    weights = kept.to(torch.float32)
    if counts.num_kept == 0:
        return weights
    if soft_score is not None and counts.score_kept > 0.0:
        mean = counts.score_kept / counts.num_kept
        for piece in pieces(weights.numel()):
            weights[piece].mul_((_not_negative(soft_score[piece]) / mean).to(torch.float32))
    if denominator == "all" or loss_agg_mode in TOKEN_SUMS:
        return weights
    if loss_agg_mode == TOKEN_MEAN:
        return weights.mul_(counts.num_tokens / counts.num_kept)
    if loss_agg_mode == SEQ_MEAN_TOKEN_MEAN:
        # Each sequence has its own mean. In a sequence without a kept token, all weights stay 0.
        all_of_row, kept_of_row = (count_per_row(mask, lengths) for mask in (eligible, kept))
        factor = torch.where(kept_of_row > 0, all_of_row / kept_of_row.clamp(min=1), 0.0).to(torch.float32)
        for row, factor_of_row in zip(weights.split(lengths.tolist()), factor.tolist(), strict=True):
            row.mul_(factor_of_row)
        return weights
    raise ValueError(f"unknown loss_agg_mode {loss_agg_mode!r}: expected one of {LOSS_AGG_MODES}")


def _not_negative(score: Tensor) -> Tensor:
    return score.to(torch.float64).clamp(min=0.0)
