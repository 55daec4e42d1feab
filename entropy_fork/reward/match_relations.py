"""Rules for names, equations, inequalities and sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from entropy_fork.reward.convention import Convention
from entropy_fork.reward.matching import Decision, match, rule
from entropy_fork.reward.readings import (
    Choice,
    Clock,
    Exact,
    Formula,
    InBase,
    Listed,
    Matrix,
    Measured,
    Modulo,
    Named,
    Percent,
    Ratio,
    Reading,
    Related,
    SetOf,
    Text,
)
from entropy_fork.reward.second_opinion import SECONDS, agree, time_limit
from entropy_fork.reward.sets import NAME, same_set, set_of
from entropy_fork.reward.values import value_of


@rule(("x=5", "5", True), ("(4,3)", "x=3, y=4", False), ("43=42", "42", False))
def names(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """``x = 5`` is 5, and ``x = 3, y = 4`` is ``(3, 4)``: a name may be missing on one side only."""
    if isinstance(left, Related) and isinstance(right, Related):
        return None
    ours, theirs = _assigned(left), _assigned(right)
    if ours is not None and theirs is not None:
        if len(ours) == 1 and len(theirs) == 1:
            return (
                match(_as_list(next(iter(ours.values()))), _as_list(next(iter(theirs.values()))), convention)
                if ours.keys() == theirs.keys()
                else Decision(False, "other names")
            )
        if ours.keys() != theirs.keys():
            return Decision(False, "other names")
        equal = all(match(_as_list(ours[name]), _as_list(theirs[name]), convention).equal for name in ours)
        return Decision(equal, "each name has the same value")
    pair = (ours, left, right) if ours is not None else (theirs, right, left) if theirs is not None else None
    if pair is None:
        return None
    values, named, other = pair
    if isinstance(named, Related) and isinstance(
        other, (Exact, Formula, Measured, Percent, Text, Matrix, InBase, Clock, Ratio, Choice, Listed, Modulo)
    ):
        return _without_name(named, other, convention)
    if isinstance(other, Listed) and other.shape != "{|}":
        if len(values) == 1:
            return match(_as_list(next(iter(values.values()))), other, convention)
        if other.shape == "{}" or any(len(value) > 1 for value in values.values()):
            return Decision(False, "names and a set")
        ordered = Listed("", tuple(values[name][0] for name in sorted(values)), "()")
        return match(ordered, Listed(other.text, other.items, other.shape or "()"), convention)
    return None


def _as_list(values: Sequence[Reading]) -> Reading:
    return values[0] if len(values) == 1 else Listed("", tuple(values))


def _assigned(reading: Reading) -> dict[str, list[Reading]] | None:
    """Names with their values; None if the reading is anything but equations of one name each."""
    items = reading.items if isinstance(reading, Listed) and reading.shape in ("", "{}") else (reading,)
    found: dict[str, list[Reading]] = {}
    for item in items:
        if not isinstance(item, Related) or set(item.signs) != {"="}:
            return None
        name, value = item.parts[0], item.parts[-1]
        if isinstance(name, Listed) and isinstance(value, Listed) and len(name.items) == len(value.items):
            for one, its in zip(name.items, value.items, strict=True):
                found.setdefault(one.text, []).append(its)
        elif isinstance(name, Exact):
            return None
        else:
            for one in item.parts[:-1]:  # x = y = 2
                if one is name or (isinstance(one, Formula) and NAME.fullmatch(one.text)):
                    found.setdefault(one.text, []).append(value)
    return found


def _without_name(named: Related, other: Reading, convention: Convention) -> Decision | None:
    """``x = 2 + 3 = 5`` against 5. ``43 = 42`` is no way to say 42: numbers in a chain must be equal."""
    if isinstance(named.parts[0], Listed) and isinstance(other, Listed):
        return None if _assigned(named) is None else _names_of_tuple(named, other, convention)
    if not _holds(named, convention):
        return Decision(False, "an equation that does not hold")
    decision = match(named.parts[-1], other, convention)
    if not decision.equal and _is_bare_name(named.parts[-1]) and len(named.parts) == 2:
        decision = match(named.parts[0], other, convention)
    return Decision(decision.equal, f"the name is left out; {decision.why}")


def _holds(chain: Related, convention: Convention) -> bool:
    """Whether all numbers of a chain of equations are equal. ``43 = 42`` is no chain."""
    constants = [part for part in chain.parts if isinstance(part, (Exact, Formula)) and _is_constant(part)]
    return all(match(part, constants[-1], convention).equal for part in constants[:-1])


def _explicit(equation: Related) -> str:
    """The name of ``y = 2x + 1``, which stands alone on the left side; empty if there is none."""
    name, other = equation.parts
    if not isinstance(name, Formula) or not isinstance(other, Formula) or not NAME.fullmatch(name.text):
        return ""
    variable, value = value_of(name), value_of(other)
    known = variable is not None and value is not None and bool(variable.free_symbols)
    return name.text if known and not variable.free_symbols & value.free_symbols else ""


def _names_of_tuple(named: Related, other: Listed, convention: Convention) -> Decision:
    values = _assigned(named) or {}
    ordered = tuple(values[name][0] for name in sorted(values))
    return match(Listed("", ordered, "()"), other, convention)


def _is_bare_name(reading: Reading) -> bool:
    return isinstance(reading, Formula) and len(reading.text) == 1 and reading.text.isalpha()


def _is_constant(reading: Reading) -> bool:
    value = value_of(reading)
    return value is not None and not value.free_symbols


@rule((r"\{x \mid x>3\}", r"(3,\infty)", True), ("1<x<2", "2>x>1", True), ("[1,2)", "[1,2]", False))
def sets(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    r"""``x > 3``, ``(3, \infty)`` and ``\{t \mid t > 3\}`` are one set. Two variables must have one name."""
    if not any(_is_set(side) for side in (left, right)):
        return None
    ours, theirs = set_of(left), set_of(right)
    if ours is None or theirs is None:
        return None
    if ours[1] and theirs[1] and ours[1] != theirs[1]:
        return Decision(False, "inequalities of two variables")
    if same_set(ours[0], theirs[0]):
        return Decision(True, "the same set")
    if all(isinstance(side, Listed) and side.shape in ("()", "[]") for side in (left, right)):
        return None  # (2, 1) is a point and no interval
    return Decision(False, "another set")


def _is_set(reading: Reading) -> bool:
    if isinstance(reading, Related):
        return reading.signs != ("=",)
    if isinstance(reading, Listed) and not reading.shape:
        return any(_is_set(item) for item in reading.items)
    return isinstance(reading, (SetOf, Named)) or (
        isinstance(reading, Listed) and reading.shape in ("{|}", "[)", "(]", "[]")
    )


_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


@rule(("2x+4y-3=0", r"y=-\frac{1}{2}x+\frac{3}{4}", True), ("3x+4y+14=0", "3x-y+13=0", False))
def relations(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Equations and inequalities with the same solutions: one is a multiple of the other, or solves to the same."""
    if not (isinstance(left, Related) and isinstance(right, Related)):
        return None
    if len(left.parts) == len(right.parts) and _side_by_side(left, right, convention):
        return Decision(True, "relations, side by side")
    if set(left.signs) == set(right.signs) == {"="} and (len(left.parts) > 2 or len(right.parts) > 2):
        if not (_holds(left, convention) and _holds(right, convention)):
            return Decision(False, "an equation that does not hold")
        ends = [Related("", (side.parts[0], side.parts[-1]), ("=",)) for side in (left, right)]
        return relations(ends[0], ends[1], convention)
    if left.signs == right.signs == ("=",) and (name := _explicit(left)) and name == _explicit(right):
        return match(left.parts[1], right.parts[1], convention)
    if len(left.signs) != 1 or len(right.signs) != 1:
        return Decision(False, "relations")
    differences = [_difference(side) for side in (left, right)]
    if differences[0] is None or differences[1] is None:
        return Decision(False, "relations")
    return _same_solutions(left.signs[0], right.signs[0], *differences)


def _side_by_side(left: Related, right: Related, convention: Convention) -> bool:
    turned = Related("", right.parts[::-1], tuple(_TURNED.get(sign, sign) for sign in right.signs[::-1]))
    symmetric = all(sign in ("=", "!=", "≈", *_TURNED) for sign in right.signs)
    for other in (right, turned) if symmetric else (right,):
        if left.signs == other.signs and all(
            match(a, b, convention).equal for a, b in zip(left.parts, other.parts, strict=True)
        ):
            return True
    return False


def _difference(side: Related) -> Any:
    values = [value_of(part) for part in side.parts]
    if any(value is None for value in values):
        return None
    try:
        return values[0] - values[1]
    except TypeError:
        return None


def _same_solutions(sign: str, other_sign: str, ours: Any, theirs: Any) -> Decision:
    import sympy

    symbols = sorted(ours.free_symbols | theirs.free_symbols, key=str)
    if not symbols or ours.free_symbols != theirs.free_symbols:
        return Decision(False, "relations of other variables")
    factor = _factor(ours, theirs, symbols)
    if factor is not None:
        positive = factor.is_positive
        fits = sign == other_sign if positive or sign in ("=", "!=") else _TURNED.get(sign) == other_sign
        return Decision(bool(fits), "one relation is a multiple of the other")
    if sign != "=" or other_sign != "=":
        return Decision(False, "relations")
    for symbol in symbols:
        try:
            with time_limit(SECONDS):
                solved = [sympy.solve(side, symbol) for side in (ours, theirs)]
        except (
            NotImplementedError,
            PermissionError,
            ValueError,
            TypeError,
            AttributeError,
            KeyError,
            IndexError,
            RecursionError,
        ):
            continue
        if all(solved) and len(solved[0]) == len(solved[1]):
            rest = list(solved[1])
            for one in solved[0]:
                same = next((each for each in rest if agree(one, each)), None)
                if same is None:
                    return Decision(False, "the equations have other solutions")
                rest.remove(same)
            return Decision(True, "the equations have the same solutions")
    return Decision(False, "relations")


def _factor(ours: Any, theirs: Any, symbols: list[Any]) -> Any:
    """The constant that makes one difference of the other; None if there is none."""
    import sympy

    for shift in range(4):
        point = {symbol: sympy.Rational(37 + 11 * k + shift, 13) for k, symbol in enumerate(symbols)}
        top, bottom = ours.subs(point), theirs.subs(point)
        if (
            top.is_number
            and bottom.is_number
            and top.is_extended_real
            and bottom.is_extended_real
            and bottom != 0
            and top != 0
        ):
            factor = top / bottom
            return factor if factor.is_finite and agree(ours, factor * theirs) else None
    return None
