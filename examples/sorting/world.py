r"""Put numbers in order, one after another. Most tokens of an answer are choices, and all of these decide.

The questions and the scorer are reasoning-gym's (its task ``number_sorting``). The prompt is shorter than its own, so
that a tiny model reads it quickly, and the answer is direct: ``\boxed{[2,9,13,28]}``. Every number but the last is a
choice among the numbers that are left, and a wrong choice makes the answer wrong. The scorer overlooks some mistakes:
it lets each number of a sorted list be off by 1.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from entropy_fork.data.generated import known_tasks, seed_of
from entropy_fork.reward.reasoning_gym import PREFIX, ground_truth_of
from examples.cpu_demo.world import Choice

TASK = "number_sorting"
DATA_SOURCE = PREFIX + TASK

COUNT = 6
VALUES = range(1, 21)

OPTIONS: dict[str, Any] = {
    "min_numbers": COUNT,
    "max_numbers": COUNT,
    "min_decimals": 0,
    "max_decimals": 0,
    "min_value": VALUES.start,
    "max_value": VALUES.stop - 1,
}
"""How difficult reasoning-gym makes the questions."""

_ANSWER = re.compile(r"\\boxed\{\[(?P<list>\d+(?:,\d+)*)\]\}")


class Direction(str, Enum):
    """The word in the prompt, as reasoning-gym writes it."""

    UP = "ascending"
    DOWN = "descending"


@dataclass(frozen=True)
class Problem:
    """Numbers to sort. `ground_truth` is what reasoning-gym's scorer reads; nobody scores a problem without one."""

    numbers: tuple[int, ...]
    direction: Direction
    ground_truth: str = ""

    @property
    def key(self) -> tuple[tuple[int, ...], Direction]:
        """Identity of the problem: the order in which the prompt happens to list the numbers does not count."""
        return tuple(sorted(self.numbers)), self.direction

    @property
    def prompt(self) -> str:
        return f"Sort {','.join(map(str, self.numbers))}, {self.direction.value}, in \\boxed{{}}."


def generate(seed: int, use: str) -> Iterator[Problem]:
    """Yield reasoning-gym's questions for one use, no two with the same key.

    Raises:
        EntropyForkError: reasoning-gym is not installed.
    """
    dataset, config = known_tasks()[TASK]
    drawn = dataset(config=config(**OPTIONS, seed=seed_of(seed, TASK, use), size=1_000_000))
    seen = set()
    for number in range(len(drawn)):
        entry = drawn[number]
        known = entry["metadata"]
        problem = Problem(
            tuple(int(float(each)) for each in known["original_numbers"]),
            Direction(known["direction"]),
            str(ground_truth_of(drawn, entry, OPTIONS)),
        )
        if problem.key not in seen:
            seen.add(problem.key)
            yield problem


def draw_unasked(rng: random.Random, asked: set[tuple[tuple[int, ...], Direction]]) -> Iterator[Problem]:
    """Yield problems for demonstrations, none of which is `asked`."""
    while True:
        problem = Problem(tuple(rng.choices(VALUES, k=COUNT)), rng.choice(list(Direction)))
        if problem.key not in asked:
            yield problem


def demonstrate(problem: Problem, rng: random.Random, hint_rate: float) -> str:
    """A demonstration that is right in form: all numbers, once each, but in an order that has random choices.

    Each choice is the right one of the numbers that are left with probability `hint_rate`, and else any of them.
    """
    best = min if problem.direction is Direction.UP else max
    left = list(problem.numbers)
    order = []
    while left:
        order.append(best(left) if rng.random() < hint_rate else rng.choice(left))
        left.remove(order[-1])
    return write_response(order)


def write_response(order: Sequence[int]) -> str:
    """The answer that lists numbers in this order."""
    return f"\\boxed{{[{','.join(map(str, order))}]}}"


def lists_each_number_once(problem: Problem, response: str) -> bool:
    """Whether a response is a list of the problem's numbers, in whatever order."""
    found = _ANSWER.fullmatch(response)
    return found is not None and sorted(map(int, found["list"].split(","))) == sorted(problem.numbers)


def sorts_exactly(problem: Problem, response: str) -> bool:
    """Whether a response is the list of the problem's numbers in the order that was asked for, and nothing else."""
    down = problem.direction is Direction.DOWN
    return response.strip() == write_response(sorted(problem.numbers, reverse=down))


class ChoiceKind(str, Enum):
    """What is chosen."""

    NUMBER = "number"


def find_choices(response: str) -> list[Choice]:
    """The character spans of a response that are choices: every number of the list but the last."""
    found = _ANSWER.search(response)
    if found is None:
        return []
    numbers = list(re.finditer(r"\d+", found["list"]))[:-1]
    return [
        Choice(found.start("list") + number.start(), found.start("list") + number.end(), ChoiceKind.NUMBER)
        for number in numbers
    ]
