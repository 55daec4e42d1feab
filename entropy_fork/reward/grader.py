"""Grade one answer: spell both sides alike, read them, match the readings. Without any limit: see ``judge``."""

from __future__ import annotations

from typing import NamedTuple

from entropy_fork.reward.convention import STRICT, Convention
from entropy_fork.reward.matching import match
from entropy_fork.reward.reading import read
from entropy_fork.reward.readings import Formula, Listed, Reading, Related, Text
from entropy_fork.reward.second_opinion import OutOfTime
from entropy_fork.reward.spelling import spelled
from entropy_fork.reward.values import value_of


class Grade(NamedTuple):
    """The result of :func:`grade`.

    Attributes:
        equal: whether the answer is right.
        parseable: whether the answer was read as something other than unreadable text.
        why: the rule that decided.
        stopped: whether a value was too large, or took too long; then the first two are False.
    """

    equal: bool
    parseable: bool
    why: str
    stopped: bool = False


def grade(answer: str, truth: str, convention: Convention = STRICT) -> Grade:
    """Compare an answer with the ground truth, in this process and without a limit on time or memory."""
    ours, theirs = (read(spelled(text)) for text in (answer, truth))
    parseable = is_readable(ours)
    if not parseable and ours.text != theirs.text:
        return Grade(False, False, "the answer cannot be read")
    try:
        decision = match(ours, theirs, convention)
    except OutOfTime:
        return Grade(False, False, "a value that takes too long to compute", stopped=True)
    return Grade(decision.equal, parseable, decision.why)


def is_readable(reading: Reading) -> bool:
    """Whether there is sense in a reading: words, or mathematics that the parser takes."""
    if isinstance(reading, Text):
        return reading.readable
    if isinstance(reading, Formula):
        return value_of(reading) is not None
    parts: tuple[Reading, ...] = ()
    if isinstance(reading, Listed):
        parts = reading.items
    elif isinstance(reading, Related):
        parts = reading.parts
    return not parts or any(is_readable(part) for part in parts)
