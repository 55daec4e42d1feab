"""Three switches for what people judge differently when they compare two answers, and what a benchmark sets them to."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Convention(NamedTuple):
    """The switches.

    Attributes:
        units: ``checked``: one side may leave its unit out, and two units must be the same or convert into each other.
            ``required``: a unit on one side only is wrong. ``ignored``: any known unit is left out.
        percent: ``checked``: ``50%`` is 0.5, and 50 too, but ``0.5%`` is not 0.5. ``exact``: ``50%`` is 0.5 only.
            ``ignored``: the sign is left out.
        order: ``written``: an ordered pair has an order, and a list of solutions has none. ``exact``: a list has the
            order of the ground truth too. ``ignored``: a pair has none either.
    """

    units: Literal["checked", "required", "ignored"] = "checked"
    percent: Literal["checked", "exact", "ignored"] = "checked"
    order: Literal["written", "exact", "ignored"] = "written"


#: for training, and wherever nothing else is said
STRICT = Convention()

#: MATH's own comparison cuts off units and the percent sign before it compares texts
MATH = Convention(units="ignored", percent="ignored")

#: name → switches, for the option ``--convention``
CONVENTIONS = {"strict": STRICT, "math": MATH}

#: data source → its own convention. Every other source is compared strictly
BY_SOURCE = {"math": "math", "math500": "math"}


def convention_of(data_source: str) -> str:
    """The name of a benchmark's convention, by the name that its rows carry. For evaluation: training is strict."""
    return BY_SOURCE.get(data_source, "strict")
