r"""Are two readings equal? One rule per kind, each a function, in the order of :data:`entropy_fork.reward.rules.RULES`.

A rule answers with a :class:`Decision`, or with None if it says nothing about these kinds. Every rule is symmetric.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from entropy_fork.reward.convention import Convention
from entropy_fork.reward.readings import (
    Cases,
    Choice,
    Clock,
    Exact,
    Formula,
    InBase,
    Listed,
    Measured,
    Modulo,
    Named,
    Percent,
    Reading,
    Related,
    SetOf,
    Text,
)


class Decision(NamedTuple):
    """Whether two readings are equal, and the rule that says so."""

    equal: bool
    why: str


Rule = Callable[[Reading, Reading, Convention], "Decision | None"]

#: name of a rule → answers, ground truths, and whether they are equal. Tests check them, and the reference shows them
EXAMPLES: dict[str, tuple[tuple[str, str, bool], ...]] = {}


def rule(*examples: tuple[str, str, bool]) -> Callable[[Rule], Rule]:
    """Give a rule its examples: an answer, a ground truth, and whether they are equal."""

    def add(function: Rule) -> Rule:
        EXAMPLES[function.__name__] = examples
        return function

    return add


def match(left: Reading, right: Reading, convention: Convention) -> Decision:
    """The decision of the first rule that knows these kinds."""
    from entropy_fork.reward.rules import RULES  # the rules call this function for their parts

    for each in RULES:
        decision = each(left, right, convention)
        if decision is not None:
            return decision
    return Decision(False, f"a {_kind(left)} is no {_kind(right)}")


def _kind(reading: Reading) -> str:
    names = {
        Exact: "number", Formula: "formula", Text: "text", Related: "relation", SetOf: "set", Named: "set",
        Measured: "quantity with a unit", Percent: "percentage", InBase: "number in a base", Clock: "time of the day",
        Choice: "choice", Modulo: "residue", Cases: "definition by cases",
    }  # fmt: skip
    if isinstance(reading, Listed):
        return {"": "list", "{}": "set", "{|}": "set"}.get(reading.shape, "list in brackets")
    return names.get(type(reading), type(reading).__name__.lower())


def by_kind(left: Reading, right: Reading, kind: type) -> tuple[Any, Any] | None:
    """The two readings, that of this kind first; None if neither is of it."""
    if isinstance(left, kind):
        return left, right
    return (right, left) if isinstance(right, kind) else None
