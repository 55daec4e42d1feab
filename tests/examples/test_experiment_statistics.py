"""The statistics of the experiment, each restated in another way, and their edges."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest

from examples.research.experiment import power as powers
from examples.research.experiment.statistics import (
    bootstrap_interval,
    chi_squared_quantile,
    difference,
    height_at,
    late,
    mean_height,
    spread,
    spread_interval,
    t_cdf,
    t_interval,
    t_quantile,
)

DIFFERENCES = np.array([0.03, -0.01, 0.05, 0.02, 0.04, 0.00])


def test_the_mean_height_is_the_average_of_the_interpolated_curve() -> None:
    x, y = np.array([0.0, 6.0, 8.0, 30.0]), np.array([0.2, 0.5, 0.4, 0.9])
    fine = np.linspace(0, 30, 300_001)
    assert mean_height(x, y) == pytest.approx(np.interp(fine, x, y).mean(), abs=1e-5)
    assert mean_height(x + 7, y) == pytest.approx(mean_height(x, y))
    assert mean_height(np.array([5.0]), np.array([0.3])) == 0.3


def test_between_two_points_the_height_is_on_the_straight_line_and_outside_there_is_none() -> None:
    x, y = np.array([0.0, 100.0, 300.0]), np.array([0.2, 0.4, 0.8])
    assert height_at(x, y, 150.0) == pytest.approx(0.5)
    assert height_at(x, y, 300.0) == 0.8
    assert math.isnan(height_at(x, y, 300.1))


def test_late_is_the_last_quarter_of_what_is_known() -> None:
    assert late(np.array([np.nan, *range(1, 9)])) == 7.5
    assert late(np.array([np.nan, 3.0])) == 3.0
    assert math.isnan(late(np.array([np.nan])))


#: from printed tables of Student's t: {(share, degrees of freedom): t}
PRINTED = {
    (0.975, 1): 12.706, (0.975, 2): 4.303, (0.975, 5): 2.571, (0.975, 10): 2.228, (0.975, 30): 2.042, (0.95, 3): 2.353,
    (0.995, 7): 3.499, (0.9, 20): 1.325, (0.975, 120): 1.980,
}  # fmt: skip


@pytest.mark.parametrize(("share", "df"), PRINTED)
def test_t_is_that_of_the_printed_tables(share: float, df: int) -> None:
    assert t_quantile(share, df) == pytest.approx(PRINTED[share, df], abs=5.1e-4)
    assert t_quantile(1 - share, df) == pytest.approx(-PRINTED[share, df], abs=5.1e-4)
    assert t_cdf(t_quantile(share, df), df) == pytest.approx(share, abs=1e-9)


def test_t_has_closed_forms_at_one_and_two_degrees_of_freedom() -> None:
    for t in (-3.0, 0.0, 0.4, 25.0):
        assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-12)
        assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-12)


def test_the_t_interval_is_the_textbooks() -> None:
    low, high = t_interval(DIFFERENCES)
    half = 2.5705818 * statistics.stdev(DIFFERENCES) / math.sqrt(6)
    assert (low, high) == pytest.approx((DIFFERENCES.mean() - half, DIFFERENCES.mean() + half), abs=1e-8)


def test_the_bootstrap_is_near_the_percentiles_of_all_resamples() -> None:
    few = DIFFERENCES[:5]
    every = [statistics.fmean(drawn) for drawn in itertools.product(few, repeat=5)]
    assert bootstrap_interval(few) == pytest.approx(np.quantile(every, [0.025, 0.975]), abs=1e-3)
    assert bootstrap_interval(few) == bootstrap_interval(few), "it is seeded"


def test_with_six_seeds_the_bootstrap_is_narrower_than_t() -> None:
    (low, high), (t_low, t_high) = bootstrap_interval(DIFFERENCES), t_interval(DIFFERENCES)
    assert t_low < low < high < t_high
    assert (high - low) / (t_high - t_low) == pytest.approx(1.96 * math.sqrt(5 / 6) / 2.571, abs=0.06)


def test_the_t_interval_holds_the_truth_as_often_as_it_says_and_the_bootstrap_less_often() -> None:
    draws = np.random.default_rng(0).normal(0.3, 1.0, size=(800, 6))
    held = {
        interval: np.mean([low <= 0.3 <= high for low, high in map(interval, draws)])
        for interval in (t_interval, lambda one: bootstrap_interval(one, draws=400))
    }
    by_t, by_bootstrap = held.values()
    assert by_t == pytest.approx(0.95, abs=0.025)
    assert by_bootstrap < 0.90


def test_under_three_seeds_there_is_no_interval() -> None:
    for seeds in (1, 2):
        found = difference(dict(enumerate([0.5, 0.6][:seeds])), dict(enumerate([0.4, 0.4][:seeds])))
        assert found.seeds == seeds
        assert found.mean == pytest.approx([0.1, 0.15][seeds - 1])
        assert np.isnan([*found.bootstrap, *found.t]).all()
    assert math.isnan(spread(np.array([0.1])))


def test_a_difference_is_paired_by_seed() -> None:
    ours, theirs = {1: 0.5, 2: 0.9, 4: 0.7, 5: 0.1, 7: math.nan}, {4: 0.4, 1: 0.4, 2: 0.7, 3: 0.0, 7: 0.2}
    found = difference(ours, theirs)
    assert (found.seeds, found.above) == (3, 3)
    assert difference(theirs, ours).above == 0
    assert found.mean == pytest.approx(statistics.fmean([0.1, 0.2, 0.3]))
    assert found.spread == pytest.approx(statistics.stdev([0.1, 0.2, 0.3]))
    assert found.t == t_interval(np.array([0.5 - 0.4, 0.9 - 0.7, 0.7 - 0.4]))
    none = difference(ours, {})
    assert none.seeds == 0
    assert math.isnan(none.mean)


#: from printed tables of chi-squared: {(share, degrees of freedom): value}
CHI_SQUARED = {
    (0.025, 2): 0.0506, (0.975, 2): 7.378, (0.025, 5): 0.831, (0.975, 5): 12.833, (0.5, 10): 9.342, (0.95, 30): 43.773,
}  # fmt: skip


@pytest.mark.parametrize(("share", "df"), CHI_SQUARED)
def test_chi_squared_is_that_of_the_printed_tables(share: float, df: int) -> None:
    assert chi_squared_quantile(share, df) == pytest.approx(CHI_SQUARED[share, df], abs=5.1e-4)


def test_the_interval_of_a_spread_holds_the_truth_as_often_as_it_says() -> None:
    drawn = np.random.default_rng(2).normal(0.0, 2.0, size=(20_000, 3)).std(1, ddof=1)
    low, high = spread_interval(1.0, 3)
    assert np.mean((drawn * low < 2.0) & (drawn * high > 2.0)) == pytest.approx(0.95, abs=0.005)


#: from textbooks: {mean difference / standard deviation: pairs for 80% power at 5%}
TEXTBOOK = {0.2: 199, 0.5: 34, 0.8: 15, 1.0: 10}


@pytest.mark.parametrize("effect", TEXTBOOK)
def test_as_many_pairs_as_the_textbooks_say(effect: float) -> None:
    assert powers.pairs_needed(effect) == TEXTBOOK[effect]
    assert powers.power(effect, TEXTBOOK[effect]) >= 0.8 > powers.power(effect, TEXTBOOK[effect] - 1)


def test_fewer_than_three_pairs_are_never_enough() -> None:
    assert powers.pairs_needed(50.0) == 3


def test_for_a_tiny_difference_the_count_is_near_that_with_a_known_spread() -> None:
    for effect in (0.0398, 0.039, 0.001):  # 4,957 pairs by the search, the others without it
        assert powers.pairs_needed(effect) == pytest.approx((1.959964 + 0.841621) ** 2 / effect**2 + 1.92, rel=2e-4)


@pytest.mark.parametrize(("effect", "pairs"), [(1.0, 6), (0.5, 34), (2.0, 3), (1.5, 2)])
def test_the_power_is_the_share_of_simulated_tests_that_find_the_difference(effect: float, pairs: int) -> None:
    drawn = np.random.default_rng(1).normal(effect, 1.0, size=(40_000, pairs))
    t = drawn.mean(1) / drawn.std(1, ddof=1) * np.sqrt(pairs)
    assert powers.power(effect, pairs) == pytest.approx(np.mean(np.abs(t) > t_quantile(0.975, pairs - 1)), abs=0.008)


def test_without_a_difference_the_power_is_the_level() -> None:
    for pairs in (2, 6, 100):
        assert powers.power(0.0, pairs) == pytest.approx(0.05, abs=1e-6)
        assert powers.power(-0.7, pairs) == pytest.approx(powers.power(0.7, pairs))
