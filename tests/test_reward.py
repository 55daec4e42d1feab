"""The reward: the last box, compared by mathematics, in threads as verl calls it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from entropy_fork.reward import MAX_ANSWER_CHARACTERS, compute_score, last_boxed


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        (r"so \boxed{32}", "32", 1.0),
        (r"\boxed{31} no, \boxed{32}", "32", 1.0),
        (r"\boxed{32} no, \boxed{31}", "32", 0.0),
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{0.50}", r"\frac{1}{2}", 1.0),
        (r"\boxed{x^2 + 1}", "1 + x^2", 1.0),
        ("the answer is 32", "32", 0.0),
        (r"\boxed{}", "32", 0.0),
        (r"\boxed{32", "32", 0.0),
        (r"\boxed{a{b}c} \boxed{3{", "7", 0.0),
        ("", "32", 0.0),
    ],
)
def test_scores(answer: str, truth: str, expected: float) -> None:
    score = compute_score("any", answer, truth, {"index": 1})
    assert score["score"] == score["acc"] == expected
    assert score["format"] == float(last_boxed(answer) is not None)


def test_nested_braces_belong_to_the_box() -> None:
    assert last_boxed(r"\boxed{\frac{1}{2}} and text } {") == r"\frac{1}{2}"


def test_a_long_box_is_wrong_without_being_parsed() -> None:
    assert compute_score("any", rf"\boxed{{{'1+' * MAX_ANSWER_CHARACTERS}1}}", "3")["acc"] == 0.0


def test_many_threads() -> None:
    """math-verify's own timeouts are signals, which raise outside of the main thread."""
    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(lambda i: compute_score("any", rf"\boxed{{{i % 7}}}", "3")["acc"], range(200)))
    assert scores == [float(i % 7 == 3) for i in range(200)]
