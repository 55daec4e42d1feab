"""The one rule for ground truths, with the reward as its witness."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropy_fork.common.ground_truth import accepted_answers, fault_of
from entropy_fork.reward import compute_score

NUMBERS = st.integers(-(10**12), 10**12).map(str)


@given(st.one_of(NUMBERS, st.integers(), st.floats(), st.lists(st.one_of(NUMBERS, st.integers(), st.none()))))
def test_what_the_rule_lets_through_the_reward_compares_with(truth: Any) -> None:
    if fault_of(truth) is None:
        each = truth if isinstance(truth, list) else [truth]
        assert all(compute_score("", f"\\boxed{{{answer}}}", truth)["acc"] == 1.0 for answer in each)


@pytest.mark.parametrize("truth", [None, "", " ", [], [""], True, {"target": 1}, {}, b"1", [["1"]]])
def test_what_the_reward_refuses_the_rule_refuses(truth: Any) -> None:
    with pytest.raises(ValueError, match="ground truth"):
        compute_score("", "\\boxed{1}", truth)
    assert fault_of(truth) is not None


@pytest.mark.parametrize(
    ("truth", "reason"),
    [
        (np.array([]), "no_answer"),
        (np.array(["1", "null"]), "no_answer"),
        (np.float32("nan"), "answer_not_finite"),
        ("+Inf", "answer_not_finite"),
        ('["1", ""]', "no_answer"),
        ("[ ]", "no_answer"),
        ("{}", "no_answer"),
        ({"target": 1}, "answer_is_a_mapping"),
        (Decimal(1), "answer_of_another_kind"),
    ],
)
def test_the_reason(truth: Any, reason: str) -> None:
    fault = fault_of(truth)
    assert fault is not None
    assert fault.reason == reason


@pytest.mark.parametrize(
    "truth", ["[1, 2]", "[1]", "(1, 2)", "\\{1, 2\\}", "x", "\\text{None}", '"1"', '[{"a": 1}, "b"]']
)
def test_an_expression_is_itself(truth: str) -> None:
    assert accepted_answers(truth) == [truth]
    assert fault_of(truth) is None


@given(st.lists(st.text(max_size=5), min_size=1, max_size=5))
def test_a_list_as_json_is_its_answers(answers: list[str]) -> None:
    assert accepted_answers(json.dumps(answers)) == answers
    assert accepted_answers(" " + json.dumps(answers, indent=1, ensure_ascii=False)) == answers
