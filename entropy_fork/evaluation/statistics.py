"""The statistics of a benchmark: accuracy with its uncertainty, pass@k, lengths. numpy only.

**The interval.** Answers to one question are alike, so the unit is the question: the variance of the accuracy is the
variance of the mean over questions, v = s²/n, with s² the variance of the per-question means. The interval is Wilson's
score interval, with the effective number of answers p(1 − p)/v in place of their number (the design effect of survey
statistics; Korn and Graubard 1998 use it in the same way). Unlike the t-interval of per-question means and the
bootstrap over questions it stays within [0, 1], never has width zero, and covers better near 0 and 1
(``tests/evaluation/test_statistics.py`` measures it).

The interval is about *other questions like these*. To compare two models on the *same* questions, use the second
standard error: it holds the questions fixed, and says how far another draw of answers would move the accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95


@dataclass(frozen=True)
class BenchmarkSummary:
    """One benchmark, or the unweighted mean over several.

    Attributes:
        questions, answers_per_question: their numbers; ``answers_per_question`` is the k of Acc@k.
        accuracy: mean over questions of the share of right answers.
        interval: 95% interval for the accuracy on questions like these, see above.
        standard_error: of the accuracy, with the question as the unit; None if there is a single question.
        standard_error_same_questions: with the questions held fixed; None if each question has a single answer.
        mean_tokens: mean length of an answer in tokens, its end token included.
        truncated, boxed: share of answers that the length limit ended, and share with a ``\\boxed{}``.
        pass_at: k' → unbiased estimate of the probability that at least one of k' answers is right.
        above: share of tokens drawn above the threshold, over all answers; None without two temperatures.
    """

    questions: int
    answers_per_question: int
    accuracy: float
    interval: tuple[float, float]
    standard_error: float | None
    standard_error_same_questions: float | None
    mean_tokens: float
    truncated: float
    boxed: float
    pass_at: dict[int, float]
    above: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


def pass_at(num_answers: int, num_right: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """1 − C(n − c, k) / C(n, k) for each question (Chen et al. 2021, arXiv 2107.03374, Eq. 1).

    Args:
        num_answers: n, at least k.
        num_right: c of each question, shape (questions,).
        k: how many answers are handed in.

    Returns:
        float64 of shape (questions,).

    Raises:
        ValueError: k is not in 1…n.
    """
    if not 1 <= k <= num_answers:
        raise ValueError(f"pass@{k} cannot be estimated from {num_answers} answers")
    # C(n−c, k)/C(n, k) is a product of k factors of at most 1. If n − c < k, one of them is 0.
    draws = np.arange(k)
    factors = np.clip(num_answers - num_right[:, None] - draws, 0, None) / (num_answers - draws)
    return 1.0 - factors.prod(axis=1)


def pass_ks(num_answers: int) -> list[int]:
    """The k for pass@k: 1, 2, 4, … and the number of answers itself."""
    powers = [2**i for i in range(num_answers.bit_length()) if 2**i <= num_answers]
    return powers if powers[-1] == num_answers else [*powers, num_answers]


def wilson_interval(
    accuracy: float, variance: float, questions: int, answers: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Wilson's score interval with an effective number of answers.

    Args:
        accuracy: in [0, 1].
        variance: of the accuracy, with the question as the unit.
        questions: number of questions. If the variance is 0, each question counts as one answer.
        answers: number of answers to all questions; the effective number is never larger.
        confidence: nominal coverage.
    """
    binomial = accuracy * (1 - accuracy)
    effective = min(binomial / variance, answers) if variance > 0 else questions
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    shrink = 1 + z * z / effective
    centre = (accuracy + z * z / (2 * effective)) / shrink
    half_width = z / shrink * np.sqrt(binomial / effective + z * z / (4 * effective**2))
    return max(0.0, float(centre - half_width)), min(1.0, float(centre + half_width))


def summarise_benchmark(
    right: NDArray[np.bool_],
    tokens: NDArray[np.int64],
    truncated: NDArray[np.bool_],
    boxed: NDArray[np.bool_],
    above: NDArray[np.int64] | None = None,
) -> BenchmarkSummary:
    """Summarise one benchmark from its answers. Every argument has the shape (questions, answers per question).

    ``above`` counts the tokens drawn above the threshold of two temperatures.
    """
    questions, k = right.shape
    shares = right.mean(axis=1)
    accuracy = float(shares.mean())
    # One question says nothing about the spread between questions; p(1 − p) is the largest possible variance.
    variance = float(shares.var(ddof=1)) / questions if questions > 1 else accuracy * (1 - accuracy)
    within = float((shares * (1 - shares)).sum()) / (k - 1) / questions**2 if k > 1 else None
    return BenchmarkSummary(
        questions=questions,
        answers_per_question=k,
        accuracy=accuracy,
        interval=wilson_interval(accuracy, variance, questions, questions * k),
        standard_error=variance**0.5 if questions > 1 else None,
        standard_error_same_questions=None if within is None else within**0.5,
        mean_tokens=float(tokens.mean()),
        truncated=float(truncated.mean()),
        boxed=float(boxed.mean()),
        pass_at={i: float(pass_at(k, right.sum(axis=1), i).mean()) for i in pass_ks(k)},
        above=None if above is None else float(above.sum() / tokens.sum()),
    )


def average(summaries: Sequence[BenchmarkSummary]) -> BenchmarkSummary:
    """The unweighted mean over benchmarks, as in the paper's table; benchmarks are independent."""
    count = len(summaries)
    questions = sum(summary.questions for summary in summaries)
    k = summaries[0].answers_per_question

    def mean(name: str) -> float:
        return sum(getattr(summary, name) for summary in summaries) / count

    def of_mean(name: str) -> float | None:
        errors = [getattr(summary, name) for summary in summaries]
        return None if None in errors else sum(error**2 for error in errors) ** 0.5 / count

    accuracy = mean("accuracy")
    variances = [
        summary.accuracy * (1 - summary.accuracy) if summary.standard_error is None else summary.standard_error**2
        for summary in summaries
    ]
    return BenchmarkSummary(
        questions=questions,
        answers_per_question=k,
        accuracy=accuracy,
        interval=wilson_interval(accuracy, sum(variances) / count**2, questions, questions * k),
        standard_error=of_mean("standard_error"),
        standard_error_same_questions=of_mean("standard_error_same_questions"),
        mean_tokens=mean("mean_tokens"),
        truncated=mean("truncated"),
        boxed=mean("boxed"),
        pass_at={i: sum(summary.pass_at[i] for summary in summaries) / count for i in summaries[0].pass_at},
        above=None if any(summary.above is None for summary in summaries) else mean("above"),
    )
