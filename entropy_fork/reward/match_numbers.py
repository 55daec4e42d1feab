"""Rules for numbers: percentages, units, bases, times, ratios, residues, and expressions in general."""

from __future__ import annotations

from typing import Any

from entropy_fork.reward.convention import Convention
from entropy_fork.reward.matching import Decision, by_kind, match, rule
from entropy_fork.reward.readings import (
    Clock,
    Exact,
    Formula,
    InBase,
    Listed,
    Measured,
    Modulo,
    Percent,
    Ratio,
    Reading,
    Related,
    Text,
)
from entropy_fork.reward.second_opinion import agree, exact_value, is_rounded
from entropy_fork.reward.values import value_of

#: a decimal that rounds something else needs so many significant digits
ROUNDED_DIGITS = 6


@rule(
    ("11 5/6", r"\frac{71}{6}", True),
    ("10 20", "30", False),
    (".0000673", ".0000672", False),
    ("0.333333", r"\frac{1}{3}", True),
    (r"5\text{ million}", "5000000", True),
)
def numbers(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Two numbers are compared exactly. A decimal may round a fraction that no decimal of 15 digits is."""
    if not (isinstance(left, Exact) and isinstance(right, Exact)):
        return None
    a, b = left.number, right.number
    if a.value == b.value:
        return Decision(True, "exact numbers")
    for one, other in ((a, b), (b, a)):
        may_round = one.digits >= ROUNDED_DIGITS and not other.place and not _is_decimal(other.value)
        if may_round and abs(one.value - other.value) <= one.place / 2:
            return Decision(True, "a decimal, rounded in its last place")
    return Decision(False, "exact numbers")


def _is_decimal(value: Any) -> bool:
    return bool((value * 10**15).denominator == 1)


@rule((r"50\%", "0.5", True), (r"50\%", "50", True), (r"0.5\%", "0.5", False))
def percentages(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """``50%`` is 0.5. It is 50 too, unless the number could be a share: ``0.5%`` is not 0.5."""
    pair = by_kind(left, right, Percent)
    if pair is None:
        return None
    one, other = pair
    if isinstance(other, Percent):
        return match(one.amount, other.amount, convention)
    if isinstance(other, Measured):
        return Decision(False, "a percentage has no unit")
    plain = match(one.amount, other, convention)
    if convention.percent == "ignored":
        return plain
    value, compared = value_of(one.amount), value_of(other)
    if value is None or compared is None:
        return Decision(False, "a percentage of something else")
    if agree(value / 100, compared):
        return Decision(True, "a percentage as a share")
    exact = exact_value(value)
    if convention.percent == "checked" and plain.equal and exact is not None and abs(exact) > 1:
        return Decision(True, "the percent sign is left out")
    return Decision(False, "a percentage of something else")


@rule(
    (r"5\text{ cm}", "5", True),
    (r"5\text{ m}", r"5\text{ cm}", False),
    (r"3\text{ h }20\text{ min}", r"200\text{ min}", True),
    ("3", r"3\text{ h }20\text{ min}", False),
)
def quantities(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Two units must be the same, or convert. One side may leave its unit out, but not hours and minutes."""
    pair = by_kind(left, right, Measured)
    if pair is None:
        return None
    one, other = pair
    if isinstance(other, Measured):
        return _two_quantities(one, other, convention)
    if convention.units == "required" and one.units[0].powers:
        return Decision(False, "the unit is missing on one side")
    if len(one.amounts) > 1:
        return Decision(False, "several amounts with units, and a number without")
    if isinstance(other, (Exact, Formula, Listed, Ratio, Related)):
        if one.units[0].text == "\\text{degree}" and _is_angle(one.amounts[0], other):
            return Decision(True, "degrees as radians")
        decision = match(one.amounts[0], other, convention)
        return Decision(decision.equal, f"the unit is left out; {decision.why}")
    return None


def _is_angle(degrees: Reading, other: Reading) -> bool:
    import sympy

    value, radians = value_of(degrees), value_of(other)
    return (
        value is not None
        and radians is not None
        and radians.has(sympy.pi)
        and bool(agree(value * sympy.pi / 180, radians))
    )


def _two_quantities(one: Measured, other: Measured, convention: Convention) -> Decision:
    alone = len(one.amounts) == len(other.amounts) == 1
    ours, theirs = one.units[0], other.units[0]
    if alone and (convention.units == "ignored" or not ours.powers or not theirs.powers or _equal_units(ours, theirs)):
        decision = match(one.amounts[0], other.amounts[0], convention)
        return Decision(decision.equal, f"the same unit; {decision.why}")
    if len({unit.powers for unit in (*one.units, *other.units)}) > 1:
        return Decision(False, "another unit")
    totals = []
    for side in (one, other):
        values = [value_of(amount) for amount in side.amounts]
        if any(value is None for value in values):
            return Decision(False, "another unit")
        totals.append(sum(value * _rational(unit.factor) for value, unit in zip(values, side.units, strict=True)))
    return Decision(bool(agree(*totals)), "quantities, converted")


def _equal_units(ours: Any, theirs: Any) -> bool:
    return ours.powers == theirs.powers and ours.factor == theirs.factor


def _rational(value: Any) -> Any:
    import sympy

    return sympy.Rational(value.numerator, value.denominator)


@rule(("1011_{2}", "1011_2", True), ("1011", "1011_2", False), ("2516_7", "2516_8", False))
def bases(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Digits in a base are equal to the same digits in the same base, and to nothing else."""
    pair = by_kind(left, right, InBase)
    if pair is None:
        return None
    one, other = pair
    equal = isinstance(other, InBase) and (one.digits, one.base) == (other.digits, other.base)
    return Decision(equal, "digits and base")


@rule(("2:30 PM", "2:30", True), ("14:30", "2:30 PM", True), ("2:30 AM", "2:30 PM", False))
def clocks(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Times of the day: am and pm may be missing on one side, and 14:30 is 2:30 pm."""
    pair = by_kind(left, right, Clock)
    if pair is None:
        return None
    one, other = pair
    if not isinstance(other, Clock):
        return None if isinstance(other, (Related, Text)) else Decision(False, "a time of the day")
    if (one.half == "") != (other.half == ""):
        named, bare = (one, other) if one.half else (other, one)
        return Decision(bare.time in (named.time, _of_24(named)), "times of the day")
    return Decision(_of_24(one) == _of_24(other), "times of the day")


def _of_24(clock: Clock) -> tuple[int, ...]:
    hour = clock.time[0]
    if clock.half:
        hour = hour % 12 + 12 * (clock.half == "pm")
    return hour, *clock.time[1:]


@rule(("6:4", "3:2", True), ("3:1", "1:3", False))
def ratios(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """``3:2`` is ``6:4`` and ``3/2``."""
    pair = by_kind(left, right, Ratio)
    if pair is None:
        return None
    one, other = pair
    ours = [value_of(part) for part in one.parts]
    theirs = [value_of(part) for part in other.parts] if isinstance(other, Ratio) else [value_of(other), 1]
    if len(ours) != len(theirs) or any(value is None for value in (*ours, *theirs)):
        return None if isinstance(other, (Related, Measured)) else Decision(False, "ratios")
    equal = all(bool(agree(ours[0] * theirs[k], theirs[0] * ours[k])) for k in range(1, len(ours)))
    return Decision(equal and ours[0] != 0, "ratios")


@rule((r"n\equiv 5 \pmod 3", r"n\equiv 2 \pmod 3", True), (r"2 \pmod 3", r"2 \pmod 5", False))
def residues(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    r"""``n \equiv 5 \pmod 3`` is ``n \equiv 2 \pmod 3``. The modulus may be missing on one side."""
    pair = by_kind(left, right, Modulo)
    if pair is None:
        return None
    one, other = pair
    if not isinstance(other, Modulo):
        return match(one.residue, other, convention)
    if not match(one.modulus, other.modulus, convention).equal:
        return Decision(False, "another modulus")
    values = [
        exact_value(value_of(_last(side.residue))) if value_of(_last(side.residue)) is not None else None
        for side in (one, other)
    ]
    modulus = exact_value(value_of(one.modulus)) if value_of(one.modulus) is not None else None
    if modulus and values[0] is not None and values[1] is not None:
        names = {side.residue.parts[0].text for side in (one, other) if isinstance(side.residue, Related)}
        return Decision(len(names) < 2 and (values[0] - values[1]) % modulus == 0, "residues")
    return match(one.residue, other.residue, convention)


def _last(reading: Reading) -> Reading:
    return reading.parts[-1] if isinstance(reading, Related) else reading


@rule(
    ("i^2", "-1", True),
    (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}", False),
    (r"\sqrt{8}", r"2\sqrt{2}", True),
    ("6m", "6", False),
)
def formulas(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Everything that is an expression: values at points or in 40 digits; where there are none, math-verify decides."""
    if not all(isinstance(side, (Exact, Formula)) for side in (left, right)):
        return None
    ours, theirs = value_of(left), value_of(right)
    if ours is None or theirs is None:
        return None
    if ours == theirs and not ours.has(*_nonsense()):
        return Decision(True, "the same expression")
    for decimal, other in ((left, theirs), (right, ours)):
        if isinstance(decimal, Exact) and decimal.number.digits >= ROUNDED_DIGITS and not other.free_symbols:
            exact = exact_value(other)
            if exact is None or not _is_decimal(exact):
                return Decision(
                    is_rounded(decimal.number.value, decimal.number.place, other),
                    "a decimal, rounded in its last place",
                )
    opinion = agree(ours, theirs)
    if opinion is None:
        return Decision(_verified(ours, theirs), "math-verify")
    return Decision(opinion, "values of both")


def _nonsense() -> Any:
    import sympy

    return sympy.zoo, sympy.nan


def _verified(ours: Any, theirs: Any) -> bool:
    """What math-verify says, in both directions."""
    from math_verify import verify

    return all(bool(verify(a, b, timeout_seconds=None)) for a, b in ((ours, theirs), (theirs, ours)))
