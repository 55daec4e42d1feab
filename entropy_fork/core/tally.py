"""Count what a selection kept: the numbers that metrics and reports share."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from torch import Tensor

from entropy_fork.core.flat import count_per_row, pieces

#: every metric that a masked run logs as ``entropy_fork/NAME``, with its meaning; entropies are in nats.
#: The reference page docs/reference/metrics.md is made from it.
METRICS: Mapping[str, str] = {
    "top_ratio": "ρ of this step, the share of tokens to keep. It changes only with a `schedule`.",
    "kept_ratio": "The share of the response tokens that was kept, counted after the selection.",
    "kept_tokens": "The number of kept tokens.",
    "pool_tokens": "The number of response tokens in the smallest pool.",
    "threshold": "τ, the lowest score that is kept (nats for the entropy): the mean over the pools.",
    "threshold_min": "τ of the pool with the lowest τ.",
    "threshold_max": "τ of the pool with the highest τ.",
    "outside_ratio": "With `where`: the share of the response tokens that are in no pool, if there are any.",
    "factor_mean": "With another `use` than `mask`: the mean factor of the kept tokens, after `normalize`.",
    "factor_min": "With another `use` than `mask`: the lowest factor of a kept token.",
    "factor_max": "With another `use` than `mask`: the highest factor of a kept token.",
    "entropy_kept": "The mean entropy of the kept tokens, in nats.",
    "entropy_dropped": "The mean entropy of the dropped tokens, in nats.",
    "kept_ratio_positive": "The share that was kept of the tokens with an advantage above 0.",
    "kept_ratio_negative": "The share that was kept of the tokens with an advantage below 0.",
    "responses_without_kept": "The share of the responses in which no token was kept.",
    "overlap_with_old": "With `entropy=current`: the share of the kept tokens that the old entropies keep too.",
    "overlap_with_SCORE": "With `observe`: the share of the kept tokens of the pools that SCORE in the place of "
    "`score` keeps too.",
    "rank_correlation_with_SCORE": "With `observe`: Spearman's correlation of SCORE and `score` over the response "
    "tokens (over a sample of at most 2^17).",
    "responses": "With random draws: the number of responses that have a token in the response mask.",
    "distinct_draws": "With random draws: the number of different seeds that these responses have.",
    "pg_clipfrac": "verl's `actor/pg_clipfrac` over the kept tokens: the share that PPO's clip takes out.",
    "ppo_kl": "verl's `actor/ppo_kl` over the kept tokens, in nats: the mean of old minus new log-probability.",
}


@dataclass(frozen=True)
class Pool:
    """One pool of a selection: its tokens, how many were kept, and τ, the lowest score kept (NaN where none)."""

    num_tokens: int
    num_kept: int
    threshold: float


@dataclass(frozen=True)
class Tally:
    """Counts and sums over a set of tokens. They are no means, so the tallies of ranks and mini-batches add up exactly.

    Attributes:
        num_tokens, num_kept: eligible tokens, and those of them that were kept.
        entropy_kept, entropy_dropped: the summed entropy of the kept and of the dropped tokens, in nats.
        positive_tokens, positive_kept, negative_tokens, negative_kept: the same counts, by sign of the advantage.
        responses, responses_without_kept: responses with an eligible token, and those of them without a kept one.
        known_to_both, kept_by_both: kept tokens for which another selection is known too, and those of them that the
            other selection also keeps.
        thresholds, threshold_sum, threshold_min, threshold_max: the number of pools that have a τ; the sum, the lowest
            and the highest of these τ.
        pool_tokens_min: eligible tokens of the smallest pool.
        outside: eligible tokens that are in no pool.
        factors, factor_sum, factor_min, factor_max: the number of tokens with a factor; the sum, the lowest and the
            highest of these factors.
    """

    num_tokens: float = 0.0
    num_kept: float = 0.0
    entropy_kept: float = 0.0
    entropy_dropped: float = 0.0
    positive_tokens: float = 0.0
    positive_kept: float = 0.0
    negative_tokens: float = 0.0
    negative_kept: float = 0.0
    responses: float = 0.0
    responses_without_kept: float = 0.0
    known_to_both: float = 0.0
    kept_by_both: float = 0.0
    thresholds: float = 0.0
    threshold_sum: float = 0.0
    threshold_min: float = math.inf
    threshold_max: float = -math.inf
    pool_tokens_min: float = math.inf
    outside: float = 0.0
    factors: float = 0.0
    factor_sum: float = 0.0
    factor_min: float = math.inf
    factor_max: float = -math.inf

    @classmethod
    def of(
        cls,
        kept: Tensor,
        entropy: Tensor,
        eligible: Tensor,
        lengths: Tensor,
        pools: Sequence[Pool],
        advantages: Tensor | None = None,
        kept_by_other: Tensor | None = None,
        in_pools: Tensor | None = None,
        factors: Tensor | None = None,
    ) -> Tally:
        """Count a selection.

        Args:
            kept: bool, shape (num_tokens,), flat: the tokens that are trained on.
            entropy: float, same shape, nats.
            eligible: bool or int, same shape: the response mask.
            lengths: int, shape (num_rows,): tokens per row.
            pools: the pools of the selection.
            advantages: float, same shape as ``kept``, if known.
            kept_by_other: bool, same shape: another selection of the same tokens, to compare with.
            in_pools: bool or int, same shape: the tokens of the pools, if not all eligible ones.
            factors: float32, same shape: the factor of each kept token, NaN for the others, if there are any.
        """
        has_token, has_kept = (count_per_row(mask, lengths) > 0 for mask in (eligible, kept))
        sums: dict[str, float] = defaultdict(float)
        for piece in pieces(kept.numel()):
            is_token, is_kept = (mask[piece].bool().numpy() for mask in (eligible, kept))
            nats = entropy[piece].to(torch.float64).numpy()
            sums["num_tokens"] += _count(is_token)
            sums["num_kept"] += _count(is_kept)
            sums["entropy_kept"] += _sum(nats, is_kept)
            sums["entropy_dropped"] += _sum(nats, is_token & ~is_kept)
            if advantages is not None:
                psi = advantages[piece].numpy()
                for name, side in (("positive", psi > 0), ("negative", psi < 0)):
                    sums[f"{name}_tokens"] += _count(side & is_token)
                    sums[f"{name}_kept"] += _count(side & is_kept)
            if kept_by_other is not None:
                sums["known_to_both"] += _count(is_kept)
                sums["kept_by_both"] += _count(is_kept & kept_by_other[piece].numpy())
            if in_pools is not None:
                sums["outside"] += _count(is_token & ~in_pools[piece].bool().numpy())
            if factors is not None:
                sums["factors"] += _count(is_kept)
                sums["factor_sum"] += _sum(factors[piece].to(torch.float64).numpy(), is_kept)
        pools = [pool for pool in pools if pool.num_tokens > 0]
        thresholds = [pool.threshold for pool in pools if not math.isnan(pool.threshold)]
        return cls(
            responses=_count(has_token.numpy()),
            responses_without_kept=_count((has_token & ~has_kept).numpy()),
            thresholds=float(len(thresholds)),
            threshold_sum=math.fsum(thresholds),
            threshold_min=min(thresholds, default=math.inf),
            threshold_max=max(thresholds, default=-math.inf),
            pool_tokens_min=float(min((pool.num_tokens for pool in pools), default=math.inf)),
            **_ends(factors, kept),
            **sums,
        )

    @classmethod
    def merged(cls, tallies: Iterable[Tally]) -> Tally:
        """Several tallies as one, such as those of ranks or micro-batches."""
        rows = [asdict(tally) for tally in tallies]
        combined = {}
        for field in fields(cls):
            values = [row[field.name] for row in rows]
            if field.name.endswith("_min"):
                combined[field.name] = min(values, default=math.inf)
            elif field.name.endswith("_max"):
                combined[field.name] = max(values, default=-math.inf)
            else:
                combined[field.name] = math.fsum(values)
        return cls(**combined)

    def metrics(self) -> dict[str, float]:
        """The metrics of a step.

        Returns:
            The value of each of :data:`METRICS` that this tally knows. A metric without a value is left out, not 0.
        """
        if self.num_tokens == 0:
            return {}
        metrics = {
            "kept_ratio": self.num_kept / self.num_tokens,
            "kept_tokens": self.num_kept,
            "responses_without_kept": self.responses_without_kept / self.responses,
        }
        if self.pool_tokens_min < math.inf:
            metrics["pool_tokens"] = self.pool_tokens_min
        if self.thresholds > 0:
            metrics["threshold"] = self.threshold_sum / self.thresholds
            metrics["threshold_min"], metrics["threshold_max"] = self.threshold_min, self.threshold_max
        if self.factors > 0:
            metrics["factor_min"], metrics["factor_max"] = self.factor_min, self.factor_max
        if self.outside > 0:
            metrics["outside_ratio"] = self.outside / self.num_tokens
        for name, total, count in (
            ("factor_mean", self.factor_sum, self.factors),
            ("entropy_kept", self.entropy_kept, self.num_kept),
            ("entropy_dropped", self.entropy_dropped, self.num_tokens - self.num_kept),
            ("kept_ratio_positive", self.positive_kept, self.positive_tokens),
            ("kept_ratio_negative", self.negative_kept, self.negative_tokens),
            ("overlap_with_old", self.kept_by_both, self.known_to_both),
        ):
            if count > 0:
                metrics[name] = total / count
        return metrics


def _ends(factors: Tensor | None, kept: Tensor) -> dict[str, float]:
    if factors is None or not kept.any():
        return {}
    values = factors[kept]
    return {"factor_min": float(values.min()), "factor_max": float(values.max())}


def draws(seeds: Tensor, eligible: Tensor, lengths: Tensor) -> dict[str, float]:
    """Show whether random draws are made for each response by itself. Two with the same seed draw the same positions.

    Args:
        seeds: int64, shape (num_rows,): the seed of each row's draws.
        eligible: bool or int, shape (num_tokens,), flat: the response mask.
        lengths: int, shape (num_rows,): tokens per row.

    Returns:
        Two metrics: ``responses``, the number of responses with an eligible token, and ``distinct_draws``, the number
        of their different seeds. They are equal if all is well.
    """
    has_token = count_per_row(eligible, lengths) > 0
    return {"responses": float(has_token.sum()), "distinct_draws": float(seeds[has_token].unique().numel())}


def _count(mask: np.ndarray) -> float:
    return float(np.count_nonzero(mask))


def _sum(values: np.ndarray, mask: np.ndarray) -> float:
    return float(values[mask].sum())
