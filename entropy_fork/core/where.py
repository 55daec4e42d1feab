"""``where``: which tokens are in a pool at all. An expression over the fields of the scores, such as ``advantage > 0``.

The expression is parsed into a tree of comparisons, and only numbers, names of fields and the operators of
:data:`OPERATORS` can be in it. Nothing of it runs as Python: a call, an attribute or an index is refused. A user's own
function is named by its import path, as a score is.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from entropy_fork.core.scores import FIELDS, fields_read_by
from entropy_fork.core.user_function import is_import_path, load_function

#: every operator that an expression may have
OPERATORS: Mapping[type, Callable[..., Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.And: operator.and_, ast.Or: operator.or_, ast.Not: operator.invert,
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip

#: the longest expression
LONGEST = 500

#: how deep an expression may be nested. Python could parse more, but not compute it with little of its stack left.
DEEPEST = 50

#: the largest number in an expression
HIGHEST = 1e30

#: what an expression looks like, for messages
EXAMPLE = "'advantage > 0 and not (log_prob < -2 or entropy < 0.1)'"


@dataclass(frozen=True)
class Where:
    """The tokens that can be kept.

    Attributes:
        text: of the config; empty for all response tokens.
        fields: the names of the fields that it reads.
        function: takes these fields, each a flat float tensor; returns bool, one per token.
        elementwise: whether one token's answer depends on no other token: True for an expression.
    """

    text: str
    fields: tuple[str, ...]
    function: Callable[..., Tensor]
    elementwise: bool = True


@lru_cache(maxsize=64)
def where_of(text: str) -> Where:
    """What an expression, or the import path of a user's own function, says.

    Args:
        text: not empty.

    Raises:
        ValueError: it is not an expression of this kind, or the function cannot be used. The message says why.
    """
    if is_import_path(text):
        function = load_function(text, "where")
        try:
            return Where(text, fields_read_by(function), function, elementwise=False)
        except ValueError as error:
            raise ValueError(f"where={text}: {error}") from None
    try:
        return _parsed(text)
    except ValueError as error:
        raise ValueError(f"where={text!r}: {error}. An expression looks like {EXAMPLE}") from None


def check_where(text: str) -> None:
    """Raise a ValueError for a text that is not empty, not an import path, and not an expression. Imports nothing."""
    if text and not is_import_path(text):
        where_of(text)


def _parsed(text: str) -> Where:
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text)} characters; write at most {LONGEST}, or your own function")
    if not text.isascii():  # Python reads other letters as the ASCII ones that they look like
        raise ValueError(f"{next(letter for letter in text if not letter.isascii())!r} is no ASCII character")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError("it cannot be read") from None
    if _depth(tree) > DEEPEST:
        raise ValueError(
            f"it is nested too deeply; nest at most {DEEPEST} parts in each other, or write your own function"
        )
    names: list[str] = []
    if not _check(tree, names):
        raise ValueError("it is a number, not a condition; compare it with another number")
    if not names:
        raise ValueError(f"it looks at no field; the fields are {', '.join(FIELDS)}")
    return Where(text, tuple(dict.fromkeys(names)), lambda **fields: _evaluate(tree, fields))


def _depth(tree: ast.expr) -> int:
    """How many operators and operands are nested in each other, counted without recursion."""
    level, depth = [tree], 0
    while level:
        children = [child for node in level for child in ast.iter_child_nodes(node)]
        level, depth = [child for child in children if isinstance(child, ast.expr)], depth + 1
    return depth


def _check(node: ast.AST, names: list[str]) -> bool:
    """Refuse everything that has no place in an expression. Collects the names. Returns whether it is a condition."""
    match node:
        case ast.Name(id=name):
            if name not in FIELDS:
                raise ValueError(f"there is no field {name!r}; the fields are {', '.join(FIELDS)}")
            names.append(name)
            return False
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            if abs(value) > HIGHEST:
                raise ValueError(f"{ast.unparse(node)[:40]} is too large a number")
            return False
        case ast.Compare(left=left, ops=ops, comparators=others):
            _check_all([left, *others], names, condition=False)
            _check_operators(ops)
            return True
        case ast.BoolOp(op=op, values=values):
            _check_all(values, names, condition=True)
            _check_operators([op])
            return True
        case ast.UnaryOp(op=op, operand=operand):
            condition = isinstance(op, ast.Not)
            _check_all([operand], names, condition)
            _check_operators([op])
            return condition
        case ast.BinOp(left=left, op=op, right=right):
            _check_all([left, right], names, condition=False)
            _check_operators([op])
            is_number = not any(isinstance(part, ast.Name) for part in ast.walk(right))
            if isinstance(op, ast.Div) and is_number and _evaluate(right, {}) == 0:
                raise ValueError(f"{ast.unparse(node)!r} divides by zero")
            return False
    raise ValueError(f"{ast.unparse(node)!r} is not allowed; use names of fields, numbers, comparisons, and, or, not")


def _check_all(nodes: list[Any], names: list[str], condition: bool) -> None:
    for node in nodes:
        if _check(node, names) != condition:
            needed = "a condition, such as 'entropy > 1'" if condition else "a number"
            raise ValueError(f"{ast.unparse(node)!r} stands where {needed} is needed")


def _check_operators(ops: list[Any]) -> None:
    for op in ops:
        if type(op) not in OPERATORS:
            raise ValueError(f"the operator {type(op).__name__} is not allowed")


def _evaluate(node: Any, fields: Mapping[str, Any]) -> Any:
    match node:
        case ast.Name(id=name):
            return fields[name]
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.Compare(left=left, ops=ops, comparators=others):
            sides = [_evaluate(side, fields) for side in (left, *others)]
            answers = [OPERATORS[type(op)](a, b) for op, a, b in zip(ops, sides, sides[1:], strict=False)]
            return _joined(operator.and_, answers)
        case ast.BoolOp(op=op, values=values):
            return _joined(OPERATORS[type(op)], [_evaluate(value, fields) for value in values])
        case ast.UnaryOp(op=op, operand=operand):
            value = _evaluate(operand, fields)
            return (not value) if isinstance(op, ast.Not) and isinstance(value, bool) else OPERATORS[type(op)](value)
        case ast.BinOp(left=left, op=op, right=right):
            return OPERATORS[type(op)](_evaluate(left, fields), _evaluate(right, fields))
    raise AssertionError(node)  # _check lets nothing else pass


def _joined(join: Callable[[Any, Any], Any], answers: list[Any]) -> Any:
    joined = answers[0]
    for answer in answers[1:]:
        joined = join(joined, answer)
    return joined
