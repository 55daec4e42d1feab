r"""The kinds of answers: a number, a list, a relation, a quantity, words, … Each is a class here."""

from __future__ import annotations

from dataclasses import dataclass

from entropy_fork.reward.numbers import Number
from entropy_fork.reward.units import Unit


@dataclass(frozen=True)
class Reading:
    """What an answer was read as."""

    #: the tokens without spaces, in one piece
    text: str


@dataclass(frozen=True)
class Exact(Reading):
    """A number by itself."""

    number: Number
    #: whether its commas could be those of a list: 1,000
    grouped: bool = False


@dataclass(frozen=True)
class Formula(Reading):
    """An expression for math-verify's parser."""

    latex: str


@dataclass(frozen=True)
class Text(Reading):
    """Words, or what nothing else can read."""

    readable: bool


@dataclass(frozen=True)
class Listed(Reading):
    """Several readings. ``shape`` has the brackets, ``(]``; it is ``{}`` for a set and empty without brackets."""

    items: tuple[Reading, ...]
    shape: str = ""
    joined_by: str = ","


@dataclass(frozen=True)
class Related(Reading):
    """A relation, or a chain of them: ``1 < x <= 2`` has three parts and two signs."""

    parts: tuple[Reading, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True)
class SetOf(Reading):
    r"""Sets joined by ``\cup``, ``\cap`` or ``\setminus``."""

    parts: tuple[Reading, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True)
class Named(Reading):
    r"""``\mathbb{R}``, or the empty set, by its letter; the empty set has none."""

    letter: str


@dataclass(frozen=True)
class Measured(Reading):
    """An amount with its unit; several of them for ``3 hours 20 minutes``."""

    amounts: tuple[Reading, ...]
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class Percent(Reading):
    """An amount with a percent sign."""

    amount: Reading


@dataclass(frozen=True)
class InBase(Reading):
    """Digits with the base in which they are written."""

    digits: str
    base: str


@dataclass(frozen=True)
class Clock(Reading):
    """A time of the day: hours, minutes, seconds, and am, pm or nothing."""

    time: tuple[int, ...]
    half: str


@dataclass(frozen=True)
class Ratio(Reading):
    """``3:2``."""

    parts: tuple[Reading, ...]


@dataclass(frozen=True)
class Matrix(Reading):
    """Rows of cells."""

    rows: tuple[tuple[Reading, ...], ...]


@dataclass(frozen=True)
class Cases(Reading):
    """Values with their conditions, in any order."""

    rows: tuple[tuple[Reading, ...], ...]


@dataclass(frozen=True)
class Choice(Reading):
    """A letter of a multiple choice, and what stands behind it."""

    letter: str
    content: Reading | None


@dataclass(frozen=True)
class Modulo(Reading):
    """A residue and its modulus."""

    residue: Reading
    modulus: Reading
