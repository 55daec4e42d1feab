"""``where``: expressions against Python on single tokens, and everything that must be refused."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entropy_fork.core.scores import FIELDS
from entropy_fork.core.scoring import Tokens
from entropy_fork.core.where import DEEPEST, LONGEST, OPERATORS, check_where, where_of

#: what one token has, as Python numbers that float32 can hold, and that give the same sums in float32
TOKEN = st.fixed_dictionaries({name: st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0]) for name in FIELDS})

#: an expression as text, and the same as a function of one token, made without looking at the text
Made = tuple[str, Callable[[dict[str, float]], Any]]


def _comparison(first: Made, rest: list[tuple[str, Made]]) -> Made:
    compare = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq}
    compare["!="] = operator.ne

    def is_true(token: dict[str, float]) -> bool:
        left = first[1](token)
        for sign, (_, value) in rest:
            right = value(token)
            if not compare[sign](left, right):
                return False
            left = right
        return True

    return f"{first[0]} " + " ".join(f"{sign} {text}" for sign, (text, _) in rest), is_true


def _number(depth: int) -> st.SearchStrategy[Made]:
    field = st.sampled_from(sorted(FIELDS)).map(lambda name: (name, lambda token: token[name]))
    constant = st.sampled_from([("0", 0.0), ("0.5", 0.5), ("2", 2.0), ("1e0", 1.0), ("0x3", 3.0)]).map(
        lambda pair: (pair[0], lambda _: pair[1])
    )
    if depth == 0:
        return st.one_of(field, constant)
    below = _number(depth - 1)
    signs = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    both = st.tuples(below, st.sampled_from(sorted(signs)), below).map(
        lambda made: (
            f"({made[0][0]} {made[1]} {made[2][0]})",
            lambda token: signs[made[1]](made[0][1](token), made[2][1](token)),
        )
    )
    half = below.map(lambda made: (f"({made[0]} / 2)", lambda token: made[1](token) / 2))
    signed = below.map(lambda made: (f"(-{made[0]})", lambda token: -made[1](token)))
    return st.one_of(field, constant, both, half, signed)


def _condition(depth: int) -> st.SearchStrategy[Made]:
    sign = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
    compared = st.builds(_comparison, _number(2), st.lists(st.tuples(sign, _number(1)), min_size=1, max_size=2))
    if depth == 0:
        return compared
    below = _condition(depth - 1)
    several = st.lists(below, min_size=2, max_size=3)
    conjunction = several.map(
        lambda made: (
            " and ".join(f"({text})" for text, _ in made),
            lambda token: all(is_true(token) for _, is_true in made),
        )
    )
    disjunction = several.map(
        lambda made: (
            " or ".join(f"({text})" for text, _ in made),
            lambda token: any(is_true(token) for _, is_true in made),
        )
    )
    negation = below.map(lambda made: (f"not ({made[0]})", lambda token: not made[1](token)))
    return st.one_of(compared, conjunction, disjunction, negation)


@given(_condition(2), st.lists(TOKEN, min_size=1, max_size=6))
@settings(max_examples=400)
def test_an_expression_says_what_python_says_of_each_token(made: Made, tokens: list[dict[str, float]]) -> None:
    text, is_true = made
    names = [name for name in FIELDS if name in text]
    if not names or len(text) > LONGEST:
        with pytest.raises(ValueError, match=r"looks at no field|characters"):
            where_of(text)
        return
    where = where_of(text)
    # a name may be a part of another one
    assert set(where.fields) <= set(names)
    fields = {name: torch.tensor([token[name] for token in tokens]) for name in where.fields}
    answers = where.function(**fields)
    assert answers.dtype == torch.bool
    assert answers.tolist() == [is_true(token) for token in tokens], text


def test_precedence_is_pythons() -> None:
    entropy, advantage = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    for text, expected in {
        "entropy > 1 or advantage > 0 and entropy > 0": [False, False, True, True],
        "not entropy > 1 and advantage > 0": [True, False, False, False],
        "entropy + 1 * 2 > 3": [False, False, True, True],
        "entropy - 1 - 1 > 0": [False, False, False, True],
        "0 < entropy < 3": [False, True, True, False],
        "-entropy < -1": [False, False, True, True],
        "6 / entropy / 2 > 1.5 and entropy > 0": [False, True, False, False],
        "+entropy == 2 and 1 < 2": [False, False, True, False],
        "2 < 1 or entropy != 0": [False, True, True, True],
        "not 2 < 1 and advantage <= 0": [False, True, False, True],
    }.items():
        where = where_of(text)
        given_fields = {"entropy": entropy, "advantage": advantage}
        answers = where.function(**{name: given_fields[name] for name in where.fields})
        assert answers.tolist() == expected, text


def tokens_of(**fields: Tensor) -> Tokens:
    """One response; its second token is outside of the response mask."""
    total = next(iter(fields.values())).numel()
    eligible = torch.ones(total, dtype=torch.int64)
    eligible[1] = 0
    one = torch.zeros(1, dtype=torch.int64)
    return Tokens(fields, eligible, torch.tensor([total]), one + 7, one)


def test_only_tokens_of_the_response_mask_can_be_in_a_pool() -> None:
    assert tokens_of(entropy=torch.ones(3)).where(where_of("entropy > 0")).tolist() == [True, False, True]


def test_fields_that_follow_from_the_rows_can_be_compared() -> None:
    tokens = tokens_of(entropy=torch.zeros(4))
    assert tokens.where(where_of("position >= 2")).tolist() == [False, False, True, True]
    assert tokens.where(where_of("length == 4 and position == 0")).tolist() == [True, False, False, False]
    half = tokens.where(where_of("draw < 0.5"))
    other = tokens.where(where_of("not draw < 0.5"))
    assert half.dtype == torch.bool
    assert (half ^ other).tolist() == [True, False, True, True]


#: text, and a part of the message. None of it may be understood as anything.
REFUSED = {
    # what would run
    "__import__('os').system('touch ran') > 0": "is not allowed",
    "print(entropy) > 0": "is not allowed",
    "entropy.sum() > 0": "is not allowed",
    "entropy.data > 0": "is not allowed",
    "entropy.__class__ > 0": "is not allowed",
    "entropy[0] > 0": "is not allowed",
    "(lambda: entropy)() > 0": "is not allowed",
    "(lambda: 1) > entropy": "is not allowed",
    "(x := entropy) > 0": "is not allowed",
    "[entropy for entropy in (1, 2)] > 0": "is not allowed",
    "any(x > 0 for x in entropy)": "is not allowed",
    "{entropy: 1} > 0": "is not allowed",
    "{entropy} > 0": "is not allowed",
    "f'{entropy}' > 0": "is not allowed",
    "entropy > 0 if advantage > 0 else entropy > 1": "is not allowed",
    "(yield) > entropy": "is not allowed",
    "entropy > 0, entropy > 1": "is not allowed",
    "*entropy > 0": "cannot be read",
    "await entropy > 0": "is not allowed",
    "import os": "cannot be read",
    "entropy = 1": "cannot be read",
    "entropy > 0; advantage > 0": "cannot be read",
    # operators that are none of ours
    "entropy ** 2 > 1": "the operator Pow is not allowed",
    "entropy > 9 ** 9 ** 9": "the operator Pow is not allowed",
    "entropy // 2 > 1": "the operator FloorDiv is not allowed",
    "entropy % 2 > 1": "the operator Mod is not allowed",
    "entropy @ entropy > 1": "the operator MatMult is not allowed",
    "entropy << 2 > 1": "the operator LShift is not allowed",
    "entropy & advantage > 1": "the operator BitAnd is not allowed",
    "~entropy > 1": "the operator Invert is not allowed",
    "entropy is advantage": "the operator Is is not allowed",
    "entropy in advantage": "the operator In is not allowed",
    # values that are none of ours
    "entropy > '1'": "is not allowed",
    "entropy > b'1'": "is not allowed",
    "entropy > True": "is not allowed",
    "entropy > None": "is not allowed",
    "entropy > ...": "is not allowed",
    "entropy > 1j": "is not allowed",
    "entropy > nan": "no field 'nan'",
    "entropy > inf": "no field 'inf'",
    "entropy > 1e31": "too large a number",
    "entropy > -1e999": "too large a number",
    "entropy > " + "9" * 400: "too large a number",
    # nothing to compare, or the wrong kind
    "": "cannot be read",
    "   ": "cannot be read",
    "entropy": "it is a number, not a condition",
    "1": "it is a number, not a condition",
    "-entropy": "it is a number, not a condition",
    "entropy >": "cannot be read",
    "> 1": "cannot be read",
    "entropy > > 1": "cannot be read",
    "entropy and advantage": "a condition, such as 'entropy > 1' is needed",
    "not entropy": "a condition, such as 'entropy > 1' is needed",
    "(entropy > 1) > 0": "a number is needed",
    "(entropy > 1) + 1 > 0": "a number is needed",
    "-(entropy > 1) > 0": "a number is needed",
    "1 < 2": "looks at no field",
    "entropies > 1": "no field 'entropies'",
    "torch > 1": "no field 'torch'",
    "__builtins__ > 1": "no field '__builtins__'",
    # division by nothing
    "entropy / 0 > 1": "divides by zero",
    "entropy / (1 - 1) > 1": "divides by zero",
    "entropy / (2 * (0.5 - 0.5)) > 1": "divides by zero",
    "1 / (1 / (1e30 * 1e30 * 1e30 * 1e30 * 1e30 * 1e30 * 1e30 * 1e30 * 1e30 * 1e30 * 1e30)) < entropy": "by zero",
    "entropy > 1 / 1e-400": "divides by zero",
    # letters that only look like a name, and characters that do not show
    "ｅｎｔｒｏｐｙ > 1": "is no ASCII",
    "entrοpy > 1": "is no ASCII",
    "entropy > １": "is no ASCII",
    "entropy\u200b > 1": "is no ASCII",
    "entropy\u202e > 1": "is no ASCII",
    "entropy > 1\x00": "cannot be read",
    "entropy > 1\nimport os": "cannot be read",
    "\ud800 > 1": "is no ASCII",
    # too long or too deep
    "entropy > " + "1 + " * 200 + "1": "characters",
    "not " * 100 + "entropy > 0": "nested too deeply",
    "-" * 400 + "entropy > 0": "nested too deeply",
    "(" * 150 + "entropy" + ")" * 150 + " > 0": None,
    "(" * 240 + "entropy" + ")" * 240 + " > 0": "cannot be read",
    "entropy" + " + 1" * 110 + " > 0": "nested too deeply",
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_expression_is_refused_in_one_line(text: str) -> None:
    """Also where little of Python's stack is left, as in a trainer that was called from deep inside a program."""
    expected = REFUSED[text]
    if expected is None:  # brackets alone nest nothing
        assert where_of(text).fields == ("entropy",)
        return

    def deeper(levels: int) -> None:
        if levels:
            deeper(levels - 1)
            return
        with pytest.raises(ValueError, match="where=") as error:
            where_of(text)
        message = str(error.value)
        assert expected in message
        assert len(message.splitlines()) == 1
        assert len(message) < 1500

    deeper(300)


def test_the_deepest_expression_that_is_allowed_can_be_computed() -> None:
    text = "-" * (DEEPEST - 2) + "entropy < 1"
    assert where_of(text).function(entropy=torch.tensor([0.5, 3.0])).tolist() == [True, False]
    with pytest.raises(ValueError, match="nested too deeply"):
        where_of("-" + text)


def test_all_that_ast_knows_is_refused_but_for_the_table() -> None:
    """Each operator of Python that is not in OPERATORS is refused, also one of a newer Python."""
    import ast

    for kind in (ast.operator, ast.unaryop, ast.cmpop, ast.boolop):
        for sub in kind.__subclasses__():
            left, right = ast.Name("entropy"), ast.Constant(2.0)
            tree: ast.expr
            if issubclass(sub, ast.operator):
                tree = ast.Compare(ast.BinOp(left, sub(), right), [ast.Gt()], [right])
            elif issubclass(sub, ast.cmpop):
                tree = ast.Compare(left, [sub()], [right])
            elif issubclass(sub, ast.boolop):
                tree = ast.BoolOp(sub(), [ast.Compare(left, [ast.Gt()], [right])] * 2)
            elif sub is ast.Not:
                tree = ast.UnaryOp(sub(), ast.Compare(left, [ast.Gt()], [right]))
            else:
                tree = ast.Compare(ast.UnaryOp(sub(), left), [ast.Gt()], [right])
            text = ast.unparse(ast.fix_missing_locations(ast.Expression(tree)))
            if sub in OPERATORS:
                assert where_of(text).fields == ("entropy",)
            else:
                with pytest.raises(ValueError, match=f"the operator {sub.__name__} is not allowed"):
                    where_of(text)


def test_an_empty_text_is_no_condition_and_an_import_path_is_not_imported() -> None:
    check_where("")
    check_where("no_such_module:function")
    with pytest.raises(
        ValueError, match=r"where=no_such_module:function: the module no_such_module cannot be imported"
    ):
        where_of("no_such_module:function")
    with pytest.raises(ValueError, match="no field 'entropi'"):
        check_where("entropi > 0")
