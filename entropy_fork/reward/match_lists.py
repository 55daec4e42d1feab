"""Rules for what has parts: choices, lists, matrices, cases; and for words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from entropy_fork.reward.convention import Convention
from entropy_fork.reward.matching import Decision, by_kind, match, rule
from entropy_fork.reward.numbers import Number
from entropy_fork.reward.readings import Cases, Choice, Exact, Formula, Listed, Matrix, Named, Reading, Text
from entropy_fork.reward.second_opinion import agree
from entropy_fork.reward.values import value_of


@rule((r"\dfrac{1}{2}", r"\frac{1}{2}", True))
def same_text(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Equal texts are equal."""
    return Decision(True, "the same text") if left.text == right.text and left.text else None


@rule((r"\textbf{(C)}\ 12", "C", True), (r"\textbf{(C)}\ 12", "12", True), ("(B)", "C", False))
def choices(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """A choice is its letter, or what stands behind the letter if the other side has no letter."""
    pair = by_kind(left, right, Choice)
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


@rule(("2,1", "1,2", True), ("(2,1)", "(1,2)", False), (r"1\pm 2i", "1+2i, 1-2i", True))
def lists(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Lists and sets in any order; pairs, vectors and intervals in theirs, with the same brackets for two items."""
    if isinstance(left, Listed) != isinstance(right, Listed):
        return _list_and_one(left, right, convention)
    if not (isinstance(left, Listed) and isinstance(right, Listed)):
        return None
    if "{|}" in (left.shape, right.shape):
        equal = left.shape == right.shape and all(
            match(a, b, convention).equal for a, b in zip(left.items, right.items, strict=True)
        )
        return Decision(equal, "set builders")
    ordered = [_has_order(side, convention) for side in (left, right)]
    if not any(ordered):
        dots = any(item.text == "\\ldots" for side in (left, right) for item in side.items)
        return (
            _in_order(left, right, convention)
            if dots or convention.order == "exact"
            else _in_any_order(left, right, convention)
        )
    if "{}" in (left.shape, right.shape):
        return Decision(False, "a set is no list in brackets")
    if any(not side.shape and side.joined_by == "or" for side in (left, right)):
        return Decision(False, "one or the other is no pair")
    if any("[" in side.shape or "]" in side.shape for side in (left, right)) and not all(ordered):
        return Decision(False, "a list is no interval")
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
    pair = by_kind(left, right, Listed)
    if pair is None:
        return None
    several, one = pair
    if isinstance(one, Exact) and one.grouped and not several.shape and (regrouped := _regrouped(one)) is not None:
        return _in_any_order(several, regrouped, convention)
    if isinstance(one, Matrix):
        vector = [row[0] for row in one.rows] if all(len(row) == 1 for row in one.rows) else list(one.rows[0])
        if len(vector) * len(one.rows) not in (len(vector), len(one.rows) ** 2) or several.shape not in (
            "()",
            "<>",
            "[]",
        ):
            return Decision(False, "a list is no matrix")
        if len(one.rows) > 1 and len(one.rows[0]) > 1:
            return Decision(False, "a list is no matrix")
        return _in_order(several, Listed("", tuple(vector), "()"), convention)
    if len(several.items) == 1 and several.shape in ("", "{}") and not isinstance(one, Named):
        return match(several.items[0], one, convention)
    if several.joined_by == "±" and not several.shape and isinstance(one, (Exact, Formula)):
        return _in_any_order(several, Listed("", (one,)), convention)
    return None


def _regrouped(number: Exact) -> Listed | None:
    """``100,200`` as a list; None if a part would begin with zero, as in 1,000."""
    rest = int(number.number.value)
    parts: list[Reading] = []
    while rest:
        rest, part = divmod(rest, 1000)
        if rest and part < 100:
            return None
        parts.append(Exact(str(part), Number(Fraction(part))))
    return Listed("", tuple(parts))


@rule((r"2\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\4\end{pmatrix}", True))
def matrices(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Matrices, cell by cell. A product such as 2A is computed first."""
    pair = by_kind(left, right, Matrix)
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


@rule((r"\begin{cases}x&x>0\\-x&x\le 0\end{cases}", r"\begin{cases}-x&x\le 0\\x&x>0\end{cases}", True))
def cases(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Definitions by cases, the cases in any order."""
    if not (isinstance(left, Cases) and isinstance(right, Cases)):
        return None
    rest = list(right.rows)
    for row in left.rows:
        same = next(
            (
                other
                for other in rest
                if len(other) == len(row)
                and all(match(a, b, convention).equal for a, b in zip(row, other, strict=True))
            ),
            None,
        )
        if same is None:
            return Decision(False, "cases in any order")
        rest.remove(same)
    return Decision(not rest, "cases in any order")


@rule((r"\text{Even}", "even", True), ("no", "on", False), ("DBCA", "ABCD", False))
def texts(left: Reading, right: Reading, convention: Convention) -> Decision | None:
    """Words are compared letter by letter, without case."""
    if not any(isinstance(side, Text) for side in (left, right)):
        return None
    ours, theirs = (re.sub(r"(?<!\w) | (?!\w)", "", side.text.lower()) for side in (left, right))
    return Decision(ours == theirs and bool(ours), "texts")
