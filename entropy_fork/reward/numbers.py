r"""Exact numbers: which tokens are a number by themselves, and what it is, without any algebra."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from entropy_fork.reward.tokens import Tokens, group_end, without_spaces

#: longer numbers are left to math-verify
MAX_DIGITS, MAX_EXPONENT = 400, 4000


class Number(NamedTuple):
    """An exact number.

    Attributes:
        value: what it is.
        digits: its significant digits if it was written as a decimal, without zeros at either end; else 0.
        place: the value of its last written digit if it was written as a decimal; else 0.
    """

    value: Fraction
    digits: int = 0
    place: Fraction = Fraction(0)


def number_of(tokens: Tokens) -> Number | None:
    r"""The number that all of the tokens are; None if they are something else.

    Integers, decimals, fractions, mixed numbers, repeating decimals, and decimals with a power of ten.

    >>> number_of(["11", " ", "5", "/", "6"]).value
    Fraction(71, 6)
    """
    rest = without_spaces(tokens)
    spaced = len(rest) != len(tokens)
    sign = 1
    while rest and (rest[0] in ("+", "-") or _is_group(rest)):
        if _is_group(rest):
            rest = rest[1:-1]
            continue
        sign = -sign if rest[0] == "-" else sign
        rest = rest[1:]
    found = _unsigned(rest, spaced)
    return None if found is None else found._replace(value=sign * found.value)


def _is_group(tokens: Sequence[str]) -> bool:
    brackets = (tokens[0], tokens[-1])
    return len(tokens) > 2 and brackets in (("{", "}"), ("(", ")")) and not set("{}()") & set(tokens[1:-1])


def _unsigned(tokens: list[str], spaced: bool) -> Number | None:
    if not tokens or len(tokens) > 30:
        return None
    if len(tokens) == 1:
        return _plain(tokens[0])
    if tokens[0] == "\\frac":
        return _fraction(tokens)
    head = _plain(tokens[0])
    if head is None:
        return None
    whole = tokens[0].isdigit()
    if whole and len(tokens) == 3 and tokens[1] == "/" and tokens[2].isdigit():
        return _over(head.value, tokens[2])
    if whole and len(tokens) == 4 and tokens[2] == "/" and spaced:  # 11 5/6
        return _mixed(head.value, _unsigned(tokens[1:], False))
    if whole and tokens[1] == "\\frac":  # 11\frac{5}{6}
        return _mixed(head.value, _fraction(tokens[1:]))
    if "\\overline" in tokens or "\\dot" in tokens or tokens[-1] == "\\ldots" or tokens[-3:] == ["."] * 3:
        return _repeating(tokens)
    return _scientific(head, tokens, spaced)


def _plain(token: str) -> Number | None:
    if not re.fullmatch(r"\d+(\.\d+)?|\.\d+", token, re.ASCII) or len(token) > MAX_DIGITS:
        return None
    if "." not in token:
        return Number(Fraction(int(token)))
    behind = len(token) - token.index(".") - 1
    return Number(Fraction(token), len(token.replace(".", "").strip("0")), Fraction(1, 10**behind))


def _over(top: Fraction, bottom: str) -> Number | None:
    return Number(top / int(bottom)) if len(bottom) < MAX_DIGITS and int(bottom) else None


def _fraction(tokens: list[str]) -> Number | None:
    r"""``\frac{1}{2}``, ``\frac12``, ``\frac{-1}2``."""
    parts: list[int] = []
    rest = list(tokens[1:])
    while rest and len(parts) < 2:
        if rest[0] == "{":
            end = group_end(rest, 0)
            inner, rest = rest[1:end], rest[end + 1 :]
            sign = -1 if inner[:1] == ["-"] else 1
            inner = inner[1:] if inner[:1] == ["-"] else inner
            if len(inner) != 1 or not inner[0].isdigit() or len(inner[0]) > MAX_DIGITS:
                return None
            parts.append(sign * int(inner[0]))
        elif rest[0].isdigit():
            parts.append(int(rest[0][0]))
            rest = [rest[0][1:], *rest[1:]] if len(rest[0]) > 1 else rest[1:]
        else:
            return None
    return Number(Fraction(parts[0], parts[1])) if len(parts) == 2 and not rest and parts[1] else None


def _mixed(whole: Fraction, part: Number | None) -> Number | None:
    return Number(whole + part.value) if part is not None and 0 < part.value < 1 and whole else None


def _repeating(tokens: list[str]) -> Number | None:
    r"""``0.\overline{3}``, ``0.1\dot{6}``, ``0.333\ldots``."""
    text = "".join(tokens).replace("\\ldots", "...")
    if len(text) > 100:
        return None
    match = re.fullmatch(r"(\d+)\.(\d*)\\(?:overline|dot)\{?(\d+)\}?(?:\.\.\.)?", text) or re.fullmatch(
        r"(\d+)\.(\d*?)(\d+?)\3{2,}\.\.\.", text
    )
    if match is None:
        return None
    whole, before, again = match.groups()
    value = Fraction(int(whole + before + again) - int(whole + before), (10 ** len(again) - 1) * 10 ** len(before))
    return Number(value)


def _scientific(head: Number, tokens: list[str], spaced: bool) -> Number | None:
    r"""``1.6\times 10^{-19}``, ``1.6E-19``."""
    text = "".join(tokens[1:])
    match = re.fullmatch(r"\\cdot\s*10\^\{?\(?([+-]?\d+)\)?\}?", text)
    if match is None and not spaced:
        match = re.fullmatch(r"[eE]([+-]?\d+)", text)
        if match and text[0] == "e" and head.value != 1 and not head.digits and re.fullmatch(r"[+-][1-4]", match[1]):
            return None  # 2e-1 is two times e, minus 1
    if match is None or len(match[1]) > 6 or abs(int(match[1])) > MAX_EXPONENT:
        return None
    scale = Fraction(10) ** int(match[1])
    return Number(head.value * scale, head.digits, head.place * scale)
