"""Scores of a whole batch: windows, masks, what a user's own function may return, and its trial before a run."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.scored_rows import ScoredRows, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entropy_fork.core.scores import SCORES, Score, score_of
from entropy_fork.core.scoring import Tokens, needed_fields, try_out
from entropy_fork.core.where import Where, where_of

Function = Callable[..., object]


@pytest.fixture
def own() -> Iterator[Callable[..., Score]]:
    """Make a score of a function, by its import path."""
    module = types.ModuleType("own_scores_of_a_test")
    sys.modules[module.__name__] = module
    number = 0

    def score(function: Function) -> Score:
        nonlocal number
        number += 1
        setattr(module, f"f{number}", function)
        return score_of(f"{module.__name__}:f{number}")

    score_of.cache_clear()
    yield score
    score_of.cache_clear()
    del sys.modules[module.__name__]


def test_fields_of_a_row_are_counted_in_the_row() -> None:
    rows = make_batch(1, num_rows=5)
    tokens = rows.tokens()
    for name in ("position", "length", "draw"):
        assert tokens.field(name).tolist() == pytest.approx([token[name] for token in rows.all_tokens()], abs=0)
    assert ((tokens.field("draw") >= 0) & (tokens.field("draw") < 1)).all()


def test_a_field_that_the_batch_does_not_have() -> None:
    rows = make_batch(1, num_rows=3)
    fields = {name: values for name, values in rows.fields.items() if name != "rollout_log_prob"}
    with pytest.raises(ValueError, match=r"^score=mismatch: it reads rollout_log_prob, which this batch does not have"):
        ScoredRows(fields, rows.masks, rows.order, rows.seeds).tokens().score(SCORES["mismatch"])
    with pytest.raises(ValueError, match=r"^where=rollout_log_prob < 0: it reads rollout_log_prob"):
        ScoredRows(fields, rows.masks, rows.order, rows.seeds).tokens().where(where_of("rollout_log_prob < 0"))
    del fields["entropy"]
    with pytest.raises(ValueError, match=r"^score=entropy: it reads entropy, which this batch does not have"):
        ScoredRows(fields, rows.masks, rows.order, rows.seeds).tokens().score(SCORES["entropy"])


def test_what_a_selection_needs() -> None:
    where = where_of("advantage > 0 and position < 9 and entropy < 3")
    assert needed_fields(SCORES["rsi"], where) == ("log_prob", "entropy", "advantage")
    assert needed_fields(SCORES["random"], None) == ()


def seen_together(entropy: Tensor) -> Tensor:
    """How many tokens the function sees, less the token's place: a function that looks at other tokens."""
    return torch.full_like(entropy, entropy.numel()) + entropy.mean()


def test_a_function_sees_the_response_tokens_of_its_mini_batch_and_no_others(own: Callable[..., Score]) -> None:
    rows = make_batch(2, num_rows=8, eligible=0.6)
    rows.masks[2].zero_()
    window = torch.tensor([0, 1, 0, 1, 2, 2, 0, 3])
    rows.masks[7].zero_()  # a window without a token
    tokens = rows.tokens(window)
    scores = tokens.score(own(seen_together)).split(rows.lengths.tolist())
    plain = rows.all_tokens()
    for number in range(4):
        members = [row for row in range(8) if int(window[row]) == number]
        nats = [token["entropy"] for token in plain if token["row"] in members and token["eligible"]]
        for row in members:
            for score, eligible in zip(scores[row].tolist(), rows.masks[row].tolist(), strict=True):
                wanted = len(nats) + math.fsum(nats) / len(nats) if eligible else 0.0
                assert score == pytest.approx(wanted, rel=1e-5)


def test_the_means_of_the_covariance_are_those_of_its_own_mini_batch() -> None:
    rows = make_batch(3, num_rows=6)
    window = torch.tensor([0, 0, 0, 1, 1, 1])
    both = rows.tokens(window).score(SCORES["covariance"]).split(rows.lengths.tolist())
    for half in ([0, 1, 2], [3, 4, 5]):
        alone = rows.take(half).tokens().score(SCORES["covariance"])
        eligible = torch.cat([rows.masks[row] for row in half]).bool()
        assert torch.equal(torch.cat([both[row] for row in half])[eligible], alone[eligible])


def test_what_is_outside_of_the_mask_is_neither_checked_nor_counted() -> None:
    rows = make_batch(4, num_rows=5)
    rows.masks[1][:] = 0
    expected = {name: rows.tokens().score(score) for name, score in SCORES.items()}
    for values in rows.fields.values():
        values[1].fill_(math.nan)
    eligible = torch.cat(rows.masks).bool()
    for name, score in SCORES.items():
        assert torch.equal(rows.tokens().score(score)[eligible], expected[name][eligible]), name


@pytest.mark.parametrize("name", ["surprisal", "covariance", "rsi"])
def test_a_broken_field_names_the_score(name: str) -> None:
    rows = make_batch(5, num_rows=4, eligible=1.0)
    rows.fields["log_prob"][2][0] = math.nan
    with pytest.raises(ValueError, match=rf"^score={name}: it gave nan for a token; write one that is always finite"):
        rows.tokens().score(SCORES[name])


def test_a_batch_without_tokens(own: Callable[..., Score]) -> None:
    nothing = torch.zeros(0)
    none = torch.zeros(0, dtype=torch.int64)
    fields = dict.fromkeys(make_batch(0, 1).fields, nothing)
    tokens = Tokens(fields, none, none, none, none)
    for score in (*SCORES.values(), own(seen_together)):
        assert tokens.score(score).shape == (0,)
    for text in ("entropy > 0", "position > 0", "draw > 0"):
        assert tokens.where(where_of(text)).shape == (0,)


def test_half_precision_fields_give_float32() -> None:
    rows = make_batch(6, num_rows=4)
    rows.fields.update({name: [v.bfloat16() for v in values] for name, values in rows.fields.items()})
    for name, score in SCORES.items():
        assert rows.tokens().score(score).dtype == (torch.float64 if name == "random" else torch.float32)


# --- the trial before a run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORES)
def test_every_built_in_score_passes_its_trial(name: str) -> None:
    try_out(SCORES[name])


@pytest.mark.parametrize(
    "text", ["advantage > 0", "draw < 0.5 and entropy > 0.1", "position < length / 2", "log_prob < -20"]
)
def test_conditions_pass_their_trial(text: str) -> None:
    try_out(SCORES["entropy"], where_of(text))


def z_score(entropy: Tensor) -> Tensor:
    return (entropy - entropy.mean()) / (entropy.std(correction=0) + 1e-6)


def by_response(position: Tensor, length: Tensor) -> Tensor:
    return position / length


def in_double(log_prob: Tensor) -> Tensor:
    return log_prob.double().exp()


def with_a_gradient(entropy: Tensor) -> Tensor:
    return entropy.clone().requires_grad_() * 2


def drawn_by_the_run(draw: Tensor, scale: float = 2.0) -> Tensor:
    return draw * scale


@pytest.mark.parametrize("function", [z_score, by_response, in_double, with_a_gradient, drawn_by_the_run])
def test_a_good_function_of_ones_own(own: Callable[..., Score], function: Function) -> None:
    score = own(function)
    assert score.is_own
    assert not score.elementwise
    try_out(score)
    values = make_batch(7, num_rows=4).tokens().score(score)
    assert values.dtype == torch.float32
    assert not values.requires_grad


calls = 0


def another_at_each_call(entropy: Tensor) -> Tensor:
    global calls
    calls += 1
    return entropy + calls


def changing(entropy: Tensor) -> Tensor:
    return entropy.mul_(2)


def changing_at_the_second_call(entropy: Tensor, log_prob: Tensor) -> Tensor:
    log_prob.clamp_(min=-0.5)
    return entropy


BAD = {
    "random": (lambda entropy: torch.rand_like(entropy), "a second call gives the same tokens other values.*'draw'"),
    "counting": (another_at_each_call, "a second call gives the same tokens other values"),
    "changing": (changing, "it changes the fields that it is given; write to a copy"),
    "changing another": (changing_at_the_second_call, "it changes the fields that it is given; write to a copy"),
    "by place": (
        lambda entropy: entropy + torch.arange(entropy.numel()),
        "change with the order of the responses, which differs between runs",
    ),
    "by neighbour": (lambda entropy: entropy.roll(1), "change with the order of the responses"),
    "summing up": (lambda entropy: entropy.cumsum(0), "change with the order of the responses"),
    "too short": (lambda entropy: entropy[:-1], r"one value per token, shape \(34,\), and gave shape \(33,\)"),
    "one for all": (lambda entropy: entropy.mean(), r"shape \(34,\), and gave shape \(\)"),
    "a column": (lambda entropy: entropy[:, None], r"and gave shape \(34, 1\)"),
    "nothing": (lambda entropy: None, "and gave a NoneType"),
    "a list": (lambda entropy: entropy.tolist(), "and gave a list"),
    "an array": (lambda entropy: entropy.numpy(), "and gave a ndarray"),
    "whole numbers": (lambda entropy: entropy.long(), "must be of a float type .* and is of torch.int64"),
    "bool": (lambda entropy: entropy > 1, "must be of a float type .* and is of torch.bool"),
    "complex": (lambda entropy: entropy * 1j, "must be of a float type .* and is of torch.complex64"),
    "nan": (lambda entropy, log_prob: log_prob / entropy, "it gave (nan|-inf) for a token; write one that is always"),
    "infinite": (lambda log_prob: 1 / log_prob, "it gave -?inf for a token"),
    "of one token": (lambda entropy: entropy - entropy.std(), "it gave nan for a token"),
    "raising": (lambda entropy: 1 / 0, "it raised ZeroDivisionError: division by zero"),
    "missing": (lambda entropy: no_such_name, "it raised NameError: name 'no_such_name' is not defined"),  # noqa: F821
    "too large for float32": (
        lambda entropy: entropy.double() * 1e300 + 1e300,
        "it gave inf for a token; write one that is always finite",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_function_is_refused_in_one_line(own: Callable[..., Score], fault: str) -> None:
    function, message = BAD[fault]
    score = own(function)
    with pytest.raises(ValueError, match=rf"^score={score.name}: .*{message}") as error:
        try_out(score)
    assert len(str(error.value).splitlines()) == 1


BAD_CONDITIONS = {
    "floats": (lambda entropy: entropy, "must be of bool .* and is of torch.float32"),
    "too short": (lambda entropy: entropy[1:] > 0, r"and gave shape \(33,\)"),
    "by place": (lambda entropy: torch.arange(entropy.numel()) < 9, "change with the order of the responses"),
    "random": (lambda entropy: torch.rand_like(entropy) < 0.5, "a second call gives the same tokens other values"),
    "raising": (lambda entropy: entropy.no_such_method(), "it raised AttributeError: "),
    "changing": (lambda entropy: entropy.mul_(0) > 1, "it changes the fields that it is given"),
}


@pytest.mark.parametrize("fault", BAD_CONDITIONS)
def test_a_bad_condition_is_refused_in_one_line(fault: str) -> None:
    function, message = BAD_CONDITIONS[fault]
    where = Where("own:condition", ("entropy",), function, elementwise=False)
    with pytest.raises(ValueError, match=rf"^where=own:condition: .*{message}") as error:
        try_out(SCORES["entropy"], where)
    assert len(str(error.value).splitlines()) == 1


def test_a_function_that_raises_a_long_error_is_still_one_line(own: Callable[..., Score]) -> None:
    def raising(entropy: Tensor) -> Tensor:
        raise RuntimeError("first line\nsecond line\n\x1b[31mred\n" + "x" * 10_000)

    with pytest.raises(ValueError, match=r"it raised RuntimeError: first line second line") as error:
        try_out(own(raising))
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 1000
    assert "\x1b" not in str(error.value)


# --- names of functions -----------------------------------------------------------------------------------------------


def test_a_module_that_cannot_be_imported(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "broken_by_syntax": "def f(entropy:\n",
        "broken_by_raising": "raise RuntimeError('no licence')\n",
        "broken_by_import": "import no_such_package_at_all\n",
        "broken_by_leaving": "import sys\nsys.exit('usage: broken_by_leaving FILE')\n",
        "without_it": "f = 3\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)  # type: ignore[operator]
    monkeypatch.syspath_prepend(str(tmp_path))
    for path, message in {
        "broken_by_syntax:f": "the module broken_by_syntax cannot be imported .SyntaxError",
        "broken_by_raising:f": "cannot be imported .RuntimeError: no licence",
        "broken_by_import:f": "cannot be imported .ModuleNotFoundError: No module named 'no_such_package_at_all'",
        "broken_by_leaving:f": "cannot be imported .SystemExit: usage",
        "no_such_module_at_all:f": "cannot be imported .ModuleNotFoundError",
        "without_it:g": "the module without_it has no function g",
        "without_it:f": "the module without_it has no function f",
        "builtins:print": "Name its parameters after fields",
        "math:sqrt": "Name its parameters after fields",
        "torch:float32": "the module torch has no function float32",
    }.items():
        with pytest.raises(ValueError, match=rf"^score={path}: .*{message}") as error:
            score_of(path)
        assert len(str(error.value).splitlines()) == 1, path


def test_what_is_said_of_ones_own(own: Callable[..., Score]) -> None:
    def documented(entropy: Tensor) -> Tensor:
        """Half of the entropy.

        More.
        """
        return entropy / 2

    assert own(documented).sentence == "The user's own score: Half of the entropy."
    assert own(lambda entropy: entropy).sentence == "The user's own score: without a docstring."


@given(seed=st.integers(0, 1000))
@settings(max_examples=25)
def test_a_users_sum_of_floats_is_the_same_to_the_last_bit_in_any_order(seed: int) -> None:
    """A function sees the responses in the order of their seeds, so that even a plain mean does not depend on ranks."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 90, (40,), generator=random)
    entropy = torch.rand(int(lengths.sum()), generator=random) * 10 ** torch.randn(1, generator=random)
    seeds, window = torch.randint(0, 2**62, (40,), generator=random), torch.arange(40) % 2
    mean = Score("a:b", "The deviation.", "", "", lambda entropy: entropy - entropy.mean(), elementwise=False)

    def scored(rows: torch.Tensor) -> list[torch.Tensor]:
        parts = entropy.split(lengths.tolist())
        flat = torch.cat([parts[row] for row in rows])
        ours = torch.ones(flat.numel(), dtype=torch.bool)
        tokens = Tokens({"entropy": flat}, ours, lengths[rows], seeds[rows], window[rows])
        return list(tokens.score(mean).split(lengths[rows].tolist()))

    expected, order = scored(torch.arange(40)), torch.randperm(40, generator=random)
    for row, values in zip(order.tolist(), scored(order), strict=True):
        assert torch.equal(values, expected[row])
