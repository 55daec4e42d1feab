"""The task of the CPU demo: put a few operations into the order that gives the largest (or the smallest) number.

The chain of thought has real forks. At every step the model chooses one of the remaining operations, and the choice
determines the result of the step. The choices decide whether the final number is the optimum. So a model that computes
without errors but chooses at random is often wrong, and reinforcement learning has one thing to teach: what to choose.
The optimum is not in the prompt, so the model cannot copy it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import permutations
from typing import NamedTuple

VALUE_RANGE = range(1, 60)
"""Every value on every path stays here: one or two digits, never negative, so that a tiny model can compute it."""

START_RANGE = range(2, 16)

AMOUNTS = {"+": range(1, 7), "-": range(1, 7), "*": range(2, 4)}

CONNECTIVES = (("First", "Begin", "Start"), ("Then", "Next", "Now"), ("Last", "Finally", "Lastly"))
"""Words that open the first, a middle and the last step. The choice among them never matters."""

CONNECTIVE_WEIGHTS = (0.8, 0.1, 0.1)
"""Uneven, so that the choices that matter are the ones of highest entropy (an even draw would have 1.10 nats)."""

MAX_MISSES = 10_000
"""Draws in a row without a new problem after which the world counts as exhausted."""

_STEP = re.compile(r"(?P<connective>[A-Z][a-z]+) (?P<operation>[+*-]\d)=(?P<result>\d+)\.")
_BOXED = re.compile(r"\\boxed\{(?P<answer>\d+)\}$")


class Goal(str, Enum):
    """What the prompt asks for; the value is the word used there."""

    LARGEST = "largest"
    SMALLEST = "smallest"


@dataclass(frozen=True, order=True)
class Operation:
    """One arithmetic operation with a one-digit amount, such as ``+5``."""

    symbol: str
    amount: int

    def __call__(self, value: int) -> int:
        match self.symbol:
            case "+":
                return value + self.amount
            case "-":
                return value - self.amount
            case "*":
                return value * self.amount
        raise ValueError(f"unknown operation {self.symbol!r}")

    def __str__(self) -> str:
        return f"{self.symbol}{self.amount}"


@dataclass(frozen=True)
class Problem:
    """A start value, operations to use once each, and what to aim for."""

    start: int
    operations: tuple[Operation, ...]
    goal: Goal

    @property
    def key(self) -> tuple[int, tuple[Operation, ...], Goal]:
        """Identity of the problem: the order in which the prompt happens to list the operations does not count."""
        return self.start, tuple(sorted(self.operations)), self.goal

    @property
    def prompt(self) -> str:
        operations = " ".join(map(str, self.operations))
        return f"From {self.start} with {operations} once each make the {self.goal.value} \\boxed{{}}."

    def path(self, order: tuple[Operation, ...]) -> tuple[int, ...]:
        """The values reached after each operation of `order`."""
        values = [self.start]
        for operation in order:
            values.append(operation(values[-1]))
        return tuple(values[1:])

    @cached_property
    def paths(self) -> dict[tuple[Operation, ...], tuple[int, ...]]:
        """Every order of the operations with the values on its way."""
        return {order: self.path(order) for order in permutations(self.operations)}

    @cached_property
    def answer(self) -> int:
        """The optimum over all orders, by brute force."""
        best = max if self.goal is Goal.LARGEST else min
        return best(values[-1] for values in self.paths.values())

    @cached_property
    def best_orders(self) -> list[tuple[Operation, ...]]:
        return [order for order, values in self.paths.items() if values[-1] == self.answer]

    @property
    def is_fair(self) -> bool:
        """Whether the problem is worth asking.

        The numbers must stay small on every path, since the model may take any. The order must matter. And the answer
        must not be a number in the prompt, because the model could copy it.
        """
        stated = {self.start, *(operation.amount for operation in self.operations)}
        return (
            all(value in VALUE_RANGE for values in self.paths.values() for value in values)
            and len(self.best_orders) < len(self.paths)
            and self.answer not in stated
        )


def draw_problems(rng: random.Random, operation_counts: tuple[int, ...]) -> Iterator[Problem]:
    """Yield fair problems, no two with the same key, with one of `operation_counts` operations each.

    Raises:
        RuntimeError: hardly any new problem is left; the number of problems is finite.
    """
    catalogue = {symbol: [Operation(symbol, amount) for amount in amounts] for symbol, amounts in AMOUNTS.items()}
    seen = set()
    misses = 0
    while misses < MAX_MISSES:
        misses += 1
        count = rng.choice(operation_counts)
        # One multiplication and one other operation make the order matter; sums alone commute.
        symbols = ["*", rng.choice("+-"), *rng.choices("++--*", k=count - 2)]
        operations = [rng.choice(catalogue[symbol]) for symbol in symbols]
        if len(set(operations)) < count:
            continue
        rng.shuffle(operations)
        problem = Problem(rng.choice(START_RANGE), tuple(operations), rng.choice(list(Goal)))
        if problem.key not in seen and problem.is_fair:
            seen.add(problem.key)
            misses = 0
            yield problem
    raise RuntimeError(f"no new problem in {MAX_MISSES} draws after {len(seen)}: ask for fewer or for more operations")


def write_response(problem: Problem, order: tuple[Operation, ...], rng: random.Random) -> str:
    """The chain of thought that takes the operations in `order`, with connectives picked at random."""
    first, middle, last = CONNECTIVES
    words = [first, *[middle] * (len(order) - 2), last]
    values = problem.path(order)
    steps = [
        f"{rng.choices(choices, CONNECTIVE_WEIGHTS)[0]} {operation}={value}."
        for choices, operation, value in zip(words, order, values, strict=True)
    ]
    return " ".join([*steps, f"\\boxed{{{values[-1]}}}"])


def demonstrate(problem: Problem, rng: random.Random, hint_rate: float) -> str:
    """A demonstration that is right in form and arithmetic, but takes the operations in random order.

    With probability `hint_rate` the order is an optimal one. This sets how often the warmed-up model is right when it
    samples. Reinforcement learning needs a model that is sometimes right and sometimes wrong.
    """
    hinted = rng.random() < hint_rate
    order = (
        rng.choice(problem.best_orders) if hinted else tuple(rng.sample(problem.operations, len(problem.operations)))
    )
    return write_response(problem, order, rng)


class ChainCheck(NamedTuple):
    """What is right about a response, apart from whether it found the optimum."""

    arithmetic: bool
    """Every step computes right from the value before it, and the box holds the last value."""

    rules: bool
    """Every operation of the problem is used exactly once, and there is nothing besides steps and the box."""


def check_chain(problem: Problem, response: str) -> ChainCheck:
    """Judge the steps of a response; the reward looks only at the box."""
    steps = list(_STEP.finditer(response))
    boxed = _BOXED.search(response)
    if not steps or boxed is None:
        return ChainCheck(arithmetic=False, rules=False)
    value, arithmetic = problem.start, True
    for step in steps:
        operation = Operation(step["operation"][0], int(step["operation"][1:]))
        arithmetic &= operation(value) == int(step["result"])
        value = int(step["result"])
    arithmetic &= value == int(boxed["answer"])
    form = " ".join([*(step[0] for step in steps), boxed[0]]) == response
    used = sorted(step["operation"] for step in steps)
    return ChainCheck(arithmetic=arithmetic, rules=form and used == sorted(map(str, problem.operations)))


class ChoiceKind(str, Enum):
    """Whether a choice decides the reward or is only a way of wording."""

    OPERATION = "operation"
    CONNECTIVE = "connective"


class Choice(NamedTuple):
    """The characters ``response[start:end]`` that were chosen."""

    start: int
    end: int
    kind: Enum


def find_choices(response: str) -> list[Choice]:
    """The character spans of a response that are choices.

    The operation of the last step is no choice, because only one is left.
    """
    steps = list(_STEP.finditer(response))
    choices = []
    for step in steps:
        choices.append(Choice(*step.span("connective"), ChoiceKind.CONNECTIVE))
        if step is not steps[-1]:
            choices.append(Choice(*step.span("operation"), ChoiceKind.OPERATION))
    return choices
