"""Statistics of runs that are paired by their seed: pure functions of numpy arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Interval = tuple[float, float]

#: with fewer seeds than this an interval says nothing, so there is none
FEWEST_SEEDS = 3
NO_INTERVAL: Interval = (np.nan, np.nan)
#: nodes and weights of Gauss-Legendre's rule on [-1, 1]
NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)


def mean_height(x: Floats, y: Floats) -> float:
    """The area under the straight lines through the points, divided by their width; of one point, its height."""
    if len(x) == 1:
        return float(y[0])
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / (x[-1] - x[0]))


def height_at(x: Floats, y: Floats, where: float) -> float:
    """The height at ``where`` of the straight lines through the points; NaN outside of them."""
    return float(np.interp(where, x, y, left=np.nan, right=np.nan))


def late(values: Floats) -> float:
    """The mean of the last quarter of the values, NaNs left out."""
    known = values[~np.isnan(values)]
    return float(known[-max(1, len(known) // 4) :].mean()) if len(known) else np.nan


def spread(values: Floats) -> float:
    """The standard deviation over the seeds; NaN for a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else np.nan


def t_cdf(t: float, df: int) -> float:
    """The share of Student's t distribution below ``t``.

    With t = √df · tan θ its density is cos(θ)^(df - 1), up to a constant, on (-π/2, π/2).
    """

    def area(angle: float) -> float:
        return float(angle / 2 * (WEIGHTS @ np.cos(angle / 2 * (NODES + 1)) ** (df - 1)))

    return 0.5 + area(np.arctan(t / np.sqrt(df))) / (2 * area(np.pi / 2))


@cache
def t_quantile(share: float, df: int) -> float:
    """The t below which ``share`` of Student's t distribution lies, by bisection over its angle θ."""
    low, high = -np.pi / 2, np.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        below = t_cdf(np.sqrt(df) * np.tan(middle), df) < share
        low, high = (middle, high) if below else (low, middle)
    return float(np.sqrt(df) * np.tan(low))


def t_interval(differences: Floats, level: float = 0.95) -> Interval:
    """The interval of the mean difference by the paired t test, which takes the differences to be normal."""
    n = len(differences)
    if n < FEWEST_SEEDS:
        return NO_INTERVAL
    half = t_quantile((1 + level) / 2, n - 1) * spread(differences) / np.sqrt(n)
    return float(differences.mean() - half), float(differences.mean() + half)


def bootstrap_interval(differences: Floats, level: float = 0.95, draws: int = 10_000, seed: int = 0) -> Interval:
    """The interval of the mean difference by the percentiles of the means of resampled seeds.

    It is too narrow for a few seeds: with n of them its width is near that of a normal interval, times √((n - 1) / n).
    With three of them it reaches from the smallest to the largest difference.
    """
    n = len(differences)
    if n < FEWEST_SEEDS:
        return NO_INTERVAL
    means = differences[np.random.default_rng(seed).integers(n, size=(draws, n))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def chi_squared_quantile(share: float, df: int) -> float:
    """The value below which ``share`` of the chi-squared distribution lies, by bisection; ``df`` is at least 2.

    The square root of such a value has the density x^(df - 1) · exp(-x² / 2), up to a constant.
    """

    def area(end: float) -> float:
        x = end / 2 * (NODES + 1)
        return float(end / 2 * (WEIGHTS @ (x ** (df - 1) * np.exp((df - 1 - x**2) / 2))))

    far = np.sqrt(df) + 8.0
    low, high = 0.0, far
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if area(middle) < share * area(far) else (low, middle)
    return float(low**2)


def spread_interval(measured: float, n: int, level: float = 0.95) -> Interval:
    """The interval of the true standard deviation, if it was measured on ``n`` normal differences; at least 3."""
    low, high = (chi_squared_quantile(share, n - 1) for share in ((1 + level) / 2, (1 - level) / 2))
    return measured * math.sqrt((n - 1) / low), measured * math.sqrt((n - 1) / high)


@dataclass(frozen=True)
class Difference:
    """One arm minus another, over the seeds that both have.

    Attributes:
        seeds: how many.
        above: how many of the differences are above 0.
        mean, spread: of the differences; the spread is NaN for a single seed.
        bootstrap, t: 95% intervals of the mean difference; NaNs with fewer than three seeds.
    """

    seeds: int
    above: int
    mean: float
    spread: float
    bootstrap: Interval
    t: Interval


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Compare two arms, given as values by seed. A seed that one of them lacks, or has as a NaN, is left out."""
    pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    values = np.array([pair for pair in pairs if not np.isnan(pair)])
    mean = float(values.mean()) if len(values) else np.nan
    above = int((values > 0).sum())
    return Difference(len(values), above, mean, spread(values), bootstrap_interval(values), t_interval(values))
