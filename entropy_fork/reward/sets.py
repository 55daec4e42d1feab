r"""Readings as sets of real numbers: ``x > 3``, ``(3, \infty)``, ``\{x \mid x > 3\}``, ``x \ne 2``, their unions."""

from __future__ import annotations

import re
from typing import Any

from entropy_fork.reward.readings import Exact, Formula, Listed, Named, Reading, Related, SetOf
from entropy_fork.reward.values import value_of


def set_of(reading: Reading) -> tuple[Any, str] | None:
    r"""The set as sympy's, and the name of its variable (empty if it has none); None if the reading is no set.

    A bare list of numbers is no set here: :mod:`entropy_fork.reward.matching` compares its items.
    """
    import sympy

    if isinstance(reading, Named):
        names = {
            "": sympy.S.EmptySet,
            "R": sympy.S.Reals,
            "Z": sympy.S.Integers,
            "N": sympy.S.Naturals,
            "Q": sympy.S.Rationals,
        }
        return (names[reading.letter], "") if reading.letter in names else None
    if isinstance(reading, Related):
        return _of_relation(reading)
    if isinstance(reading, SetOf):
        return _joined([set_of(part) for part in reading.parts], list(reading.signs))
    if isinstance(reading, Listed):
        if reading.shape == "{|}":
            condition, name = reading.items
            made = set_of(condition)
            return (made[0], "") if made is not None and made[1] in ("", name.text) else None
        if reading.shape == "{}":
            values = [_number(item) for item in reading.items]
            return None if any(value is None for value in values) else (sympy.FiniteSet(*values), "")
        if len(reading.items) == 2 and set(reading.shape) <= set("()[]") and reading.shape:
            low, high = map(_number, reading.items)
            if low is None or high is None or not low < high:
                return None  # (4, 3) is a point
            return _interval(low, high, *reading.shape), ""
        if not reading.shape and reading.joined_by in ("or", "and", ",") and len(reading.items) <= 10:
            sign = "cup" if reading.joined_by == "or" else "cap"
            if all(
                isinstance(item, (Related, SetOf)) or (isinstance(item, Listed) and item.shape)
                for item in reading.items
            ):
                between = not any(isinstance(item, Related) for item in reading.items)
                signs = ["cup" if between else sign] * (len(reading.items) - 1)
                return _joined([set_of(item) for item in reading.items], signs)
    return None


def _joined(parts: list[tuple[Any, str] | None], signs: list[str]) -> tuple[Any, str] | None:
    import sympy

    if any(part is None for part in parts):
        return None
    sets, names = zip(*(part for part in parts if part is not None), strict=True)
    if len(set(names) - {""}) > 1:
        return None
    made = sets[0]
    for other, sign in zip(sets[1:], signs, strict=True):
        made = {"cup": sympy.Union, "cap": sympy.Intersection, "setminus": sympy.Complement}[sign](made, other)
    return made, max(names)


def _number(reading: Reading) -> Any:
    """The value of a constant, infinity among them; None for anything else."""
    value = value_of(reading) if isinstance(reading, (Exact, Formula)) else None
    return value if value is not None and not value.free_symbols and value.is_extended_real else None


def _interval(low: Any, high: Any, left: str, right: str) -> Any:
    import sympy

    return sympy.Interval(low, high, left == "(", right == ")")


#: a variable: x, \\theta, x_1
NAME = re.compile(r"[A-Za-z](_.+)?|\\[a-zA-Z]+")
_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}


def _of_relation(reading: Related) -> tuple[Any, str] | None:
    """``1 < x <= 2``: one variable, alone on its side of each sign, and numbers."""
    import sympy

    parts, signs = reading.parts, reading.signs
    if signs in (("in",), ("notin",)):
        inner = set_of(parts[1])
        name = parts[0].text
        if inner is None or not name.replace("\\", "").isalpha():
            return None
        return (inner[0], name) if signs == ("in",) else (sympy.Complement(sympy.S.Reals, inner[0]), name)
    middle = [place for place, part in enumerate(parts) if _number(part) is None]
    if len(middle) != 1 or len(parts) > 3 or (len(parts) == 3 and middle[0] != 1):
        return _solved(reading)
    name = parts[middle[0]].text
    if not isinstance(parts[middle[0]], Formula) or not NAME.fullmatch(name):
        return _solved(reading)
    made: Any = sympy.S.Reals
    for place, sign in enumerate(signs):
        if sign not in _TURNED:
            return None
        other = parts[place] if middle[0] == place + 1 else parts[place + 1]
        bound = _number(other)
        seen = _TURNED[sign] if middle[0] == place + 1 else sign
        made = sympy.Intersection(made, _half_line(seen, bound))
    return made, name


def _solved(reading: Related) -> tuple[Any, str] | None:
    """``|x| > 1`` and ``x^2 < 4``: one inequality of one variable."""
    import sympy

    values = [value_of(part) for part in reading.parts]
    if len(values) != 2 or reading.signs[0] not in _TURNED or any(value is None for value in values):
        return None
    symbols = values[0].free_symbols | values[1].free_symbols
    name = next(iter(symbols)).name if len(symbols) == 1 else ""
    if len(name) != 1:
        return None
    try:
        return sympy.Rel(values[0], values[1], reading.signs[0]).as_set(), name
    except (NotImplementedError, PermissionError, TypeError, ValueError, AttributeError):
        return None


def _half_line(sign: str, bound: Any) -> Any:
    import sympy

    if sign == "!=":
        return sympy.Complement(sympy.S.Reals, sympy.FiniteSet(bound))
    if sign in ("<", "<="):
        return sympy.Interval(-sympy.oo, bound, True, sign == "<")
    return sympy.Interval(bound, sympy.oo, sign == ">", True)


def same_set(left: Any, right: Any) -> bool:
    """Whether two sets have the same members."""
    if left == right:
        return True
    try:
        return bool(left.symmetric_difference(right).is_empty)
    except (NotImplementedError, TypeError, ValueError, AttributeError):
        return False
