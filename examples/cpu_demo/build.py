"""Build the CPU demo's world: a tokenizer, a tiny Qwen3 warmed up on demonstrations, and the problems as parquet."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice
from typing import Any

import typer

from examples import tiny_world
from examples.cpu_demo.world import Problem, check_chain, demonstrate, draw_problems

FORMAT = 2
"""Increase this number when the world or the model changes, so that an older build is not taken for a current one."""

TOKEN_PATTERN = r" ?[+*-]\d|\d| ?\\boxed\{| ?\p{L}+|\s|[^\s\p{L}\d]"
"""How text is cut before merging.

An operation is one piece, so that choosing it is one token. Each digit is one piece, so that the model spells numbers
and does not memorise them. The newline that ends the prompt is one piece too, so that a response has the same tokens
with and without its prompt.
"""


@dataclass(frozen=True)
class Settings(tiny_world.Settings):
    """All settings that the result depends on."""

    operation_counts: tuple[int, ...] = (3, 3, 4)
    format: int = FORMAT


def split_problems(settings: Settings) -> tiny_world.Problems:
    """Draw all problems from one stream without duplicates, so that the sets are disjoint."""
    stream = draw_problems(random.Random(settings.seed), settings.operation_counts)
    return tiny_world.Problems(
        test=list(islice(stream, settings.test_problems)),
        train=list(islice(stream, settings.train_problems)),
        warmup=list(islice(stream, settings.warmup_problems)),
    )


def facts(problem: Problem) -> dict[str, Any]:
    """What the parquet's ``extra_info`` says about a problem."""
    return {
        "start": problem.start,
        "operations": [str(operation) for operation in problem.operations],
        "goal": problem.goal.value,
    }


def checks(problem: Problem, response: str) -> dict[str, bool]:
    """What is right about a response, apart from whether it found the optimum."""
    chain = check_chain(problem, response)
    return {"right_arithmetic": chain.arithmetic, "within_rules": chain.rules}


WORLD = tiny_world.World(
    name="CPU demo",
    data_source="cpu_demo",
    ability="math",
    settings=Settings(),
    token_pattern=TOKEN_PATTERN,
    split=split_problems,
    demonstrate=demonstrate,
    ground_truth=lambda problem: str(problem.answer),
    facts=facts,
    checks=checks,
)

if __name__ == "__main__":
    typer.run(tiny_world.command(WORLD))
