"""How many seeds show a difference? The power of the two-sided paired t test."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from examples.research.experiment.statistics import FEWEST_SEEDS, NODES, WEIGHTS, t_quantile

NORMAL = NormalDist()


def power(effect: float, pairs: int, level: float = 0.05) -> float:
    """The probability that the test finds a difference.

    The test's t is (Z + effect · √pairs) / s, where Z is normal, and s, the ratio of the measured standard deviation to
    the true one, has the density s^(df - 1) · exp(-df · s² / 2), up to a constant. For each s, Z alone decides.

    Args:
        effect: the true mean difference, divided by the standard deviation of the differences.
        pairs: of runs, at least 2.
        level: of the test, the probability to find a difference where there is none.
    """
    df = pairs - 1
    critical = t_quantile(1 - level / 2, df)
    low, high = max(0.0, 1 - 8 / np.sqrt(2 * df)), 1 + 8 / np.sqrt(2 * df)
    s = low + (high - low) * (NODES + 1) / 2
    log_density = (df - 1) * np.log(s) - df * s**2 / 2
    weights = WEIGHTS * np.exp(log_density - log_density.max())
    shift = effect * np.sqrt(pairs)
    found = [NORMAL.cdf(shift - critical * one) + NORMAL.cdf(-shift - critical * one) for one in s]
    return float(weights @ np.array(found) / weights.sum())


def pairs_needed(effect: float, wanted: float = 0.8, level: float = 0.05) -> int:
    """The fewest pairs with which the test finds a difference with the probability ``wanted``; at least three."""
    z = NORMAL.inv_cdf(1 - level / 2)
    if_known = ((NORMAL.inv_cdf(wanted) + z) / effect) ** 2  # with a spread that need not be measured
    if if_known > 5000:
        return math.ceil(if_known + z**2 / 2)  # what is left of t's own width
    pairs = max(FEWEST_SEEDS, int(if_known))
    while power(effect, pairs, level) < wanted:
        pairs += 1
    return pairs
