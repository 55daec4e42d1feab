"""From kept tokens to token weights: 0 for a dropped token, the declared factor for a kept one.

verl multiplies ``rollout_is_weights`` into the policy-gradient loss of each token and then divides by a number of
tokens (``verl/trainer/ppo/core_algos.py: agg_loss``). The paper's second version and the authors' code divide by the
number of *kept* tokens; its first version, TRL and ms-swift by *all*, which at ρ = 0.2 is a loss five times smaller
under the same name. verl's own division is the one by all, so the other is a factor (all / kept) on the weight, and
verl's own aggregation does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_fork.core.flat import count_per_row, pieces
from entropy_fork.core.rule import LOSS_AGG_MODES, SEQ_MEAN_TOKEN_MEAN, TOKEN_MEAN, TOKEN_SUMS, check_value


@dataclass(frozen=True)
class Counts:
    """What a factor is made of, summed over a whole mini-batch on all ranks.

    Attributes:
        num_tokens, num_kept: eligible tokens, and those of them that were kept.
        entropy_kept: their summed entropy in nats; used by soft weights only.
    """

    num_tokens: int
    num_kept: int
    entropy_kept: float = 0.0

    @classmethod
    def of(cls, kept: Tensor, eligible: Tensor, entropy: Tensor | None = None) -> Counts:
        """Count the tokens given.

        Args:
            kept: bool, shape (num_tokens,).
            eligible: bool or int, same shape: the response mask.
            entropy: float, same shape, nats; needed for soft weights only.
        """
        entropy_kept = 0.0
        if entropy is not None:
            for piece in pieces(kept.numel()):
                entropy_kept += float(_not_negative(entropy[piece][kept[piece]]).sum())
        return cls(int(torch.count_nonzero(eligible)), int(torch.count_nonzero(kept)), entropy_kept)


def token_weights(
    kept: Tensor,
    eligible: Tensor,
    lengths: Tensor,
    loss_agg_mode: str,
    denominator: str = "kept",
    soft_entropy: Tensor | None = None,
    counts: Counts | None = None,
) -> Tensor:
    """The weight of each token of one mini-batch, or of a part of one.

    With everything kept and hard weights all are exactly 1.0, so that ρ = 1.0 is the plain run bit for bit.

    Where rollout correction rejects tokens, verl's token-mean still divides by the rejected ones: it takes the divisor
    from ``loss_mask``, which rejection does not change (``verl/workers/engine/fsdp/transformer_impl.py:
    forward_backward_batch``). The weights leave that as it is. With ``denominator="kept"`` the loss is then the mean
    over the kept tokens times the share of the response tokens that was not rejected, and the plain loss of ρ = 1.0 is
    its own mean times the same share. So ρ changes nothing but the choice of tokens.

    Args:
        kept: bool, shape (num_tokens,): the selection, flat.
        eligible: bool or int, shape (num_tokens,): the response mask.
        lengths: int, shape (num_rows,): tokens per row.
        loss_agg_mode: verl's ``actor.loss_agg_mode``.
        denominator: ``kept`` turns verl's mean over all tokens into the mean over the kept ones, ``all`` leaves it.
        soft_entropy: float, shape (num_tokens,), nats: where given, a kept token's weight is in proportion to its
            entropy, with a mean of 1 over the kept tokens, instead of 1.
        counts: of the whole mini-batch, where the tokens given are only a part of it (a micro-batch, a rank's share).

    Returns:
        float32, shape (num_tokens,). All zero where nothing is kept (never NaN).

    Raises:
        ValueError: a ``loss_agg_mode`` that verl 0.9 does not have, or an unknown ``denominator``.
    """
    check_value("denominator", denominator)
    counts = Counts.of(kept, eligible, soft_entropy) if counts is None else counts
    weights = kept.to(torch.float32)
    if counts.num_kept == 0:
        return weights
    if soft_entropy is not None and counts.entropy_kept > 0.0:
        mean = counts.entropy_kept / counts.num_kept
        for piece in pieces(weights.numel()):
            weights[piece].mul_((_not_negative(soft_entropy[piece]) / mean).to(torch.float32))
    if denominator == "all" or loss_agg_mode in TOKEN_SUMS:
        return weights
    if loss_agg_mode == TOKEN_MEAN:
        return weights.mul_(counts.num_tokens / counts.num_kept)
    if loss_agg_mode == SEQ_MEAN_TOKEN_MEAN:
        # Each sequence has a mean of its own; one without a kept token keeps weight zero.
        all_of_row, kept_of_row = (count_per_row(mask, lengths) for mask in (eligible, kept))
        factor = torch.where(kept_of_row > 0, all_of_row / kept_of_row.clamp(min=1), 0.0).to(torch.float32)
        for row, factor_of_row in zip(weights.split(lengths.tolist()), factor.tolist(), strict=True):
            row.mul_(factor_of_row)
        return weights
    raise ValueError(f"unknown loss_agg_mode {loss_agg_mode!r}: expected one of {LOSS_AGG_MODES}")


def _not_negative(entropy: Tensor) -> Tensor:
    return entropy.to(torch.float64).clamp(min=0.0)
