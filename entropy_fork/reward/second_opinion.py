r"""Are two expressions equal as numbers? Exactly where both are rational, else to many digits, at several points.

math-verify takes two numbers for equal if their difference is smaller than about 1e-15, and two expressions if
sympy's ``simplify`` says so. Neither is proof, and both have been wrong. Here a difference refuses, whatever
math-verify says, and agreement at all points decides for equal where ``simplify`` finds no way.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from typing import Any

#: digits that are computed, and the relative difference from which on two values differ
DIGITS, DIFFERENT = 40, "1e-30"

#: digits after which a difference of two constants that stays zero is zero
MOST_DIGITS = 400

#: this many points must agree, of those at which both sides are real numbers
ENOUGH_POINTS = 4

#: processor seconds for one opinion
SECONDS = 2.0

#: an expression whose binary logarithm is larger is not computed at all
MOST_SIZE = 1e7

#: larger integers are not computed exactly
MOST_BITS = 200_000


class OutOfTime(Exception):
    """The opinion took too long: there is none."""


def agree(left: Any, right: Any) -> bool | None:
    """Whether two expressions of sympy have the same values. None if they have none that can be computed.

    Raises:
        OutOfTime: it takes longer than :data:`SECONDS`.
    """
    for side in (left, right):
        if _size(side) > MOST_SIZE:
            raise OutOfTime
    try:
        with time_limit(SECONDS):
            if left.free_symbols or right.free_symbols:
                return _at_points(left, right)
            return _constants(left, right)
    except (ArithmeticError, ValueError, TypeError, AttributeError, NotImplementedError, RecursionError):
        return None


def _size(expression: Any) -> float:
    """The binary logarithm of a number, roughly and never too small; a variable counts as a small number."""
    import sympy

    if expression.is_Rational:
        return float(_bits(Fraction(int(expression.p), int(expression.q))))
    sizes = [_size(part) for part in expression.args]
    if isinstance(expression, sympy.Pow):
        return max(sizes[0], 1.0) * 2.0 ** min(sizes[1], 60.0)
    if isinstance(expression, sympy.exp):
        return 2.0 * 2.0 ** min(sizes[0], 60.0)
    if isinstance(expression, sympy.factorial):
        return 2.0 ** min(sizes[0], 60.0) * sizes[0]
    if isinstance(expression, sympy.Mul):
        return sum(sizes)
    return max(sizes, default=1.0) + len(sizes)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` after so many processor seconds. Only a main thread can do that; others go on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


# ---------------------------------------------------------------------------------------------------------- constants


def _constants(left: Any, right: Any) -> bool | None:
    exact = exact_value(left), exact_value(right)
    if exact[0] is not None and exact[1] is not None:
        return exact[0] == exact[1]
    near = _same(_value(left, {}), _value(right, {}))
    if not near:
        return near
    return left.doit() == right.doit() or not _differ(left, right)


def exact_value(expression: Any) -> Fraction | None:
    """The value of an expression of rational numbers; None if it has another part, or would be too large."""
    import sympy

    if expression.is_Rational:
        return Fraction(int(expression.p), int(expression.q))
    parts = [exact_value(part) for part in expression.args]
    if any(part is None for part in parts):
        return None
    values: list[Fraction] = parts  # type: ignore[assignment]
    if isinstance(expression, sympy.Add):
        return sum(values, Fraction(0))
    if isinstance(expression, sympy.Mul):
        product = Fraction(1)
        for value in values:
            product *= value
        return product if _bits(product) < MOST_BITS else None
    if isinstance(expression, sympy.Pow):
        base, power = values
        if power.denominator != 1 or abs(power) * _bits(base) > MOST_BITS or (not base and power <= 0):
            return None
        return base ** int(power)
    if isinstance(expression, sympy.factorial) and values[0].denominator == 1 and 0 <= values[0] < 5000:
        import math

        return Fraction(math.factorial(int(values[0])))
    if isinstance(expression, sympy.UnevaluatedExpr):
        return values[0]
    if isinstance(expression, sympy.floor):
        return Fraction(values[0].__floor__())
    if isinstance(expression, sympy.ceiling):
        return Fraction(values[0].__ceil__())
    if isinstance(expression, sympy.Abs):
        return abs(values[0])
    if isinstance(expression, sympy.Mod) and values[1]:
        return values[0] % values[1]
    return None


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _differ(left: Any, right: Any) -> bool:
    """Whether the difference of two constants is other than zero, in :data:`MOST_DIGITS` digits."""
    import sympy

    difference = sympy.Add(left, sympy.Mul(-1, right, evaluate=False), evaluate=False)
    found = difference.evalf(5, maxn=MOST_DIGITS)
    return any(part.is_Float and part and part._prec > 1 for part in found.as_real_imag())


# ------------------------------------------------------------------------------------------------------------- points

# Values of the variables, point by point. They are no round numbers, so that nothing is equal by accident. Some are
# negative, some within the unit circle, some far out: |x-50| is 50-x at all points near zero.
_GRID = (
    ("0.7310", "0.4177", "0.2893", "0.6101"),
    ("-0.6173", "-0.3719", "-0.8311", "-0.2237"),
    ("2417.31", "1913.73", "3119.57", "2803.19"),
    ("-1873.9", "-2311.3", "-1447.1", "-2039.7"),
    ("2.3179", "1.2711", "3.1931", "1.7389"),
    ("7.1303", "5.3299", "11.4107", "6.2713"),
    ("-2.7193", "1.9391", "-1.4173", "3.3331"),
    ("1.6097", "-2.2307", "0.5527", "-0.7877"),
    ("31.4391", "17.2273", "23.8119", "41.5171"),
    ("0.1193", "0.0871", "0.1567", "0.2011"),
    ("-5.1091", "-7.4219", "-3.6607", "-9.0173"),
    ("3.0119", "2.1791", "1.1321", "0.9187"),
)
#: steps are tried at many numbers, since they differ at few only. Half of them are whole
_MANY = tuple((k, 3 * k + 1, 5 * k + 2, 7 * k + 3) for k in range(1, 61))
_BETWEEN = tuple((f"{k}.37", f"{3 * k}.61", f"{5 * k}.83", f"{7 * k}.19") for k in range(1, 31))

#: letters that stand for integers where something is rounded
_INTEGERS = {"k", "l", "m", "n"}
_WHOLE = (
    (5, 3, 2, 4),
    (3, 5, 8, 6),
    (7, 2, 4, 3),
    (4, 9, 11, 7),
    (9, 4, 6, 2),
    (2, 7, 5, 8),
    (6, 1, 3, 5),
    (5, 12, 3, 9),
)


def _points(symbols: list[Any], whole: bool, steps: bool) -> list[list[Any]]:
    import sympy

    grid: Any = _WHOLE if whole else _GRID
    if steps:
        grid = _MANY if {symbol.name for symbol in symbols} <= _INTEGERS else _MANY + _BETWEEN
    shift = 1 if whole else sympy.Rational(1, 1009)
    return [[sympy.Rational(row[k % 4]) + k // 4 * shift for k in range(len(symbols))] for row in grid]


def _at_points(left: Any, right: Any) -> bool | None:
    import sympy

    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    parts = _real_parts(left) + _real_parts(right)
    steps = left.has(*(rounding := (sympy.floor, sympy.ceiling, sympy.Mod))) or right.has(*rounding)
    of_integers = (sympy.Sum, sympy.Product, sympy.factorial, sympy.binomial, *rounding)
    for whole in (True,) if left.has(*of_integers) or right.has(*of_integers) else (False, True):
        compared = zeros = 0
        for values in _points(symbols, whole, steps):
            point = dict(zip(symbols, values, strict=True))
            if not _is_real_there(parts, point):
                continue
            found = _value(left, point), _value(right, point)
            same = _same(*found)
            if same is None:
                continue
            if not same:
                return False
            compared, zeros = compared + 1, zeros + (found[0] == 0)
            if compared - zeros == ENOUGH_POINTS + len(symbols) and not steps:
                return True
        if compared - zeros >= ENOUGH_POINTS or compared == zeros >= ENOUGH_POINTS:
            return True
    return None


def _real_parts(expression: Any) -> list[tuple[Any, Any]]:
    """Roots as base and power, and logarithms as argument and None. An expression with i is taken as it is."""
    import sympy

    if expression.has(sympy.I):
        return []
    found = []
    for part in sympy.preorder_traversal(expression):
        if isinstance(part, sympy.Pow) and not part.exp.is_Integer:
            found.append((part.base, part.exp))
        elif isinstance(part, sympy.log):
            found.append((part.args[0], None))
    return [(base, power) for base, power in found if base.free_symbols or (power is not None and power.free_symbols)]


def _is_real_there(parts: list[tuple[Any, Any]], point: dict[Any, Any]) -> bool:
    """Whether no part is a root or logarithm of a negative number at a point."""
    for base, exponent in parts:
        if exponent is not None and exponent.free_symbols:
            power = _value(exponent, point)
            if power is not None and power.imag == 0 and power.real == int(power.real):
                continue
        value = _value(base, point)
        if value is None or value.imag != 0 or value.real < 0:
            return False
    return True


@lru_cache(maxsize=1)
def _context() -> Any:
    import mpmath

    made = mpmath.MPContext()
    made.dps = DIGITS + 10
    return made


def _value(expression: Any, point: dict[Any, Any]) -> Any:
    """The value as a complex number of mpmath, 0 where all digits cancel; None if it is none."""
    import sympy

    if expression.has(sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative):
        expression, point = expression.subs(point).doit(), {}
    elif point and expression.has(sympy.factorial, sympy.binomial):  # evalf loses all digits of their quotients
        expression, point = expression.subs(point), {}
    found = expression.evalf(DIGITS, subs=point) if point else expression.evalf(DIGITS)
    parts = []
    for part in found.as_real_imag():
        if not (part.is_Float or part.is_Rational):
            return None
        number = part.evalf(DIGITS) if part.is_Rational else part
        zero = not number or number._prec <= 1
        parts.append(_context().zero if zero else _context().make_mpf(number._mpf_))
    value = _context().mpc(*parts)
    return value if _context().isfinite(value) else None


def _same(left: Any, right: Any) -> bool | None:
    if left is None or right is None:
        return None
    largest = max(abs(left), abs(right))
    return bool(abs(left - right) <= _context().mpf(DIFFERENT) * largest)


# ----------------------------------------------------------------------------------------------------------- decimals


def is_rounded(decimal: Fraction, place: Fraction, expression: Any) -> bool:
    """Whether a decimal is the expression, rounded to the decimal's last digit."""
    try:
        with time_limit(SECONDS):
            value = _value(expression, {})
            if value is None or value.imag != 0:
                return False
            context = _context()
            error = abs(value.real - context.mpf(decimal.numerator) / decimal.denominator)
            return bool(error <= context.mpf(place.numerator) / place.denominator / 2)
    except (OutOfTime, ArithmeticError, ValueError, TypeError, AttributeError, NotImplementedError, RecursionError):
        return False
