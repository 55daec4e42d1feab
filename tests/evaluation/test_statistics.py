"""The statistics of an evaluation against plain restatements, and the interval's coverage by simulation."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropy_fork.evaluation.results import paper, paper_cells
from entropy_fork.evaluation.statistics import average, pass_at, pass_ks, summarise_benchmark, wilson_interval

Z = NormalDist().inv_cdf(0.975)


@st.composite
def tables(draw: st.DrawFn) -> np.ndarray:
    """Right or wrong, shape (questions, answers)."""
    questions, k = draw(st.integers(1, 8)), draw(st.integers(1, 7))
    cells = draw(st.lists(st.booleans(), min_size=questions * k, max_size=questions * k))
    return np.array(cells).reshape(questions, k)


def summary_of(right: np.ndarray):  # type: ignore[no-untyped-def]
    return summarise_benchmark(right, np.full(right.shape, 5), np.zeros_like(right), np.ones_like(right))


@given(st.integers(1, 9), st.data())
def test_pass_at_is_the_share_of_subsets_with_a_right_answer(n: int, data: st.DataObject) -> None:
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(combinations([True] * right + [False] * (n - right), k))
    expected = Fraction(sum(any(subset) for subset in subsets), len(subsets))
    assert pass_at(n, np.array([right]), k)[0] == pytest.approx(float(expected), abs=1e-12)


def test_pass_at_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="pass@5 cannot be estimated from 4"):
        pass_at(4, np.array([1]), 5)


@pytest.mark.parametrize(("k", "expected"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])])
def test_ks_are_powers_of_two_and_k_itself(k: int, expected: list[int]) -> None:
    assert pass_ks(k) == expected


@given(tables())
def test_a_summary_against_plain_sums(right: np.ndarray) -> None:
    questions, k = right.shape
    tokens = np.arange(right.size).reshape(right.shape) + 1
    truncated, boxed = tokens % 3 == 0, tokens % 2 == 0
    summary = summarise_benchmark(right, tokens, truncated, boxed)

    shares = [Fraction(int(sum(row)), k) for row in right.tolist()]
    accuracy = sum(shares, Fraction(0)) / questions
    assert summary.accuracy == pytest.approx(float(accuracy), abs=1e-12)
    assert summary.pass_at[1] == pytest.approx(summary.accuracy, abs=1e-12)
    assert list(summary.pass_at.values()) == sorted(summary.pass_at.values())
    assert summary.pass_at[k] == pytest.approx(sum(any(row) for row in right.tolist()) / questions)
    assert summary.mean_tokens == pytest.approx((right.size + 1) / 2)
    assert summary.truncated == pytest.approx(right.size // 3 / right.size)
    assert summary.boxed == pytest.approx(right.size // 2 / right.size)

    if questions > 1:
        spread = sum((share - accuracy) ** 2 for share in shares) / (questions - 1)
        assert summary.standard_error == pytest.approx(float(spread / questions) ** 0.5, abs=1e-12)
    else:
        assert summary.standard_error is None
    if k > 1:  # the unbiased variance of each question's 0/1 answers, over k, summed over questions
        within = sum(sum((Fraction(int(a)) - share) ** 2 for a in row) / (k - 1) / k
                     for row, share in zip(right.tolist(), shares, strict=True))  # fmt: skip
        assert summary.standard_error_same_questions == pytest.approx(float(within) ** 0.5 / questions, abs=1e-12)
    else:
        assert summary.standard_error_same_questions is None


@given(tables())
def test_the_interval_is_where_the_score_test_does_not_reject(right: np.ndarray) -> None:
    """Wilson's ends are the solutions x of (p − x)² = z² x(1 − x)/n; here n is the effective number of answers."""
    summary = summary_of(right)
    low, high = summary.interval
    assert 0 <= low < high <= 1
    assert low - 1e-12 <= summary.accuracy <= high + 1e-12
    error = summary.standard_error
    binomial = summary.accuracy * (1 - summary.accuracy)
    if error is None:
        effective = 1.0
    elif error == 0:
        effective = right.shape[0]
    else:
        effective = min(binomial / error**2, right.size)
    for end in (low, high):
        assert (summary.accuracy - end) ** 2 == pytest.approx(Z**2 * end * (1 - end) / effective, abs=1e-9)


@given(st.lists(tables(), min_size=1, max_size=4))
def test_the_average_is_of_benchmarks_not_of_questions(parts: list[np.ndarray]) -> None:
    parts = [part[:, :1] for part in parts]  # the same number of answers everywhere
    summaries = [summary_of(part) for part in parts]
    whole = average(summaries)
    assert whole.accuracy == pytest.approx(sum(part.mean() for part in parts) / len(parts))
    assert whole.questions == sum(len(part) for part in parts)
    assert 0 <= whole.interval[0] < whole.interval[1] <= 1
    if all(len(part) > 1 for part in parts):
        variance = sum(np.var(part.mean(axis=1), ddof=1) / len(part) for part in parts) / len(parts) ** 2
        assert whole.standard_error == pytest.approx(variance**0.5)
    if len(parts) == 1 and summaries[0].standard_error is not None:
        assert whole.interval == pytest.approx(summaries[0].interval)


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.6), (0.6, 0.3), (4, 0.2), (0.2, 4)])
def test_coverage_beats_the_t_interval_and_the_bootstrap_at_the_ends(a: float, b: float) -> None:
    """30 questions of Beta(a, b) difficulty, 16 answers each: how often is the true accuracy in the 95% interval?"""
    random, runs = np.random.default_rng(0), 1500
    hits = {"ours": 0, "t": 0, "bootstrap": 0}
    for _ in range(runs):
        difficulty = random.beta(a, b, 30)
        shares = random.binomial(16, difficulty) / 16
        error = shares.std(ddof=1) / 30**0.5
        resampled = shares[random.integers(0, 30, (400, 30))].mean(axis=1)
        intervals = {
            "ours": wilson_interval(shares.mean(), error**2, 30, 480),
            "t": (shares.mean() - 2.045 * error, shares.mean() + 2.045 * error),
            "bootstrap": tuple(np.quantile(resampled, [0.025, 0.975])),
        }
        for name, (low, high) in intervals.items():
            hits[name] += low <= a / (a + b) <= high
    coverage = {name: count / runs for name, count in hits.items()}
    at_an_end = max(a, b) > 1
    assert coverage["ours"] > (0.89 if at_an_end else 0.93)
    assert coverage["ours"] < 0.97
    if at_an_end:
        assert coverage["ours"] > max(coverage["t"], coverage["bootstrap"]) + 0.01


@pytest.mark.parametrize(
    ("model", "all_tokens", "top20"),
    [
        ("8b", (53.71, 4022), (54.23, 5508)),
        ("14b", (61.40, 4752), (64.39, 7628)),
        ("32b", (66.59, 5849), (70.69, 7227)),
    ],
)
def test_the_papers_columns_have_the_papers_averages(
    model: str, all_tokens: tuple[float, int], top20: tuple[float, int]
) -> None:
    for cell, printed in zip(paper_cells(model, list(paper()["benchmarks"])), (all_tokens, top20), strict=True):
        assert cell is not None
        assert cell[0] == pytest.approx(printed[0], abs=0.0051)
        assert cell[1] == pytest.approx(printed[1], abs=0.51)


def test_benchmarks_are_recognised_by_their_names() -> None:
    assert paper_cells("8b", ["AIME_2024"]) == [(33.33, 6885), (34.58, 9494)]
    assert paper_cells("8b", ["math-ai/minerva_math"])[1] == (40.26, 2068)
    assert paper_cells("8b", ["aime24", "cpu_demo"]) == [None, None]
