"""From scores to factors, changed advantages and clip ranges: each map against its formula, token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_fork.core import factors as module
from entropy_fork.core.factors import changed_advantages, clip_bounds, factors_of
from entropy_fork.core.rule import MAPS, Rule

#: few values, so that ties are common
SCORES = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.0, 0.25, 1.0, 1.0, 3.5]), min_size=1, max_size=12)


def single(value: float) -> float:
    """Rounded to float32."""
    return float(np.float32(value))


def by_rank(values: list[float], value: float) -> float:
    """Where a value stands among all, from 0 to 1; equal values share the middle of their places."""
    places = [place for place, other in enumerate(sorted(values)) if other == value]
    return 0.5 if len(values) == 1 else sum(places) / len(places) / (len(values) - 1)


def by_range(values: list[float], value: float) -> float:
    lowest, highest = min(values), max(values)
    return 0.5 if highest == lowest else (value - lowest) / (highest - lowest)


#: Each map, restated plainly: from the scores of the kept tokens of a pool, one of them, and the keys, to its factor.
RESTATED = {
    "linear": lambda _, s, key: key["map_offset"] + key["map_slope"] * s,
    "exponential": lambda _, s, key: key["map_offset"] + key["map_slope"] * math.exp(key["map_rate"] * s),
    "clipped": lambda _, s, key: min(max(key["map_offset"] + key["map_slope"] * s, key["map_low"]), key["map_high"]),
    "range": lambda values, s, key: key["map_low"] + (key["map_high"] - key["map_low"]) * by_range(values, s),
    "rank": lambda values, s, key: key["map_low"] + (key["map_high"] - key["map_low"]) * by_rank(values, s),
    "dcpo": lambda *_: 1.0,
}

#: for each map, keys with which no factor is below 0
KEYS = {
    "linear": {"map_offset": 2.5, "map_slope": 0.75},
    "exponential": {"map_offset": 0.25, "map_slope": 1.5, "map_rate": -0.5},
    "clipped": {"map_offset": 0.5, "map_slope": 1.0, "map_low": 0.25, "map_high": 1.25},
    "range": {"map_low": 1.2, "map_high": 0.8},
    "rank": {"map_low": 0.25, "map_high": 2.0},
    "dcpo": {},
}


def test_every_map_is_restated() -> None:
    assert RESTATED.keys() == KEYS.keys() == set(MAPS), "a new map needs a line in RESTATED and one in KEYS"


def rule_of(name: str, **values: Any) -> Rule:
    use = {"use": "clip", "score": "surprisal"} if name == "dcpo" else {"use": "weight"}
    return Rule.of(map=name, **use, **KEYS[name], **values)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("normalize", ["pool", "none"])
@given(scores=SCORES, kept=st.data(), piece=st.sampled_from([3, 2**15]))
@settings(max_examples=60)
def test_a_factor_is_its_formula(name: str, normalize: str, scores: list[float], kept: Any, piece: int) -> None:
    """Tokens that are not kept have no factor and no say, whatever their score is."""
    is_kept = kept.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    of_kept = [score for score, keep in zip(scores, is_kept, strict=True) if keep]
    given_scores = [score if keep else math.nan for score, keep in zip(scores, is_kept, strict=True)]
    rule = rule_of(name, normalize=normalize)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "pieces", lambda count: (slice(i, min(i + piece, count)) for i in range(0, count, piece)))
        factors = factors_of(torch.tensor(given_scores), torch.tensor(is_kept), rule)
    assert factors.dtype == torch.float32
    assert factors.isnan().tolist() == [not keep for keep in is_kept]
    expected = [single(RESTATED[name](of_kept, score, KEYS[name])) for score in of_kept]
    if normalize == "pool" and rule.use == "weight" and expected and max(expected) > 0:
        mean = math.fsum(expected) / len(expected)
        expected = [value / mean for value in expected]
    assert factors[torch.tensor(is_kept)].tolist() == pytest.approx(expected, rel=3e-7)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_order_of_the_tokens_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(4)
    score = (torch.rand(5000, generator=random) * 3).to(dtype)
    kept = torch.rand(5000, generator=random) < 0.7
    expected = factors_of(score, kept, rule_of(name))
    for _ in range(3):
        order = torch.randperm(5000, generator=random)
        shuffled = factors_of(score[order], kept[order], rule_of(name))
        assert torch.equal(shuffled.nan_to_num(-1), expected[order].nan_to_num(-1))


def test_factors_of_a_pool_without_a_kept_token() -> None:
    for name in MAPS:
        none = torch.zeros(3, dtype=torch.bool)
        assert factors_of(torch.full((3,), math.nan), none, rule_of(name)).isnan().all()


def test_normalised_weights_average_one() -> None:
    score = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 9
    kept = score > 2
    factors = factors_of(score, kept, Rule.of(use="weight", map="linear"))
    assert float(factors[kept].double().mean()) == pytest.approx(1.0, abs=1e-6)
    # weights that are all 0 cannot
    assert factors_of(score, kept, Rule.of(use="weight", map="linear", map_slope=0.0))[kept].tolist() == [0.0] * int(
        kept.sum()
    )


def test_only_weights_are_normalised() -> None:
    score, kept = torch.tensor([1.0, 3.0]), torch.ones(2, dtype=torch.bool)
    assert factors_of(score, kept, Rule.of(use="weight")).tolist() == [0.5, 1.5]
    for use in ("advantage", "clip"):
        assert factors_of(score, kept, Rule.of(use=use)).tolist() == [1.0, 3.0]


def test_equal_scores_get_the_middle_of_a_range() -> None:
    score, kept = torch.full((4,), 0.7), torch.ones(4, dtype=torch.bool)
    for name in ("range", "rank"):
        rule = Rule.of(use="advantage", map=name, map_low=0.5, map_high=2.0)
        assert factors_of(score, kept, rule).tolist() == [1.25] * 4


@pytest.mark.parametrize("values", [{"use": "weight"}, {"use": "clip"}, {"use": "advantage", "combine": "multiply"}])
def test_a_factor_below_0_would_turn_the_loss_round(values: dict[str, str]) -> None:
    score, kept = torch.tensor([1.0, -1.0, -5.0]), torch.tensor([True, True, False])
    with pytest.raises(ValueError, match=r"map=linear gave a factor of -1: below 0 it would turn the loss of a token"):
        factors_of(score, kept, Rule.of(**values))
    added = factors_of(score, kept, Rule.of(use="advantage", combine="add"))
    assert added[:2].tolist() == [1.0, -1.0]


@pytest.mark.parametrize("rate", [1.0, -1.0])
def test_a_factor_that_is_not_finite_is_refused(rate: float) -> None:
    """float32 ends at 3e38, and exp(89) is above."""
    score, kept = torch.tensor([0.0, 89.0 * rate]), torch.ones(2, dtype=torch.bool)
    rule = Rule.of(use="weight", map="exponential", map_rate=rate)
    with pytest.raises(ValueError, match=r"map=exponential gave a factor of 1\.0 to inf; factors must be finite"):
        factors_of(score, kept, rule)


# --- advantages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["multiply", "add"])
@pytest.mark.parametrize("limit", [0.0, 0.5, 2.0])
@given(
    advantages=st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0]), min_size=1, max_size=8),
    factors=st.lists(st.sampled_from([math.nan, -1.0, 0.0, 0.25, 0.75, 3.0]), min_size=8, max_size=8),
)
@settings(max_examples=60)
def test_changed_advantages_are_the_formula(
    combine: str, limit: float, advantages: list[float], factors: list[float]
) -> None:
    given_advantages = torch.tensor(advantages)
    rule = Rule.of(use="advantage", combine=combine, add_limit=limit)
    changed = changed_advantages(given_advantages, torch.tensor(factors[: len(advantages)]), rule)
    for psi, factor, actual in zip(advantages, factors, changed.tolist(), strict=False):
        if math.isnan(factor):
            expected = psi
        elif combine == "multiply":
            expected = psi * factor
        else:
            expected = psi + (min(factor, abs(psi) / limit) if limit else factor)
        assert actual == single(expected)
    assert given_advantages.tolist() == advantages, "it returns new ones"


@given(psi=st.floats(-5, 5, width=32), factor=st.floats(0, 10, width=32))
@settings(max_examples=200)
def test_an_added_factor_of_at_most_half_the_advantage_keeps_its_sign(psi: float, factor: float) -> None:
    changed = changed_advantages(
        torch.tensor([psi]), torch.tensor([factor]), Rule.of(use="advantage", combine="add", add_limit=2.0)
    )
    assert np.sign(float(changed)) == np.sign(psi) or abs(psi) < 1e-44


# --- clip ranges ------------------------------------------------------------------------------------------------------


@given(
    factors=st.lists(st.sampled_from([math.nan, 0.0, 0.5, 1.0, 2.5]), min_size=1, max_size=8),
    low=st.sampled_from([0.1, 0.2, 0.16]),
    high=st.sampled_from([0.2, 0.28]),
)
@settings(max_examples=60)
def test_clip_ranges_are_verls_times_the_factor(factors: list[float], low: float, high: float) -> None:
    rule = Rule.of(use="clip", map="linear")
    lowest, highest = clip_bounds(torch.tensor(factors), torch.zeros(len(factors)), rule, low, high)
    assert lowest.dtype == highest.dtype == torch.float32
    for factor, bottom, top in zip(factors, lowest.tolist(), highest.tolist(), strict=True):
        of_verl = 1.0 if math.isnan(factor) else factor
        assert (bottom, top) == (single(1 - low * of_verl), single(1 + high * of_verl))


@given(
    probabilities=st.lists(st.floats(1e-12, 1.0), min_size=1, max_size=8),
    low=st.sampled_from([0.16, 0.2]),
    high=st.sampled_from([0.2, 0.28]),
)
@settings(max_examples=100)
def test_dcpos_ranges_are_its_equation(probabilities: list[float], low: float, high: float) -> None:
    """Its constraint is |(r - 1) r| p ≤ ε: at each end the two sides are equal, unless the end is cut off."""
    surprisal = torch.tensor([-math.log(p) for p in probabilities], dtype=torch.float32)
    rule = Rule.of(use="clip", score="surprisal", map="dcpo", top_ratio=1.0)
    ones = torch.ones(len(probabilities))
    lowest, highest = clip_bounds(ones, surprisal, rule, low, high)
    for s, bottom, top in zip(surprisal.tolist(), lowest.tolist(), highest.tolist(), strict=True):
        p = math.exp(-s)
        assert bottom == single(0.5 + 0.5 * math.sqrt(max(1 - 4 * low / p, 0.0)))
        assert top == single(min(0.5 + 0.5 * math.sqrt(1 + 4 * high / p), 10.0))
        if top < 10:
            assert (top - 1) * top * p == pytest.approx(high, rel=1e-5)
        if bottom > 0.5:
            assert (1 - bottom) * bottom * p == pytest.approx(low, rel=1e-4)
    unkept = clip_bounds(torch.full((1,), math.nan), torch.full((1,), math.nan), rule, low, high)
    assert [float(bound) for bound in unkept] == [single(1 - low), single(1 + high)]


@pytest.mark.parametrize("low", [0.0, 0.2])
def test_the_range_of_a_token_that_could_hardly_come(low: float) -> None:
    """exp(800) is infinite in float64; the range is still the one of the limit."""
    rule = Rule.of(use="clip", score="surprisal", map="dcpo", top_ratio=1.0)
    lowest, highest = clip_bounds(torch.ones(1), torch.tensor([800.0]), rule, low, low)
    assert float(lowest) == (0.5 if low else 1.0)
    assert float(highest) == (10.0 if low else 1.0)


# --- what a rule refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"use": "weight", "weight": "soft"}, "weight=soft belongs to use=mask"),
        ({"use": "clip", "pool": "micro_batch"}, "use=clip is written into the batch before verl cuts it"),
        ({"use": "advantage", "pool": "micro_batch"}, "use=advantage is written into the batch before verl cuts it"),
        ({"use": "weight", "map": "dcpo"}, "map=dcpo is a clip range made of the surprisal; write use=clip"),
        ({"use": "clip", "map": "dcpo"}, "map=dcpo is a clip range made of the surprisal; .*score=surprisal"),
        ({"use": "weight", "map": "clipped", "map_low": 2.0, "map_high": 1.0}, "map_low must be at most map_high"),
        ({"use": "weight", "map": "range", "map_low": -0.1}, "map_low and map_high must be at least 0, got -0.1"),
        ({"use": "weight", "map": "rank", "map_high": -0.1}, "map_low and map_high must be at least 0, got -0.1"),
        ({"use": "advantage", "combine": "add", "add_limit": -1.0}, "add_limit must be at least 0"),
        ({"use": "advantage", "combine": "add", "add_limit": math.nan}, "add_limit must be at least 0"),
        ({"use": "weight", "map": "wavy"}, "map must be one of linear, .*got 'wavy'"),
        ({"use": "weight", "normalize": "some"}, "normalize must be one of pool, none, got 'some'"),
        ({"use": "advantage", "combine": "divide"}, "combine must be one of multiply, add, got 'divide'"),
        ({"use": "bonus"}, "use must be one of mask, .*got 'bonus'"),
        ({"use": "weight", "map_slope": math.nan}, "map_slope must be a finite number, got nan"),
        ({"use": "weight", "map_offset": math.inf}, "map_offset must be a finite number, got inf"),
        ({"use": "weight", "map": "exponential", "map_rate": -math.inf}, "map_rate must be a finite number, got -inf"),
        ({"use": "weight", "map": "rank", "map_high": math.inf}, "map_high must be a finite number, got inf"),
        ({"use": "clip", "map": "clipped", "map_low": math.nan}, "map_low must be a finite number, got nan"),
        ({"use": "advantage", "entropy": "current"}, "use=advantage is written into the batch before the update"),
        ({"use": "clip", "entropy": "current"}, "use=clip is written into the batch before the update"),
        ({"control": "matched_random", "select": "random"}, "select=random has no score; write control=none"),
        ({"entropy": "current", "score": "position"}, "score=position does not look at the policy; write entropy=old"),
        ({"entropy": "current", "score": "gradient_norm"}, "needs sum_pi_squared of the log-prob pass"),
        ({"where": "entropy >"}, "where='entropy >': it cannot be read"),
        ({"score": "entropies"}, "score must be one of"),
    ],
)
def test_values_that_do_not_go_together(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Rule.of(**values)


def test_a_number_without_effect_is_not_looked_at() -> None:
    """A config may hold it from another map."""
    Rule.of(use="weight", map="linear", map_low=-1.0, map_rate=math.inf)
    Rule.of(use="mask", map_slope=math.nan)
    Rule.of(use="advantage", combine="add", map="range", map_low=-1.0)
