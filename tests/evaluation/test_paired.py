"""The paired statistics against plain restatements, and the interval's coverage by simulation."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropy_fork.evaluation.paired import (
    Difference,
    PairedSummary,
    average_pair,
    mean_difference,
    paired_difference,
    student_quantile,
    summarise_pair,
)
from entropy_fork.evaluation.statistics import pass_ks, summarise_benchmark

#: the 97.5% quantile by degrees of freedom, as printed in tables of Student's t
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 10: 2.228, 29: 2.045, 249: 1.970}


@st.composite
def pairs(draw: st.DrawFn, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong, before and after, each of shape (questions, answers)."""
    questions, k = draw(st.integers(1, 8)), k or draw(st.integers(1, 5))
    cells = draw(st.lists(st.booleans(), min_size=2 * questions * k, max_size=2 * questions * k))
    both = np.array(cells).reshape(2, questions, k)
    return both[0], both[1]


def lengths_of(right: np.ndarray) -> np.ndarray:
    return 3 + np.arange(right.size).reshape(right.shape) % 11 + 2 * right


def summary_of(pair: tuple[np.ndarray, np.ndarray]) -> PairedSummary:
    return summarise_pair(pair, (lengths_of(pair[0]), lengths_of(pair[1])))


def share_of_subsets(row: list[bool], k: int) -> Fraction:
    subsets = list(combinations(row, k))
    return Fraction(sum(any(subset) for subset in subsets), len(subsets))


@pytest.mark.parametrize(("degrees", "printed"), TABLE.items())
def test_the_quantile_is_that_of_the_tables(degrees: int, printed: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(printed, abs=6e-4)


@given(st.floats(0.5, 0.999), st.floats(1, 400))
def test_the_quantile_turns_the_distribution_around(probability: float, degrees: float) -> None:
    """The density, summed up to the quantile with Simpson's rule, gives the probability."""
    t = student_quantile(probability, degrees)
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    points = np.linspace(0, math.asinh(t), 2001)  # x = sinh(y) reaches far out in even steps
    heights = scale * (1 + np.sinh(points) ** 2 / degrees) ** (-(degrees + 1) / 2) * np.cosh(points)
    area = (points[1] / 3) * (heights[0] + 4 * heights[1:-1:2].sum() + 2 * heights[2:-1:2].sum() + heights[-1])
    assert 0.5 + area == pytest.approx(probability, abs=1e-6)


def test_the_quantile_knows_its_limits() -> None:
    assert student_quantile(0.975, 1e9) == pytest.approx(1.959964, abs=1e-5)
    assert student_quantile(0.5, 3) == 0
    for wrong in ((0.4, 3), (1, 3), (0.9, 0.5)):
        with pytest.raises(ValueError, match="no quantile"):
            student_quantile(*wrong)


@given(pairs())
def test_a_pair_against_plain_sums(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """With fractions, lists and subsets, and the two more questions really added to the list."""
    summary = summary_of(pair)
    before, after = (one.tolist() for one in pair)
    questions, k = len(before), len(before[0])
    gaps = [Fraction(sum(b) - sum(a), k) for a, b in zip(before, after, strict=True)]
    assert (summary.better, summary.worse, summary.same) == (
        sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps), sum(gap == 0 for gap in gaps)
    )  # fmt: skip
    check(summary.accuracy, gaps, Fraction(1, k))
    assert list(summary.pass_at) == pass_ks(k)
    for i, difference in summary.pass_at.items():
        rows = [
            share_of_subsets(b, i) - share_of_subsets(a, i) for a, b in zip(before, after, strict=True)
        ]  # fmt: skip
        step = share_of_subsets([True] + [False] * (k - 1), i)  # no right answer, then one
        check(difference, rows, step)
    lengths = [lengths_of(one).mean(axis=1) for one in pair]
    assert summary.tokens.difference == pytest.approx((lengths[1] - lengths[0]).mean())
    if k == 1:
        assert summary.standard_error_same_questions is None
    else:  # each answer of a question has the variance p(1 − p), estimated without bias
        variance = Fraction(0)
        for row in before + after:
            share = Fraction(sum(row), k)
            variance += sum((Fraction(int(cell)) - share) ** 2 for cell in row) / (k - 1) / k
        assert summary.standard_error_same_questions == pytest.approx(math.sqrt(variance) / questions)


def check(found: Difference, gaps: list[Fraction], step: Fraction) -> None:
    """The interval of a difference, where the two more questions lie one step beside the mean."""
    count = len(gaps)
    mean = sum(gaps, Fraction(0)) / count
    assert found.difference == pytest.approx(float(mean), abs=1e-12)
    if count == 1:
        assert found.interval is None
        return
    more = [*gaps, mean + step, mean - step]
    error = math.sqrt(sum((gap - mean) ** 2 for gap in more) / (count - 1) / count)
    assert found.standard_error == pytest.approx(error)
    reach = TABLE[count - 1] * error
    assert found.interval is not None
    assert found.interval == pytest.approx((max(-1, mean - reach), min(1, mean + reach)), abs=1e-3)


@given(pairs())
def test_two_summaries_and_their_pair_agree(pair: tuple[np.ndarray, np.ndarray]) -> None:
    paired = summary_of(pair)
    for one, name in zip(pair, ("before", "after"), strict=True):
        alone = summarise_benchmark(one, lengths_of(one), np.zeros_like(one), np.ones_like(one))
        assert getattr(paired.accuracy, name) == pytest.approx(alone.accuracy)
        assert getattr(paired.tokens, name) == pytest.approx(alone.mean_tokens)
        assert {i: getattr(value, name) for i, value in paired.pass_at.items()} == pytest.approx(alone.pass_at)


@given(pairs(), st.randoms(use_true_random=False))
def test_the_order_of_questions_and_answers_means_nothing_and_after_is_the_mirror_of_before(
    pair: tuple[np.ndarray, np.ndarray], random: Any
) -> None:
    summary = summary_of(pair)
    order = list(range(len(pair[0])))
    random.shuffle(order)
    lengths = lengths_of(pair[0])
    moved = summarise_pair((pair[0][order], pair[1][order]), (lengths[order], lengths_of(pair[1])[order]))
    assert moved.accuracy.interval == pytest.approx(summary.accuracy.interval)
    assert (moved.better, moved.worse) == (summary.better, summary.worse)
    assert summary_of((pair[0][:, ::-1], pair[1])).accuracy == summary.accuracy

    mirror = summary_of((pair[1], pair[0]))
    assert mirror.accuracy.difference == pytest.approx(-summary.accuracy.difference)
    assert (mirror.better, mirror.worse) == (summary.worse, summary.better)
    if summary.accuracy.interval is not None:
        low, high = summary.accuracy.interval
        assert mirror.accuracy.interval == pytest.approx((-high, -low))


@given(pairs())
def test_the_interval_is_never_empty_and_never_narrower_than_students(pair: tuple[np.ndarray, np.ndarray]) -> None:
    if len(pair[0]) == 1:
        return
    low, high = summary_of(pair).accuracy.interval  # type: ignore[misc]
    shares = [one.mean(axis=1) for one in pair]
    difference = float((shares[1] - shares[0]).mean())
    assert -1 <= low < high <= 1
    assert low - 1e-12 <= difference <= high + 1e-12
    plain = paired_difference(*shares).interval
    assert plain is not None
    assert low <= max(-1, plain[0]) + 1e-12
    assert high >= min(1, plain[1]) - 1e-12


@given(st.integers(1, 4).flatmap(lambda k: st.lists(pairs(k), min_size=1, max_size=4)))
def test_the_average_is_of_benchmarks_not_of_questions(parts: list[tuple[np.ndarray, np.ndarray]]) -> None:
    summaries = [summary_of(part) for part in parts]
    whole = average_pair(summaries)
    gaps = [float(part[1].mean() - part[0].mean()) for part in parts]
    assert whole.accuracy.difference == pytest.approx(sum(gaps) / len(gaps), abs=1e-12)
    assert whole.questions == whole.better + whole.worse + whole.same == sum(len(part[0]) for part in parts)
    errors = [summary.accuracy.standard_error for summary in summaries]
    if None in errors:
        assert whole.accuracy.interval is None
        return
    assert whole.accuracy.standard_error == pytest.approx(math.hypot(*errors) / len(errors))  # type: ignore[arg-type]
    freedoms = [len(part[0]) - 1 for part in parts]
    degrees = whole.accuracy.degrees
    assert degrees is not None
    assert min(freedoms) - 1e-9 <= degrees <= sum(freedoms) + 1e-9
    assert whole.accuracy.interval is not None
    assert whole.accuracy.interval[0] <= whole.accuracy.difference <= whole.accuracy.interval[1]
    if len(parts) == 1:
        assert whole.accuracy.interval == pytest.approx(summaries[0].accuracy.interval)


def test_welch_and_satterthwaite_on_a_worked_example() -> None:
    """Two equal variances with ν degrees of freedom each have 2ν together."""
    part = paired_difference(np.zeros(4), np.array([0.0, 1.0, 0.0, 1.0]))
    both = mean_difference([part, part])
    assert part.standard_error == pytest.approx(math.sqrt(1 / 12))
    assert both.standard_error == pytest.approx(math.sqrt(1 / 24))
    assert both.degrees == pytest.approx(6)
    reach = TABLE[6] * math.sqrt(1 / 24)
    assert both.interval == pytest.approx((0.5 - reach, 0.5 + reach), abs=1e-3)
    nothing = paired_difference(np.zeros(3), np.zeros(3))
    assert nothing.interval == (0, 0)
    assert mean_difference([nothing, nothing]).interval == (0, 0)


#: (a, b) of the difficulty's Beta, the mean and the spread of the change in log-odds
MANY_CHANGE, FEW_CHANGE, NEAR_ONE = (0.3, 0.6, 0.7, 0.5), (0.02, 0.02, 0.5, 1.0), (4.0, 0.2, 0.5, 0.5)


def changed(random: np.random.Generator, setting: tuple[float, ...], size: int) -> tuple[np.ndarray, np.ndarray]:
    """The probability of a right answer before and after."""
    a, b, mean, spread = setting
    before = np.clip(random.beta(a, b, size), 1e-9, 1 - 1e-9)
    odds = np.log(before / (1 - before)) + mean + spread * random.standard_normal(size)
    return before, 1 / (1 + np.exp(-odds))


@pytest.mark.parametrize("setting", [MANY_CHANGE, FEW_CHANGE, NEAR_ONE], ids=["many", "few", "near_one"])
@pytest.mark.parametrize(("questions", "k"), [(30, 1), (30, 16), (250, 1)])
def test_coverage_beats_the_t_interval_and_the_bootstrap_where_few_questions_change(
    setting: tuple[float, ...], questions: int, k: int
) -> None:
    """How often is the true difference in the 95% interval?"""
    random, runs = np.random.default_rng(0), 1000
    before, after = changed(random, setting, 1_000_000)
    truth = float((after - before).mean())
    quantile = student_quantile(0.975, questions - 1)
    hits = {"ours": 0, "t": 0, "bootstrap": 0}
    for _ in range(runs):
        shares = [random.binomial(k, chance) / k for chance in changed(random, setting, questions)]
        gaps = shares[1] - shares[0]
        error = gaps.std(ddof=1) / questions**0.5
        resampled = gaps[random.integers(0, questions, (300, questions))].mean(axis=1)
        ours = paired_difference(*shares, 1 / k, (-1, 1)).interval
        assert ours is not None
        intervals = {
            "ours": ours,
            "t": (gaps.mean() - quantile * error, gaps.mean() + quantile * error),
            "bootstrap": tuple(np.quantile(resampled, [0.025, 0.975])),
        }
        for name, (low, high) in intervals.items():
            hits[name] += low <= truth <= high
    coverage = {name: count / runs for name, count in hits.items()}
    print(f"{questions} questions x {k}: {coverage}")
    assert coverage["ours"] > 0.92
    assert coverage["ours"] >= coverage["t"]
    if setting != MANY_CHANGE and (questions, k) == (30, 1):
        assert coverage["ours"] > max(coverage["t"], coverage["bootstrap"]) + 0.1
    if setting == MANY_CHANGE and k > 1:
        assert coverage["ours"] < 0.97
