"""Build the sorting task's world: a tokenizer, a tiny Qwen3 warmed up on demonstrations, and questions as parquet."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice
from typing import Any

import typer

from examples import tiny_world
from examples.sorting.world import (
    DATA_SOURCE,
    Problem,
    demonstrate,
    draw_unasked,
    generate,
    lists_each_number_once,
)

FORMAT = 1
"""Increase this number when the world or the model changes, so that an older build is not taken for a current one."""

TOKEN_PATTERN = r"\d+,?|\\boxed\{\[?|\]\}| ?\p{L}+|\s|[^\s\p{L}\d]"
"""How text is cut before merging.

A number and the comma behind it are one piece, the same in the prompt and in the answer: each choice is one token. So
are the brackets that open and close the list.
"""


@dataclass(frozen=True)
class Settings(tiny_world.Settings):
    """All settings that the result depends on."""

    hint_rate: float = 0.7
    format: int = FORMAT


def split_problems(settings: Settings) -> tiny_world.Problems:
    """Draw the held-out problems, then other ones for training, then others for the warm-up."""
    test = list(islice(generate(settings.seed, "test"), settings.test_problems))
    asked = {problem.key for problem in test}
    others = (problem for problem in generate(settings.seed, "train") if problem.key not in asked)
    train = list(islice(others, settings.train_problems))
    asked |= {problem.key for problem in train}
    warmup = list(islice(draw_unasked(random.Random(settings.seed), asked), settings.warmup_problems))
    return tiny_world.Problems(warmup=warmup, train=train, test=test)


def facts(problem: Problem) -> dict[str, Any]:
    """What the parquet's ``extra_info`` says about a problem."""
    return {"numbers": list(problem.numbers), "direction": problem.direction.value}


def checks(problem: Problem, response: str) -> dict[str, bool]:
    """What is right about a response, apart from the order."""
    return {"within_rules": lists_each_number_once(problem, response)}


WORLD = tiny_world.World(
    name="sorting task",
    data_source=DATA_SOURCE,
    ability="algorithmic",
    settings=Settings(),
    token_pattern=TOKEN_PATTERN,
    split=split_problems,
    demonstrate=demonstrate,
    ground_truth=lambda problem: problem.ground_truth,
    facts=facts,
    checks=checks,
)

if __name__ == "__main__":
    typer.run(tiny_world.command(WORLD))
