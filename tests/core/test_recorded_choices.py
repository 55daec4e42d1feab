"""Configs from before there were scores choose what they chose then, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.recorded_choices import RULES, choices

from entropy_fork.core.rule import Rule

RECORDED = json.loads((Path(__file__).parent / "recorded_choices.json").read_text())


def test_every_rule_of_then_is_recorded_and_chooses_something_else() -> None:
    assert RECORDED.keys() == RULES.keys()
    assert len({chosen["weights"] for chosen in RECORDED.values()}) == len(RECORDED)


def test_selections_and_weights_are_those_of_then() -> None:
    """``helpers/recorded_choices.py`` says how the record was made."""
    assert choices() == RECORDED


@pytest.mark.parametrize("name", RULES)
def test_a_rule_of_then_uses_nothing_that_is_new(name: str) -> None:
    """Its new keys have the values that change nothing."""
    values = RULES[name].values
    new = ("score", "where", "outside", "control", "use")
    assert {key: values[key] for key in new} == {key: Rule.of().values[key] for key in new}
    assert not RULES[name].needs_score or RULES[name].score == "entropy"
