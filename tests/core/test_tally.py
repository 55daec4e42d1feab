"""The reported numbers, compared with plain Python over single tokens: tallies, and PPO's metrics on kept tokens."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.metric import AggregationType, Metric, reduce_metrics
from verl.workers.config import FSDPActorConfig

from entropy_fork.core.tally import Pool, Tally
from entropy_fork.verl.gradient_step import tally_of
from entropy_fork.verl.policy_loss import kept_means, kept_sums, weights_written

CLIP_LOW, CLIP_HIGH = 0.2, 0.28


@dataclass
class Token:
    row: int
    eligible: bool
    kept: bool
    kept_by_other: bool
    entropy: float
    advantage: float


@dataclass
class Part:
    """A micro-batch, or a rank's part of one: tokens row by row, pools, and some rows without a token."""

    tokens: list[Token]
    num_rows: int
    pools: list[Pool]


@st.composite
def parts(draw: st.DrawFn) -> Part:
    tokens = []
    num_rows = draw(st.integers(0, 4))
    for row in range(num_rows):
        for _ in range(draw(st.integers(0, 5))):
            eligible = draw(st.booleans())
            tokens.append(
                Token(
                    row,
                    eligible,
                    kept=eligible and draw(st.booleans()),
                    kept_by_other=eligible and draw(st.booleans()),
                    entropy=draw(st.sampled_from([0.0, 0.25, 1.5, 3.0])) if eligible else math.nan,
                    advantage=draw(st.sampled_from([-1.5, 0.0, 0.5])),
                )
            )
    threshold = st.sampled_from([math.nan, 0.25, 1.5, 3.0])
    pool = st.builds(lambda n, tau: Pool(n, n // 2, tau if n else math.nan), st.integers(0, 9), threshold)
    return Part(tokens, num_rows, draw(st.lists(pool, max_size=3)))


def tally(part: Part, with_advantages: bool = True, with_other: bool = True) -> Tally:
    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([getattr(token, name) for token in part.tokens], dtype=dtype)

    lengths = [sum(token.row == row for token in part.tokens) for row in range(part.num_rows)]
    return Tally.of(
        column("kept", torch.bool),
        column("entropy", torch.float32),
        column("eligible", torch.int64),
        torch.tensor(lengths, dtype=torch.int64),
        part.pools,
        column("advantage", torch.float32) if with_advantages else None,
        column("kept_by_other", torch.bool) if with_other else None,
    )


def restated(some: list[Part], with_advantages: bool = True, with_other: bool = True) -> dict[str, float]:
    """Every metric, computed from the tokens by its definition."""
    eligible = [token for part in some for token in part.tokens if token.eligible]
    kept = [token for token in eligible if token.kept]
    dropped = [token for token in eligible if not token.kept]
    if not eligible:
        return {}
    responses = {(number, token.row) for number, part in enumerate(some) for token in part.tokens if token.eligible}
    with_kept = {(number, token.row) for number, part in enumerate(some) for token in part.tokens if token.kept}
    expected = {
        "kept_ratio": len(kept) / len(eligible),
        "kept_tokens": len(kept),
        "responses_without_kept": len(responses - with_kept) / len(responses),
    }
    pools = [pool for part in some for pool in part.pools if pool.num_tokens > 0]
    if pools:
        expected["pool_tokens"] = min(pool.num_tokens for pool in pools)
    if thresholds := [pool.threshold for pool in pools if not math.isnan(pool.threshold)]:
        expected["threshold"] = sum(thresholds) / len(thresholds)
        expected["threshold_min"], expected["threshold_max"] = min(thresholds), max(thresholds)
    for name, side in (("entropy_kept", kept), ("entropy_dropped", dropped)):
        if side:
            expected[name] = sum(token.entropy for token in side) / len(side)
    for name, sign in (("kept_ratio_positive", 1), ("kept_ratio_negative", -1)):
        side = [token for token in eligible if token.advantage * sign > 0]
        if side and with_advantages:
            expected[name] = sum(token.kept for token in side) / len(side)
    if kept and with_other:
        expected["overlap_with_old"] = sum(token.kept_by_other for token in kept) / len(kept)
    return expected


@given(st.lists(parts(), max_size=4), st.booleans(), st.booleans())
@settings(max_examples=400)
def test_tallies_say_what_the_tokens_say(some: list[Part], with_advantages: bool, with_other: bool) -> None:
    """For one part, and for several parts merged into one tally."""
    tallies = [tally(part, with_advantages, with_other) for part in some]
    for part, its in zip(some, tallies, strict=True):
        assert its.metrics() == pytest.approx(restated([part], with_advantages, with_other))
    assert Tally.merged(tallies).metrics() == pytest.approx(restated(some, with_advantages, with_other))


def test_what_has_no_value_is_left_out() -> None:
    """Without tokens there is no metric. Without dropped tokens, their metrics are missing, and so on."""
    assert Tally().metrics() == {}
    assert tally(Part([Token(0, False, False, False, math.nan, 1.0)], 1, [Pool(0, 0, math.nan)])).metrics() == {}
    kept = Token(0, eligible=True, kept=True, kept_by_other=False, entropy=2.0, advantage=1.0)
    assert tally(Part([kept], 1, []), with_other=False).metrics() == {
        "kept_ratio": 1.0,
        "kept_tokens": 1.0,
        "responses_without_kept": 0.0,
        "entropy_kept": 2.0,
        "kept_ratio_positive": 1.0,
    }


@given(st.lists(parts(), min_size=1, max_size=4))
@settings(max_examples=200)
def test_the_average_that_verl_takes_over_mini_batches_loses_nothing(mini_batches: list[Part]) -> None:
    """verl reduces by name: the minimum if the name has ``min`` in it, the maximum if ``max``, else the mean."""
    steps = [asdict(tally(part)) for part in mini_batches]
    collected: dict[str, Any] = {f"entropy_fork/{name}": [step[name] for step in steps] for name in steps[0]}
    of_the_step = tally_of(reduce_metrics(collected), len(mini_batches))
    assert of_the_step.metrics() == pytest.approx(restated(mini_batches))


@dataclass
class MicroBatch:
    old_log_prob: Tensor
    log_prob: Tensor
    advantages: Tensor
    mask: Tensor
    kept: Tensor


@st.composite
def micro_batches(draw: st.DrawFn) -> MicroBatch:
    """Random ratios inside the clip range, outside it, and beyond the ±20 nats to which verl cuts them."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 6))

    def numbers(values: list[float]) -> Tensor:
        size = shape[0] * shape[1]
        return torch.tensor(draw(st.lists(st.sampled_from(values), min_size=size, max_size=size))).view(shape)

    old_log_prob = numbers([-3.0, -1.0, -0.125])
    mask = numbers([0.0, 1.0, 1.0]).bool()
    mask[0, 0] = True
    return MicroBatch(
        old_log_prob,
        log_prob=old_log_prob + numbers([-30.0, -1.0, -0.25, -0.125, 0.0, 0.125, 0.24, 0.26, 1.0, 30.0]),
        advantages=numbers([-2.0, -0.5, 0.0, 1.0]),
        mask=mask,
        kept=mask & numbers([0.0, 1.0]).bool(),
    )


def actor_config() -> FSDPActorConfig:
    return FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_mini_batch_size=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=CLIP_LOW,
        clip_ratio_high=CLIP_HIGH,
    )


def loss_metrics(batch: MicroBatch, loss_mode: str, weights: Tensor) -> dict[str, float]:
    with weights_written():
        _, metrics = get_policy_loss_fn(loss_mode)(
            old_log_prob=batch.old_log_prob,
            log_prob=batch.log_prob,
            advantages=batch.advantages,
            response_mask=batch.mask,
            config=actor_config(),
            rollout_is_weights=weights,
        )
    return metrics


def restated_means(some: list[MicroBatch]) -> dict[str, float]:
    """PPO's clipped share, and the mean of ``old_log_prob - log_prob``, over the kept tokens of all micro-batches."""
    clipped, kl = [], []
    for batch in some:
        columns = (batch.old_log_prob, batch.log_prob, batch.advantages, batch.kept)
        for old, new, advantage, kept in zip(*(column.flatten().tolist() for column in columns), strict=True):
            if kept:
                log_ratio = min(20.0, max(-20.0, new - old))
                ratio = math.exp(log_ratio)
                clipped.append(min(max(ratio, 1 - CLIP_LOW), 1 + CLIP_HIGH) * advantage < ratio * advantage)
                kl.append(-log_ratio)
    if not clipped:
        return {}
    return {"entropy_fork/pg_clipfrac": sum(clipped) / len(clipped), "entropy_fork/ppo_kl": sum(kl) / len(kl)}


@given(micro_batches())
@settings(max_examples=200)
def test_with_everything_kept_they_are_verls_own(batch: MicroBatch) -> None:
    sums = kept_sums(batch.old_log_prob, batch.log_prob, batch.advantages, batch.mask, actor_config())
    verls = loss_metrics(batch, "vanilla", batch.mask.float())
    assert kept_means(sums) == pytest.approx(
        {"entropy_fork/pg_clipfrac": verls["actor/pg_clipfrac"], "entropy_fork/ppo_kl": verls["actor/ppo_kl"]},
        rel=1e-5,
        abs=1e-6,
    )


@given(st.lists(micro_batches(), min_size=1, max_size=4))
@settings(max_examples=200)
def test_with_a_mask_they_are_those_of_the_kept_tokens_in_micro_batches_of_any_size(some: list[MicroBatch]) -> None:
    """verl averages over the micro-batches of a mini-batch, which would be wrong for means but is right for sums."""
    collected: dict[str, Metric] = {}
    for batch in some:
        # the weight of a kept token is not 1, and it is also set outside the response mask
        metrics = loss_metrics(batch, "entropy_fork/vanilla", 2.5 * batch.kept + 7.0 * ~batch.mask)
        for name, metric in Metric.from_dict(metrics, AggregationType.MEAN).items():
            collected.setdefault(name, metric.init_list()).append(metric)
    averaged = {name: Metric.aggregate_dp([metric]) for name, metric in collected.items()}
    assert kept_means(averaged) == pytest.approx(restated_means(some), rel=1e-5, abs=1e-6)


@given(st.data(), st.integers(0, 30))
@settings(max_examples=150)
def test_factors_and_tokens_outside_of_the_pools_are_counted(data: st.DataObject, number: int) -> None:
    """One tally of all tokens says the same as the tallies of two halves together."""
    tokens = [
        (
            eligible := data.draw(st.booleans()),
            inside := eligible and data.draw(st.booleans()),
            inside and data.draw(st.booleans()),
            data.draw(st.sampled_from([0.25, 0.5, 3.0])),
        )
        for _ in range(number)
    ]

    def of(some: list[tuple[bool, bool, bool, float]]) -> Tally:
        eligible, inside, kept = (torch.tensor([token[i] for token in some], dtype=torch.bool) for i in range(3))
        factors = torch.tensor([token[3] if token[2] else math.nan for token in some], dtype=torch.float32)
        lengths = torch.tensor([len(some)])
        return Tally.of(kept, torch.zeros(len(some)), eligible, lengths, [], in_pools=inside, factors=factors)

    factors = [token[3] for token in tokens if token[2]]
    num_tokens = sum(token[0] for token in tokens)
    outside = sum(token[0] and not token[1] for token in tokens)
    expected: dict[str, float] = {}
    if factors:
        expected = {
            "factor_mean": sum(factors) / len(factors), "factor_min": min(factors), "factor_max": max(factors)
        }  # fmt: skip
    if outside:
        expected["outside_ratio"] = outside / num_tokens
    for tally_of_all in (of(tokens), Tally.merged([of(tokens[: number // 2]), of(tokens[number // 2 :])])):
        metrics = tally_of_all.metrics()
        ours = {name: value for name, value in metrics.items() if name.startswith(("factor", "outside"))}
        assert ours == pytest.approx(expected)
