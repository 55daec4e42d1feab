"""The example of a user's own score: it passes the launcher's trial, says what it does, and stands in the guide."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from entropy_fork.core.responses import Responses, choose
from entropy_fork.core.rule import Rule
from entropy_fork.core.scores import score_of
from entropy_fork.core.scoring import Tokens, try_out
from examples import own_score

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = [name for name, value in vars(own_score).items() if inspect.isfunction(value)]


def test_the_example_has_scores() -> None:
    assert {"early_forks", "above_reference"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_score_of_the_example_can_be_used(name: str) -> None:
    score = score_of(f"examples.own_score:{name}")
    try_out(score)
    assert score.is_own
    assert "without a docstring" not in score.sentence


def test_early_forks_keeps_the_earlier_of_two_equal_forks() -> None:
    """Two responses of four tokens, half of them kept: by entropy those at the end, by this score those before."""
    entropy = torch.tensor([0.5, 0.1, 0.1, 0.6, 0.5, 0.1, 0.1, 0.6])
    eligible, lengths = torch.ones(8, dtype=torch.bool), torch.tensor([4, 4])
    order = seeds = window = torch.tensor([0, 1])
    rule = Rule.of(score="examples.own_score:early_forks", top_ratio=0.25)
    tokens = Tokens({"entropy": entropy}, eligible, lengths, seeds, torch.zeros_like(window))
    score = tokens.score(score_of(rule.score))
    assert score.tolist() == pytest.approx([0.5, 0.075, 0.05, 0.15] * 2)
    by_score = choose(Responses(entropy, eligible, lengths, order, seeds, score), torch.zeros_like(lengths), rule)
    by_entropy = choose(Responses(entropy, eligible, lengths, order, seeds), torch.zeros_like(lengths), rule)
    assert by_score.kept.nonzero().squeeze(1).tolist() == [0, 4]
    assert by_entropy.kept.nonzero().squeeze(1).tolist() == [3, 7]


def test_the_guide_shows_the_example_and_every_page_names_its_functions() -> None:
    guide = (REPOSITORY / "docs/guide/own_score.md").read_text(encoding="utf-8")
    assert inspect.getsource(own_score.early_forks) in guide
    pages = [*REPOSITORY.glob("docs/**/*.md"), REPOSITORY / "examples/README.md"]
    named = [name for page in pages for name in re.findall(r"examples\.own_score:(\w+)", page.read_text("utf-8"))]
    assert len(named) > 5
    assert set(named) <= set(NAMES)
