"""Every score with every use, from the trainer's hook: what the workers are given does not depend on the layout."""

from __future__ import annotations

import itertools
import math
import sys
import types
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import torch
from helpers.scored_hook import run_scored
from helpers.scored_rows import ScoredRows, make_batch
from torch import Tensor

from entropy_fork.core.scores import SCORES, score_of
from entropy_fork.core.where import where_of
from entropy_fork.verl.policy_loss import CLIP_HIGHEST, CLIP_LOWEST
from entropy_fork.verl.queued_batch import FlatField

NUM_MINI_BATCHES, ROWS, PADDING = 2, 8, 4

#: every use, with maps under which no factor of any score is below 0
USES: dict[str, dict[str, Any]] = {
    "mask": {"use": "mask"},
    "weight": {"use": "weight", "map": "rank", "map_low": 0.25},
    "weight without normalisation": {"use": "weight", "map": "exponential", "map_rate": -0.1, "normalize": "none"},
    "advantage": {"use": "advantage", "map": "range", "map_low": 1.5, "map_high": 0.5},
    "added advantage": {"use": "advantage", "map": "linear", "map_slope": 0.4, "combine": "add"},
    "clip": {"use": "clip", "map": "clipped", "map_offset": 0.5, "map_slope": 0.25, "map_low": 0.5},
}
#: every score, and a user's own that looks at all tokens
OWN = "own_score_of_a_test:below_the_highest"
NAMES = (*SCORES, OWN)


def below_the_highest(entropy: Tensor, log_prob: Tensor) -> Tensor:
    """A function of all tokens whose result is exact in any order of them."""
    return (entropy - entropy.max()) * log_prob.min()


@pytest.fixture(autouse=True)
def own_score() -> Iterator[None]:
    module = types.ModuleType("own_score_of_a_test")
    module.below_the_highest = below_the_highest  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    yield
    del sys.modules[module.__name__]
    score_of.cache_clear()
    where_of.cache_clear()


def layout(num_ranks: int, random: Random) -> list[int]:
    """The rows in verl's layout: each rank holds its share of each mini-batch, one after another.

    Each mini-batch has its rows in another order, and padding rows among them (numbers from NUM_MINI_BATCHES * ROWS).
    """
    shares = []
    for number in range(NUM_MINI_BATCHES):
        members = list(range(number * ROWS, (number + 1) * ROWS))
        members += [NUM_MINI_BATCHES * ROWS + number * PADDING + row for row in range(PADDING)]
        random.shuffle(members)
        per_rank = len(members) // num_ranks
        shares.append([members[rank * per_rank : (rank + 1) * per_rank] for rank in range(num_ranks)])
    return [row for rank in range(num_ranks) for share in shares for row in share[rank]]


def written(
    monkeypatch: pytest.MonkeyPatch, rows: ScoredRows, order: list[int], values: dict[str, Any], **settings: Any
) -> tuple[dict[int, dict[str, Tensor]], dict[str, float]]:
    """What the workers get for each row: token weights, advantages and clip ranges; and the metrics."""
    fields, metrics = run_scored(monkeypatch, rows.take(order), order, values, **settings)
    names = ("rollout_is_weights", "advantages", CLIP_LOWEST, CLIP_HIGHEST)
    return {row: {name: fields[name][at] for name in names if name in fields} for at, row in enumerate(order)}, metrics


POOLS = {"mini_batch": NAMES, "batch": ("covariance", "omega", OWN), "response": ("covariance", "position")}


@pytest.mark.parametrize("control", ["none", "matched_random"])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("pool", "name"), [(pool, name) for pool, names in POOLS.items() for name in names])
def test_no_layout_changes_a_bit(monkeypatch: pytest.MonkeyPatch, pool: str, name: str, use: str, control: str) -> None:
    """One rank without padding rows, and 1, 2 and 4 ranks with padding rows and the rows in another order."""
    rows = make_batch(NAMES.index(name), num_rows=NUM_MINI_BATCHES * ROWS)
    where = "draw < 0.9 and not (advantage == 0 and entropy > 1.9)" if NAMES.index(name) % 2 else ""
    values = {"score": name, "pool": pool, "control": control, "top_ratio": 0.3, "where": where, **USES[use]}
    plain = list(range(len(rows)))
    expected, metrics = written(monkeypatch, rows, plain, values, mini_batch_rows=ROWS)
    assert len({tuple(of_row["rollout_is_weights"].tolist()) for of_row in expected.values()}) > 1

    padded = rows.with_padding(NUM_MINI_BATCHES * PADDING)
    random = Random(NAMES.index(name))
    for num_ranks in (1, 2, 4):
        order = layout(num_ranks, random)
        found, others = written(monkeypatch, padded, order, values, mini_batch_rows=ROWS + PADDING, num_ranks=num_ranks)
        for row in plain:
            assert found[row].keys() == expected[row].keys()
            for field, wanted in expected[row].items():
                assert torch.equal(found[row][field], wanted), (num_ranks, row, field)
        for row in range(len(rows), len(padded)):
            assert not found[row]["rollout_is_weights"].any()
        assert others.keys() == metrics.keys()
        for metric, value in metrics.items():  # means of sums, whose last bits depend on the order
            assert others[metric] == pytest.approx(value, rel=1e-9, nan_ok=True), metric


@pytest.mark.parametrize("name", NAMES)
def test_soft_weights_are_in_proportion_to_the_score(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """``weight=soft`` of any score; with ``control=matched_random`` a drawn token has the weight of a kept one."""
    rows = make_batch(9, num_rows=NUM_MINI_BATCHES * ROWS)
    plain = list(range(len(rows)))
    soft = {"score": name, "weight": "soft", "top_ratio": 0.4, "denominator": "all"}
    of_score, _ = written(monkeypatch, rows, plain, soft, mini_batch_rows=ROWS)
    scores = rows.tokens(torch.arange(len(rows)) // ROWS).score(score_of(name)).split(rows.lengths.tolist())
    for number in range(NUM_MINI_BATCHES):
        members = range(number * ROWS, (number + 1) * ROWS)
        kept = [
            (row, place)
            for row in members
            for place in of_score[row]["rollout_is_weights"].nonzero().flatten().tolist()
        ]
        assert kept
        mean = sum(float(scores[row][place]) for row, place in kept) / len(kept)
        positive = [(row, place) for row, place in kept if float(scores[row][place]) > 0]
        assert len(positive) == len(kept), "weights above 0 have scores above 0"
        if name == "random":  # its numbers follow from the names of the rows
            continue
        total = sum(float(of_score[row]["rollout_is_weights"][place]) for row, place in kept)
        for row, place in kept:
            share = float(of_score[row]["rollout_is_weights"][place]) / total
            assert share == pytest.approx(float(scores[row][place]) / (mean * len(kept)), rel=1e-5)

    drawn, _ = written(monkeypatch, rows, plain, soft | {"control": "matched_random"}, mini_batch_rows=ROWS)
    for row in plain:
        assert sorted(drawn[row]["rollout_is_weights"].tolist()) == sorted(of_score[row]["rollout_is_weights"].tolist())
    assert any(not torch.equal(drawn[row]["rollout_is_weights"], of_score[row]["rollout_is_weights"]) for row in plain)


def test_importance_weights_are_multiplied_and_advantages_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_batch(11, num_rows=16)
    plain = list(range(16))
    for use in USES:
        values = {"score": "surprisal", "top_ratio": 0.5, **USES[use]}
        alone, _ = written(monkeypatch, rows, plain, values)
        together, _ = written(monkeypatch, rows, plain, values, importance=0.5)
        for row in plain:
            assert torch.equal(together[row]["rollout_is_weights"], 0.5 * alone[row]["rollout_is_weights"])
            same = [name for name in alone[row] if name != "rollout_is_weights"]
            assert all(torch.equal(together[row][name], alone[row][name]) for name in same)
            if not use.endswith("advantage"):
                assert torch.equal(alone[row]["advantages"], rows.fields["advantage"][row])
            eligible = rows.masks[row].float()
            if use.endswith(("advantage", "clip")):
                assert torch.equal(alone[row]["rollout_is_weights"], eligible)


# --- what a run that names none of the new keys pays ------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [{}, {"select": "bottom", "top_ratio": 0.8}, {"select": "random"}, {"pool": "batch"}]
)
def test_a_run_without_the_new_keys_fetches_what_it_always_fetched(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    """Each fetch copies a field of the whole batch between processes. These four, once each, and who the rows are."""
    fetches: list[str] = []
    rows = make_batch(12, num_rows=16)
    run_scored(monkeypatch, rows, list(range(16)), values, fetches=fetches, importance=0.5)
    assert sorted(fetches) == ["advantages", "entropy", "index", "prompts", "response_mask", "rollout_is_weights"]


@pytest.mark.parametrize("name", NAMES)
def test_a_score_fetches_its_own_fields_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fetches: list[str] = []
    rows = make_batch(12, num_rows=16)
    run_scored(monkeypatch, rows, list(range(16)), {"score": name, "observe": ["surprisal", name]}, fetches=fetches)
    of_verl = {"log_prob": "old_log_probs", "rollout_log_prob": "rollout_log_probs", "sum_pi_squared": "sum_pi_squared"}
    own = {of_verl[field] for field in (*score_of(name).fields, "log_prob") if field in of_verl}
    assert sorted(fetches) == sorted({"advantages", "entropy", "index", "prompts", "response_mask"} | own)


# --- observe ----------------------------------------------------------------------------------------------------------


def restated_rank_correlation(first: list[float], second: list[float]) -> float:
    def ranks(values: list[float]) -> list[float]:
        return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]

    a, b = ranks(first), ranks(second)
    mean = sum(a) / len(a)
    return sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True)) / math.sqrt(
        sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)
    )


@pytest.mark.parametrize(
    "values",
    [{}, {"score": "surprisal", "pool": "batch"}, {"select": "bottom"}, {"where": "advantage > 0"}, {"use": "weight"}],
    ids=str,
)
def test_observed_scores_are_compared_with_the_one_that_is_trained_on(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    rows = make_batch(13, num_rows=16)
    plain = list(range(16))
    observed = ["omega", "rsi", "position"]
    everything = {"top_ratio": 0.3, **values}
    _, metrics = run_scored(monkeypatch, rows, plain, everything | {"observe": observed})
    tokens = rows.tokens(torch.arange(16) // 8)
    in_pools = tokens.where(where_of(values["where"])) if "where" in values else tokens.eligible.bool()
    own = tokens.score(score_of(values.get("score", "entropy")))
    kept = kept_by(monkeypatch, rows, everything)
    for name in observed:
        other = tokens.score(score_of(name))
        correlation = restated_rank_correlation(own[in_pools].tolist(), other[in_pools].tolist())
        assert metrics[f"entropy_fork/rank_correlation_with_{name}"] == pytest.approx(correlation, abs=1e-9)
        by_other = kept_by(monkeypatch, rows, everything | {"score": name})
        assert metrics[f"entropy_fork/overlap_with_{name}"] == pytest.approx(len(kept & by_other) / len(kept))
    assert metrics["entropy_fork/overlap_with_omega"] < 1


def kept_by(monkeypatch: pytest.MonkeyPatch, rows: ScoredRows, values: dict[str, Any]) -> set[tuple[int, int]]:
    """(row, place) of the tokens that a mask with these values keeps."""
    values = {name: value for name, value in values.items() if name != "use"}
    found, _ = written(monkeypatch, rows, list(range(len(rows))), values)
    return {
        (row, place)
        for row, of_row in found.items()
        for place in of_row["rollout_is_weights"].nonzero().flatten().tolist()
    }


def test_tokens_outside_of_the_pools_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``outside=keep`` nearly everything is kept, and no score has a say in that."""
    rows = make_batch(14, num_rows=16)
    values = {"where": "advantage > 0 and entropy < 1.5", "outside": "keep", "top_ratio": 0.3}
    _, kept = run_scored(monkeypatch, rows, list(range(16)), values | {"observe": ["entropy", "surprisal"]})
    _, dropped = run_scored(
        monkeypatch, rows, list(range(16)), values | {"observe": ["entropy", "surprisal"], "outside": "drop"}
    )
    assert kept["entropy_fork/kept_ratio"] > dropped["entropy_fork/kept_ratio"]
    for name in ("overlap_with_entropy", "overlap_with_surprisal", "rank_correlation_with_surprisal"):
        assert kept[f"entropy_fork/{name}"] == dropped[f"entropy_fork/{name}"], name
    assert kept["entropy_fork/overlap_with_entropy"] == 1.0


def test_matched_random_keeps_as_many_per_response(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_batch(15, num_rows=16)
    for name, where in itertools.product(("entropy", "omega"), ("", "advantage > 0")):
        values = {"score": name, "where": where, "top_ratio": 0.4}
        chosen = kept_by(monkeypatch, rows, values)
        shuffled = kept_by(monkeypatch, rows, values | {"control": "matched_random"})
        assert chosen != shuffled
        for row in range(16):
            assert sum(at == row for at, _ in chosen) == sum(at == row for at, _ in shuffled)
        eligible = {(row, place) for row in range(16) for place in rows.masks[row].nonzero().flatten().tolist()}
        assert shuffled <= eligible


def test_a_field_of_whole_rows_is_cut_to_the_responses() -> None:
    """verl's worker cuts it by ``response_from_nested``."""
    from verl.workers.utils.padding import response_from_nested

    prompts, lengths = [2, 1, 4], torch.tensor([3, 1, 5])
    whole = [
        torch.arange(float(p + int(n))) + 100 * row for row, (p, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    nested = torch.nested.as_nested_tensor(whole, layout=torch.jagged)
    cut = FlatField(nested.values(), nested.offsets()).at_responses(offsets)
    expected = [row[p - 1 : -1] for row, p in zip(whole, prompts, strict=True)]
    assert torch.equal(cut.values, torch.cat(expected))
    mask = torch.nested.as_nested_tensor([torch.ones(int(n)) for n in lengths], layout=torch.jagged)
    assert torch.equal(response_from_nested(nested, mask).values(), cut.values)
    assert torch.equal(cut.offsets, offsets)
