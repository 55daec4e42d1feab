"""Every built-in score against a plain restatement, token by token; and what finds a score by its name."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

import pytest
import torch
from helpers.scored_rows import make_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entropy_fork.core import scores
from entropy_fork.core.scores import FIELDS, SCORES, exact_mean, fields_read_by, score_of

#: one token: each field by name
Token = dict[str, float]


def mean_of(tokens: Sequence[Token], name: str) -> float:
    return math.fsum(token[name] for token in tokens) / len(tokens)


def rest(token: Token) -> float:
    """1 - p."""
    return 1.0 - math.exp(token["log_prob"])


#: Each score, restated plainly: takes a token, and all tokens of the mini-batch.
RESTATED: dict[str, Callable[[Token, Sequence[Token]], float]] = {
    "entropy": lambda t, _: t["entropy"],
    "surprisal": lambda t, _: -t["log_prob"],
    "covariance": lambda t, all_of_them: (
        (t["advantage"] - mean_of(all_of_them, "advantage")) * (t["log_prob"] - mean_of(all_of_them, "log_prob"))
    ),
    "gradient": lambda t, _: abs(t["advantage"]) * rest(t),
    "open_gradient": lambda t, _: abs(t["advantage"]) * t["entropy"],
    "gradient_norm": lambda t, _: (
        t["advantage"] ** 2 * max(0.0, 1.0 - 2.0 * math.exp(t["log_prob"]) + t["sum_pi_squared"])
    ),
    "rsi": lambda t, _: -t["log_prob"] / max(t["entropy"], 1e-6),
    "omega": lambda t, _: abs(t["advantage"] * rest(t) * (t["log_prob"] + t["entropy"])),
    "mismatch": lambda t, _: abs(t["log_prob"] - t["rollout_log_prob"]),
    "position": lambda t, _: t["position"],
    "random": lambda t, _: t["draw"],
}


def test_every_score_is_restated() -> None:
    assert RESTATED.keys() == SCORES.keys(), "a new score needs a line in RESTATED"


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("seed", range(4))
def test_a_score_is_its_formula(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the batch is cut into many pieces, with tokens outside of the mask, and with tokens of p = 1."""
    monkeypatch.setattr(scores, "PIECE", 7)
    batch = make_batch(seed, num_rows=9)
    values = batch.tokens().score(SCORES[name])
    expected = [RESTATED[name](token, batch.eligible_tokens()) for token in batch.all_tokens()]
    largest = max(abs(value) for value, token in zip(expected, batch.all_tokens(), strict=True) if token["eligible"])
    assert values.shape == (len(expected),)
    assert values.dtype == (torch.float64 if name == "random" else torch.float32)
    for value, wanted, token in zip(values.tolist(), expected, batch.all_tokens(), strict=True):
        if token["eligible"]:
            assert value == pytest.approx(wanted, rel=2e-6, abs=1e-6 * largest), token


def test_the_gradient_norm_is_that_of_the_logits() -> None:
    """Compared with the derivative of A ln p that torch computes, over all logits."""
    random = torch.Generator().manual_seed(3)
    for _ in range(20):
        logits = (torch.randn(6, generator=random).double() * 2).requires_grad_()
        advantage = torch.randn((), generator=random).double()
        log_probs = logits.log_softmax(-1)
        (advantage * log_probs[2]).backward()
        probabilities = log_probs.detach().exp()
        given_fields = {
            "advantage": advantage[None],
            "log_prob": log_probs.detach()[2:3],
            "sum_pi_squared": probabilities.square().sum()[None],
        }
        squared = SCORES["gradient_norm"].function(**given_fields)
        assert float(squared) == pytest.approx(float(logits.grad.square().sum()), rel=1e-9)
        own = SCORES["gradient"].function(**{k: v for k, v in given_fields.items() if k != "sum_pi_squared"})
        assert float(own) == pytest.approx(abs(float(logits.grad[2])), rel=1e-9)


def test_omega_is_the_change_of_the_entropy() -> None:
    """A step along the gradient of A ln p on the token's own logit changes H by -A(1 - p)·p(ln p + H), to first order.

    The score has no p: STEER's Ω is A/p_old · p(1 - p)(ln p + H), and at the policy that drew the token p is p_old.
    """
    logits = torch.tensor([0.3, -1.0, 1.4, 0.1], dtype=torch.float64)
    advantage, step = 1.7, 1e-6

    def entropy_of(values: Tensor) -> Tensor:
        return -(values.log_softmax(-1).exp() * values.log_softmax(-1)).sum()

    log_probs = logits.log_softmax(-1)
    p, log_p, before = float(log_probs[2].exp()), float(log_probs[2]), entropy_of(logits)
    moved = logits.clone()
    moved[2] += step * advantage * (1 - p)
    change = float(entropy_of(moved) - before) / step / p
    omega = SCORES["omega"].function(
        advantage=torch.tensor([advantage]), log_prob=torch.tensor([log_p]), entropy=before[None]
    )
    assert float(omega) == pytest.approx(abs(change), rel=1e-5)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SOME = st.one_of(
    st.lists(FLOATS, max_size=40),
    st.lists(st.floats(-1, 1, width=32), max_size=40),
    st.lists(st.sampled_from([2.0**-90, -(2.0**-90), 1.0, -1.0, 2.0**100, -(2.0**100), 2.0**-149, 0.0]), max_size=40),
)


@given(SOME, st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_the_exact_mean_is_exact_and_no_order_changes_its_last_bit(values: list[float], shuffle: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "PIECE", 3)
        mean = exact_mean(torch.tensor(values, dtype=torch.float32))
        largest = max(map(abs, values), default=0.0)
        assert abs(mean - (math.fsum(values) / len(values) if values else 0.0)) <= 1e-9 * largest
        shuffle.shuffle(values)  # type: ignore[attr-defined]
        other = exact_mean(torch.tensor(values, dtype=torch.float32))
    assert struct.pack("d", mean) == struct.pack("d", other)


def test_the_exact_mean_of_many_values() -> None:
    """A float32 sum of these would be off in the fourth digit, and another order would give another sum."""
    random = torch.Generator().manual_seed(1)
    values = torch.rand(300_000, generator=random) * 1e4 - 5e3
    values[::1000] *= 1e3
    expected = math.fsum(values.tolist()) / values.numel()
    means = {exact_mean(values), exact_mean(values.flip(0)), exact_mean(values.sort().values)}
    assert len(means) == 1
    assert means.pop() == pytest.approx(expected, abs=1e-9 * float(values.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_exact_mean_of_any_float_type(dtype: torch.dtype) -> None:
    values = torch.tensor([0.5, 1.25, -3.0, 1e-3], dtype=dtype)
    assert exact_mean(values) == pytest.approx(math.fsum(values.tolist()) / 4, abs=3e-9)
    assert exact_mean(values[:0]) == 0.0


def test_rest_keeps_its_digits_where_the_model_is_nearly_certain() -> None:
    """In float32, 1 - p of p = 1 - 1e-9 would be 0."""
    log_prob = torch.tensor([-1e-9])
    gradient = SCORES["gradient"].function(advantage=torch.ones(1), log_prob=log_prob)
    assert float(gradient) == pytest.approx(1e-9, rel=1e-5)


# --- names and functions ----------------------------------------------------------------------------------------------


def test_every_score_reads_known_fields_and_says_what_it_is() -> None:
    for name, score in SCORES.items():
        assert score.name == name
        assert score.fields
        assert set(score.fields) <= FIELDS.keys()
        assert score.sentence.startswith("The ")
        assert score.sentence.endswith(".")
        assert score.formula
        assert score.source
        assert not score.is_own
        assert score_of(name) is score


@pytest.mark.parametrize("name", ["", "entropies", "Entropy", "my_scores", "a b:c", "a:b:c", "a:", ":b", "a.b", "1a:b"])
def test_a_name_that_is_no_score_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"score must be one of entropy, surprisal, .*package.module:function, got "):
        score_of(name)


def test_parameters_are_fields() -> None:
    def good(log_prob: Tensor, entropy: Tensor, scale: float = 2.0) -> Tensor:
        return log_prob + scale * entropy

    def keyword(*, draw: Tensor) -> Tensor:
        return draw

    assert fields_read_by(good) == ("log_prob", "entropy")
    assert fields_read_by(keyword) == ("draw",)

    def unknown(log_prob: Tensor, entropies: Tensor) -> Tensor: ...

    def none() -> Tensor: ...

    def only_defaults(scale: float = 1.0) -> Tensor: ...

    def several(*entropy: Tensor) -> Tensor: ...

    def keywords(**fields: Tensor) -> Tensor: ...

    for function, wrong in {
        unknown: r"no field is named entropies",
        none: r"it has no parameter",
        only_defaults: r"it has no parameter",
        several: r"no field is named \*entropy",
        keywords: r"no field is named \*\*fields",
    }.items():
        with pytest.raises(ValueError, match=rf"{wrong}.*Name its parameters after fields: entropy, log_prob"):
            fields_read_by(function)
