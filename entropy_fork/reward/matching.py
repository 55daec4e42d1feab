r"""Are two readings equal? One rule per pair of kinds, each a small function.

:func:`match` asks the functions of :data:`RULES` in their order. A rule answers with a :class:`Decision`, or with None
if it says nothing about these kinds. Every rule is symmetric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from entropy_fork.reward.convention import Convention
from entropy_fork.reward.reading import (
    Cases,
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
from entropy_fork.reward.second_opinion import agree, exact_value, is_rounded
from entropy_fork.reward.sets import NAME, same_set, set_of
from entropy_fork.reward.values import value_of

#: a decimal that rounds something else needs so many significant digits
ROUNDED_DIGITS = 6


class Decision(NamedTuple):
    """Whether two readings are equal, and the rule that says so."""

    equal: bool
    why: str


Rule = Callable[[Reading, Reading, Convention], "Decision | None"]


def match(left: Reading, right: Reading, convention: Convention) -> Decision:
    """The decision of the first rule that knows these kinds."""
    for rule in RULES:
        decision = rule(left, right, convention)
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


def _by_kind(left: Reading, right: Reading, kind: type) -> tuple[Any, Any] | None:
    """The two readings, that of this kind first; None if neither is of it."""
    if isinstance(left, kind):
        return left, right
    return (right, left) if isinstance(right, kind) else None


def same_text(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Equal texts are equal."""
    return Decision(True, "the same text") if left.text == right.text and left.text else None


def numbers(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Two numbers are compared exactly. A decimal may round a fraction that no decimal of 15 digits is."""
    if not (isinstance(left, Exact) and isinstance(right, Exact)):
        return None
    a, b = left.number, right.number
    if a.value == b.value:
        return Decision(True, "exact numbers")
    for one, other in ((a, b), (b, a)):
        if one.digits >= ROUNDED_DIGITS and not other.digits and not other.place and not _is_decimal(other.value):
            if abs(one.value - other.value) <= one.place / 2:
                return Decision(True, "a decimal, rounded in its last place")
    return Decision(False, "exact numbers")


def _is_decimal(value: Any) -> bool:
    return bool((value * 10**15).denominator == 1)


def choices(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """A choice is its letter, or what stands behind the letter if the other side has no letter."""
    pair = _by_kind(left, right, Choice)
    if pair is None:
        return None
    one, other = pair
    if isinstance(other, Choice):
        if one.letter != other.letter:
            return Decision(False, "another letter")
        if one.content is None or other.content is None:
            return Decision(True, "the letter of the choice")
        return match(one.content, other.content, convention)
    if len(other.text) == 1 and other.text.isalpha():
        return Decision(one.letter == other.text.upper(), "the letter of the choice")
    if one.content is None:
        return Decision(False, "a letter only")
    return match(one.content, other, convention)


def percentages(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """``50%`` is 0.5. It is 50 too, unless the number could be a share: ``0.5%`` is not 0.5."""
    pair = _by_kind(left, right, Percent)
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


def quantities(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Two units must be the same, or convert. One side may leave its unit out, but not a number of hours and minutes."""
    pair = _by_kind(left, right, Measured)
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
    return value is not None and radians is not None and radians.has(sympy.pi) and bool(agree(value * sympy.pi / 180, radians))


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


def bases(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Digits in a base are equal to the same digits in the same base, and to nothing else."""
    pair = _by_kind(left, right, InBase)
    if pair is None:
        return None
    one, other = pair
    equal = isinstance(other, InBase) and (one.digits, one.base) == (other.digits, other.base)
    return Decision(equal, "digits and base")


def clocks(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Times of the day: am and pm may be missing on one side, and 14:30 is 2:30 pm."""
    pair = _by_kind(left, right, Clock)
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


def ratios(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """``3:2`` is ``6:4`` and ``3/2``."""
    pair = _by_kind(left, right, Ratio)
    if pair is None:
        return None
    one, other = pair
    ours = [value_of(part) for part in one.parts]
    theirs = [value_of(part) for part in other.parts] if isinstance(other, Ratio) else [value_of(other), 1]
    if len(ours) != len(theirs) or any(value is None for value in (*ours, *theirs)):
        return None if isinstance(other, (Related, Measured)) else Decision(False, "ratios")
    equal = all(bool(agree(ours[0] * theirs[k], theirs[0] * ours[k])) for k in range(1, len(ours)))
    return Decision(equal and ours[0] != 0, "ratios")


def residues(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    r"""``n \equiv 5 \pmod 3`` is ``n \equiv 2 \pmod 3``. The modulus may be missing on one side."""
    pair = _by_kind(left, right, Modulo)
    if pair is None:
        return None
    one, other = pair
    if not isinstance(other, Modulo):
        return match(one.residue, other, convention)
    if not match(one.modulus, other.modulus, convention).equal:
        return Decision(False, "another modulus")
    values = [exact_value(value_of(_last(side.residue))) if value_of(_last(side.residue)) is not None else None for side in (one, other)]
    modulus = exact_value(value_of(one.modulus)) if value_of(one.modulus) is not None else None
    if modulus and values[0] is not None and values[1] is not None:
        names = {side.residue.parts[0].text for side in (one, other) if isinstance(side.residue, Related)}
        return Decision(len(names) < 2 and (values[0] - values[1]) % modulus == 0, "residues")
    return match(one.residue, other.residue, convention)


def _last(reading: Reading) -> Reading:
    return reading.parts[-1] if isinstance(reading, Related) else reading


def names(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """``x = 5`` is 5, and ``x = 3, y = 4`` is ``(3, 4)``: a name may be missing on one side only."""
    if isinstance(left, Related) and isinstance(right, Related):
        return None
    ours, theirs = _assigned(left), _assigned(right)
    if ours is not None and theirs is not None:
        if len(ours) == 1 and len(theirs) == 1:
            return match(_as_list(next(iter(ours.values()))), _as_list(next(iter(theirs.values()))), convention) if ours.keys() == theirs.keys() else Decision(False, "other names")
        if ours.keys() != theirs.keys():
            return Decision(False, "other names")
        equal = all(match(_as_list(ours[name]), _as_list(theirs[name]), convention).equal for name in ours)
        return Decision(equal, "each name has the same value")
    pair = (ours, left, right) if ours is not None else (theirs, right, left) if theirs is not None else None
    if pair is None:
        return None
    values, named, other = pair
    if isinstance(named, Related) and isinstance(other, (Exact, Formula, Measured, Percent, Text, Matrix, InBase, Clock, Ratio, Choice, Listed, Modulo)):
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
                if one is name or isinstance(one, Formula) and NAME.fullmatch(one.text):
                    found.setdefault(one.text, []).append(value)
    return found


def _without_name(named: Related, other: Reading, convention: Convention) -> Decision | None:
    """``x = 2 + 3 = 5`` against 5. ``43 = 42`` is no way to say 42: numbers in a chain must be equal."""
    if isinstance(named.parts[0], Listed) and isinstance(other, Listed):
        return None if _assigned(named) is None else _names_of_tuple(named, other, convention)
    constants = [part for part in named.parts if isinstance(part, Exact) or isinstance(part, Formula) and _is_constant(part)]
    for part in constants[:-1]:
        if not match(part, constants[-1], convention).equal:
            return Decision(False, "an equation that does not hold")
    decision = match(named.parts[-1], other, convention)
    if not decision.equal and _is_bare_name(named.parts[-1]) and len(named.parts) == 2:
        decision = match(named.parts[0], other, convention)
    return Decision(decision.equal, f"the name is left out; {decision.why}")


def _names_of_tuple(named: Related, other: Listed, convention: Convention) -> Decision:
    values = _assigned(named) or {}
    ordered = tuple(values[name][0] for name in sorted(values))
    return match(Listed("", ordered, "()"), other, convention)


def _is_bare_name(reading: Reading) -> bool:
    return isinstance(reading, Formula) and len(reading.text) == 1 and reading.text.isalpha()


def _is_constant(reading: Reading) -> bool:
    value = value_of(reading)
    return value is not None and not value.free_symbols


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
    return isinstance(reading, (SetOf, Named)) or isinstance(reading, Listed) and reading.shape in ("{|}", "[)", "(]", "[]")


def lists(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Lists and sets in any order; pairs, vectors and intervals in theirs, with the same brackets for two items."""
    if isinstance(left, Listed) != isinstance(right, Listed):
        return _list_and_one(left, right, convention)
    if not (isinstance(left, Listed) and isinstance(right, Listed)):
        return None
    if "{|}" in (left.shape, right.shape):
        equal = left.shape == right.shape and all(match(a, b, convention).equal for a, b in zip(left.items, right.items, strict=True))
        return Decision(equal, "set builders")
    ordered = [_has_order(side, convention) for side in (left, right)]
    if not any(ordered):
        dots = any(item.text == "\\ldots" for side in (left, right) for item in side.items)
        return _in_order(left, right, convention) if dots or convention.order == "exact" else _in_any_order(left, right, convention)
    if "{}" in (left.shape, right.shape):
        return Decision(False, "a set is no list in brackets")
    if len(left.items) == 2 and all(ordered) and _brackets(left) != _brackets(right):
        return Decision(False, "other brackets")
    return _in_order(left, right, convention)


def _brackets(side: Listed) -> str:
    return side.shape.replace("<", "(").replace(">", ")")


def _has_order(side: Listed, convention: Convention) -> bool:
    return side.shape not in ("", "{}") and not (convention.order == "ignored" and side.shape in ("()", "<>"))


def _in_order(left: Listed, right: Listed, convention: Convention) -> Decision:
    if len(left.items) != len(right.items):
        return Decision(False, "another number of items")
    for a, b in zip(left.items, right.items, strict=True):
        decision = match(a, b, convention)
        if not decision.equal:
            return Decision(False, f"items in their order: {decision.why}")
    return Decision(True, "items in their order")


def _in_any_order(left: Listed, right: Listed, convention: Convention) -> Decision:
    ours, theirs = (_distinct(side.items, convention) for side in (left, right))
    if len(ours) != len(theirs):
        return Decision(False, "another number of items")
    for item in ours:
        same = next((place for place, other in enumerate(theirs) if match(item, other, convention).equal), None)
        if same is None:
            return Decision(False, "items in any order")
        theirs.pop(same)
    return Decision(True, "items in any order")


def _distinct(items: Sequence[Reading], convention: Convention) -> list[Reading]:
    kept: list[Reading] = []
    for item in items:
        if len(items) > 30 or not any(match(item, other, convention).equal for other in kept):
            kept.append(item)
    return kept


def _list_and_one(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    pair = _by_kind(left, right, Listed)
    if pair is None:
        return None
    several, one = pair
    if isinstance(one, Exact) and one.grouped and not several.shape:
        return _in_any_order(several, _regrouped(one), convention)
    if isinstance(one, Matrix):
        vector = [row[0] for row in one.rows] if all(len(row) == 1 for row in one.rows) else list(one.rows[0])
        if len(vector) * len(one.rows) not in (len(vector), len(one.rows) ** 2) or several.shape not in ("()", "<>", "[]"):
            return Decision(False, "a list is no matrix")
        if len(one.rows) > 1 and len(one.rows[0]) > 1:
            return Decision(False, "a list is no matrix")
        return _in_order(several, Listed("", tuple(vector), "()"), convention)
    if len(several.items) == 1 and several.shape in ("", "{}") and not isinstance(one, Named):
        return match(several.items[0], one, convention)
    if several.joined_by == "±" and not several.shape and isinstance(one, (Exact, Formula)):
        return _in_any_order(several, Listed("", (one,)), convention)
    return None


def _regrouped(number: Exact) -> Listed:
    from entropy_fork.reward.numbers import Number

    value = int(number.number.value)
    parts: list[Reading] = []
    while value:
        value, rest = divmod(value, 1000)
        parts.append(Exact(str(rest), Number(number.number.value * 0 + rest)))
    return Listed("", tuple(parts))


def matrices(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Matrices, cell by cell. A product such as 2A is computed first."""
    pair = _by_kind(left, right, Matrix)
    if pair is not None and isinstance(pair[1], Formula):
        return Decision(_is_matrix(*pair), "matrices, cell by cell")
    if not (isinstance(left, Matrix) and isinstance(right, Matrix)):
        return None
    if [len(row) for row in left.rows] != [len(row) for row in right.rows]:
        return Decision(False, "matrices of two sizes")
    cells = zip((c for row in left.rows for c in row), (c for row in right.rows for c in row), strict=True)
    return Decision(all(match(a, b, convention).equal for a, b in cells), "matrices, cell by cell")


def _is_matrix(matrix: Matrix, formula: Formula) -> bool:
    from sympy import MatrixBase

    value = value_of(formula)
    computed = value.doit() if value is not None else None
    if not isinstance(computed, MatrixBase) or computed.shape != (len(matrix.rows), len(matrix.rows[0])):
        return False
    cells = [value_of(cell) for row in matrix.rows for cell in row]
    return all(cell is not None and agree(cell, other) for cell, other in zip(cells, computed, strict=True))


def cases(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Definitions by cases, the cases in any order."""
    if not (isinstance(left, Cases) and isinstance(right, Cases)):
        return None
    rest = list(right.rows)
    for row in left.rows:
        same = next((other for other in rest if len(other) == len(row) and all(match(a, b, convention).equal for a, b in zip(row, other, strict=True))), None)
        if same is None:
            return Decision(False, "cases in any order")
        rest.remove(same)
    return Decision(not rest, "cases in any order")


_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


def relations(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Equations and inequalities with the same solutions: one is a multiple of the other, or solves to the same."""
    if not (isinstance(left, Related) and isinstance(right, Related)):
        return None
    if len(left.parts) == len(right.parts) and _side_by_side(left, right, convention):
        return Decision(True, "relations, side by side")
    if set(left.signs) == set(right.signs) == {"="} and (len(left.parts) > 2 or len(right.parts) > 2):
        ends = [Related("", (side.parts[0], side.parts[-1]), ("=",)) for side in (left, right)]
        return relations(ends[0], ends[1], convention)
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
        if left.signs == other.signs and all(match(a, b, convention).equal for a, b in zip(left.parts, other.parts, strict=True)):
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
            solved = [sympy.solve(side, symbol) for side in (ours, theirs)]
        except (NotImplementedError, PermissionError, ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
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
        if top.is_number and bottom.is_number and top.is_extended_real and bottom.is_extended_real and bottom != 0 and top != 0:
            factor = top / bottom
            return factor if factor.is_finite and agree(ours, factor * theirs) else None
    return None


def formulas(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Everything that is an expression: values at points or in 40 digits; where there are none, math-verify decides."""
    if not all(isinstance(side, (Exact, Formula)) for side in (left, right)):
        return None
    ours, theirs = value_of(left), value_of(right)
    if ours is None or theirs is None:
        return None
    if ours == theirs and not ours.has(_nonsense()):
        return Decision(True, "the same expression")
    for decimal, other in ((left, theirs), (right, ours)):
        if isinstance(decimal, Exact) and decimal.number.digits >= ROUNDED_DIGITS and not other.free_symbols:
            exact = exact_value(other)
            if exact is None or not _is_decimal(exact):
                return Decision(is_rounded(decimal.number.value, decimal.number.place, other), "a decimal, rounded in its last place")
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


def texts(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Words are compared letter by letter, without case."""
    if not any(isinstance(side, Text) for side in (left, right)):
        return None
    spelled = [" ".join(side.text.replace("\\", " \\").lower().split()) for side in (left, right)]
    squeezed = ["".join(each.split()) for each in spelled]
    return Decision(squeezed[0] == squeezed[1] and bool(squeezed[0]), "texts")


#: in this order; the first that knows the kinds decides
RULES: tuple[Rule, ...] = (
    same_text, choices, numbers, residues, sets, names, percentages, quantities, bases, clocks, ratios, relations, lists,
    matrices, cases, formulas, texts,
)  # fmt: skip
