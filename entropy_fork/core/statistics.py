"""What a selection did, in the numbers that metrics and reports share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from entropy_fork.core.selection import Selection


@dataclass(frozen=True)
class PoolStatistics:
    """Sums over one pool, kept as sums so that pools can be added without weighing them wrongly.

    Attributes:
        num_tokens, num_kept: counts of eligible and of kept tokens.
        threshold: τ in nats.
        entropy_kept, entropy_dropped: summed entropy in nats of either side.
    """

    num_tokens: int
    num_kept: int
    threshold: float
    entropy_kept: float
    entropy_dropped: float

    @classmethod
    def of(cls, selection: Selection, entropy: Tensor, eligible: Tensor) -> PoolStatistics:
        """Measure a selection; ``entropy`` and ``eligible`` are the flat tensors that it was made from."""
        kept = float(entropy[selection.kept].double().sum())
        everything = float(entropy[eligible.bool()].double().sum())
        return cls(selection.num_tokens, selection.num_kept, selection.threshold, kept, everything - kept)


def kept_metrics(pools: Sequence[PoolStatistics]) -> dict[str, float]:
    """The metrics of one step, over all its pools.

    Returns:
        ``kept_ratio`` (realised share), ``kept_tokens``, ``pool_tokens`` (smallest pool), ``threshold`` (mean over the
        pools, nats), ``threshold_min``, ``threshold_max``, ``entropy_kept``, ``entropy_dropped`` (means in nats; a side
        without tokens, and the threshold of a random selection, are left out rather than reported as zero).
    """
    pools = [pool for pool in pools if pool.num_tokens > 0]
    if not pools:
        return {}
    num_tokens = sum(pool.num_tokens for pool in pools)
    num_kept = sum(pool.num_kept for pool in pools)
    metrics = {
        "kept_ratio": num_kept / num_tokens,
        "kept_tokens": float(num_kept),
        "pool_tokens": float(min(pool.num_tokens for pool in pools)),
    }
    if thresholds := [pool.threshold for pool in pools if not math.isnan(pool.threshold)]:
        metrics["threshold"] = math.fsum(thresholds) / len(thresholds)
        metrics["threshold_min"], metrics["threshold_max"] = min(thresholds), max(thresholds)
    if num_kept > 0:
        metrics["entropy_kept"] = math.fsum(pool.entropy_kept for pool in pools) / num_kept
    if num_kept < num_tokens:
        metrics["entropy_dropped"] = math.fsum(pool.entropy_dropped for pool in pools) / (num_tokens - num_kept)
    return metrics
