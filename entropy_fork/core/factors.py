"""From a score to a factor: what ``use=weight``, ``advantage`` and ``clip`` do with the kept tokens.

A map turns the score of each kept token into a factor; a token that is not kept gets what leaves it as it is. Two maps
look at the whole pool (``range``, ``rank``), and so does ``normalize=pool``. They give the same factors to the last bit
whatever the order of the tokens, so on any number of ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from entropy_fork.core.flat import pieces
from entropy_fork.core.rule import Rule
from entropy_fork.core.scores import exact_mean

#: DCPO's highest ratio (arXiv 2509.02333, section 3)
DCPO_HIGHEST = 10.0


def factors_of(score: Tensor, kept: Tensor, rule: Rule) -> Tensor:
    """The factor of each token of one pool.

    Args:
        score: float, shape (num_tokens,): finite for kept tokens.
        kept: bool, same shape.
        rule: its ``map`` and ``map_…`` keys are used, and with ``use=weight`` ``normalize``.

    Returns:
        float32, shape (num_tokens,): the map of the score for kept tokens, NaN for the others.

    Raises:
        ValueError: a factor is not finite, or it is below 0 where that would turn the loss round.
    """
    factors = torch.full(kept.shape, torch.nan, dtype=torch.float32)
    values = score[kept]
    if values.numel() == 0:
        return factors
    mapped = _mapped(values, rule)
    lowest, highest = float(mapped.min()), float(mapped.max())
    if not np.isfinite([lowest, highest]).all():
        raise ValueError(f"map={rule.map} gave a factor of {lowest} to {highest}; factors must be finite")
    if lowest < 0 and (rule.use, rule.combine) != ("advantage", "add"):
        raise ValueError(
            f"map={rule.map} gave a factor of {lowest:g}: below 0 it would turn the loss of a token round. Write "
            f"another map_offset or map_slope, or map=clipped with map_low=0"
        )
    if rule.use == "weight" and rule.normalize == "pool" and highest > 0:
        mapped /= exact_mean(mapped)
    factors[kept] = mapped
    return factors


def _mapped(values: Tensor, rule: Rule) -> Tensor:
    """The map of the scores of a pool's kept tokens: float32, same shape."""
    if rule.map == "dcpo":  # clip_bounds looks at the score itself
        return torch.ones(values.shape, dtype=torch.float32)
    if rule.map == "rank":
        return _by_rank(values, rule.map_low, rule.map_high)
    if rule.map == "range":
        low, high = float(values.min()), float(values.max())
        slope = (rule.map_high - rule.map_low) / (high - low) if high > low else 0.0
        offset = rule.map_low if high > low else (rule.map_low + rule.map_high) / 2
    else:
        low, slope, offset = 0.0, rule.map_slope, rule.map_offset
    mapped = torch.empty(values.shape, dtype=torch.float32)
    for piece in pieces(values.numel()):
        part = values[piece].double()
        if rule.map == "exponential":
            part = (part * rule.map_rate).exp()
        part = (part - low) * slope + offset
        mapped[piece] = part.clamp(rule.map_low, rule.map_high) if rule.map == "clipped" else part
    return mapped


def _by_rank(values: Tensor, low: float, high: float) -> Tensor:
    """From ``low`` for the lowest value to ``high`` for the highest. Equal values share the middle of their ranks."""
    scores = (values if values.dtype == torch.float64 else values.to(torch.float32)).numpy()  # numpy has no bfloat16
    ordered = np.sort(scores)
    below, upto = np.searchsorted(ordered, scores, "left"), np.searchsorted(ordered, scores, "right")
    middle = (below + upto - 1) / 2 / max(1, scores.size - 1) if scores.size > 1 else np.full(1, 0.5)
    return torch.from_numpy((low + (high - low) * middle).astype(np.float32))


def changed_advantages(advantages: Tensor, factors: Tensor, rule: Rule) -> Tensor:
    """Advantages with the factors at work: ``A·f``, or ``A + min(f, |A|/κ)`` (arXiv 2506.14758, Eq. 3).

    Args:
        advantages: float, shape (num_tokens,).
        factors: float32, same shape, see :func:`factors_of`; NaN leaves an advantage as it is.
        rule: its ``combine`` and ``add_limit`` (κ) are used.

    Returns:
        The type of ``advantages``, same shape.
    """
    changed = advantages.clone()
    for piece in pieces(changed.numel()):
        psi, factor = changed[piece], factors[piece].to(changed.dtype)
        if rule.combine == "multiply":
            new = psi * factor
        else:
            limited = torch.minimum(factor, psi.abs() / rule.add_limit) if rule.add_limit else factor
            new = psi + limited
        changed[piece] = torch.where(factor.isnan(), psi, new)
    return changed


def clip_bounds(factors: Tensor, score: Tensor, rule: Rule, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The lowest and highest ratio of each token that PPO's clip lets through.

    Args:
        factors: float32, shape (num_tokens,), see :func:`factors_of`; NaN leaves verl's range.
        score: float, same shape: the surprisal, for ``map=dcpo``.
        rule: its ``map`` is used.
        low: verl's ``clip_ratio_low``.
        high: verl's ``clip_ratio_high``.

    Returns:
        Two float32 tensors of that shape. For a factor f: 1 - f·low and 1 + f·high, rounded once. For ``dcpo``:
        ½ + ½√max(1 - 4·low/p, 0) and ½ + ½√(1 + 4·high/p), at most 10 (arXiv 2509.02333, Eq. 4).
    """
    lowest, highest = (torch.empty(factors.shape, dtype=torch.float32) for _ in range(2))
    for piece in pieces(factors.numel()):
        factor = factors[piece].double()
        treated = ~factor.isnan()
        if rule.map == "dcpo":
            inverse = score[piece].double().exp().clamp(max=1e300)  # 1/p; an infinite one times a low of 0 is no number
            bottom = 0.5 + 0.5 * (1 - 4 * low * inverse).clamp(min=0.0).sqrt()
            top = (0.5 + 0.5 * (1 + 4 * high * inverse).sqrt()).clamp(max=DCPO_HIGHEST)
        else:
            bottom, top = 1 - low * factor, 1 + high * factor
        lowest[piece] = torch.where(treated, bottom, 1 - low)
        highest[piece] = torch.where(treated, top, 1 + high)
    return lowest, highest
