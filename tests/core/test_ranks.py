"""One mini-batch on 1, 2 and 4 real gloo ranks: the same tokens with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.processes import Processes
from helpers.rows import SELECTORS, TOP20, make_rows, take, weights_on_rank, with_padding_rows
from helpers.scored_rows import ScoredRows, chosen, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_fork.core.ranks import Ranks, choose_over_ranks
from entropy_fork.core.responses import choose, weigh_mini_batches
from entropy_fork.core.rule import TOKEN_MEAN, Rule, Selector
from entropy_fork.core.scores import SCORES
from entropy_fork.core.tally import Pool, Tally


@given(
    seed=st.integers(0, 10_000),
    selector=SELECTORS,
    mode=st.sampled_from([TOKEN_MEAN, "seq-mean-token-mean", "token-sum"]),
    denominator=st.sampled_from(["kept", "all"]),
    weight=st.sampled_from(["hard", "soft"]),
    size=st.sampled_from([1, 2, 4]),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=120)
def test_the_same_weights_on_any_number_of_ranks(
    worlds: dict[int, Processes], seed: int, selector: Selector, mode: str, denominator: str, weight: str, size: int,
    shuffle: Any,
) -> None:  # fmt: skip
    """The rows are dealt out in another order, with padding rows, and compared with one process that has all rows."""
    rule = Rule(selector, loss_agg_mode=mode, denominator=denominator, weight=weight)
    rows = make_rows(seed, num_rows=8)
    one = torch.zeros(8, dtype=torch.int64)
    choice = choose(rows, one, rule)
    expected, pools = weigh_mini_batches(rows, choice, one, rule).split(rows.lengths.tolist()), choice.pools

    padded = with_padding_rows(rows, 4)
    deal = list(range(12))
    shuffle.shuffle(deal)
    shares = [deal[rank::size] for rank in range(size)]
    answers = worlds[size](weights_on_rank, [(take(padded, share), rule) for share in shares])
    for share, (weights, pool) in zip(shares, answers, strict=True):
        assert pool == pools[0] or (pool.threshold != pool.threshold and pool.num_kept == pools[0].num_kept)
        for row, actual in zip(share, weights, strict=True):
            wanted = expected[row] if row < 8 else torch.zeros(1)
            if weight == "hard":
                assert torch.equal(actual, wanted)
            else:  # soft weights are divided by a mean, whose last bits depend on the order of summation
                torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=0)


def test_no_token_anywhere(worlds: dict[int, Processes]) -> None:
    """verl's balancing can make a mini-batch that has only padding rows."""
    nothing = make_rows(0, num_rows=3, eligible=0.0)
    for weights, pool in worlds[2](weights_on_rank, [(nothing, Rule(TOP20))] * 2):
        assert pool.num_kept == pool.num_tokens == 0
        assert not any(row.any() for row in weights)


def test_broken_entropies_of_one_rank_stop_all(worlds: dict[int, Processes]) -> None:
    """Every rank raises the error; none waits in a collective."""
    good, bad = make_rows(0, 4, eligible=1.0), make_rows(1, 4, eligible=1.0)
    bad.entropy[3] = float("nan")
    with pytest.raises(RuntimeError) as error:
        worlds[2](weights_on_rank, [(good, Rule(TOP20)), (bad, Rule(TOP20))])
    assert str(error.value).count("ValueError: the score of a response token is not finite") == 2
    worlds[2](weights_on_rank, [(good, Rule(TOP20))] * 2)  # the group still works


def chosen_on_rank(_: dict, rows: ScoredRows, rule: Rule) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The kept tokens of each row of a rank, and their factors; 0 for a token without one."""
    choice = choose_over_ranks(rows.responses(rule), rule, Ranks(torch.distributed.group.WORLD))
    factors = torch.zeros(choice.kept.shape) if choice.factors is None else choice.factors.nan_to_num(0.0)
    lengths = rows.lengths.tolist()
    return list(zip(choice.kept.split(lengths), factors.split(lengths), strict=True))


#: scores that look at one token at a time; for others see tests/verl/test_gradient_step.py
ALONE = [name for name, score in SCORES.items() if score.elementwise]


@given(
    seed=st.integers(0, 10_000),
    values=st.fixed_dictionaries(
        {
            "score": st.sampled_from(ALONE),
            "control": st.sampled_from(["none", "matched_random"]),
            "where": st.sampled_from(["", "advantage > 0", "draw < 0.5 or position == 0"]),
            "use": st.sampled_from(["mask", "weight", "advantage", "clip"]),
            "map": st.sampled_from(["rank", "range", "clipped"]),
            "outside": st.sampled_from(["drop", "keep"]),
            "select": st.sampled_from(["top", "bottom"]),
        }
    ),
    size=st.sampled_from([1, 2, 4]),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=100)
def test_any_score_and_use_on_any_number_of_ranks(
    worlds: dict[int, Processes], seed: int, values: dict[str, str], size: int, shuffle: Any
) -> None:
    """Tokens and factors are the same to the last bit, with the rows in another order and padding rows among them."""
    rows, rule = make_batch(seed, num_rows=8), Rule.of(top_ratio=0.4, **values)
    choice, _ = chosen(rows, rule)
    lengths = rows.lengths.tolist()
    kept = choice.kept.split(lengths)
    factors = (torch.zeros(sum(lengths)) if choice.factors is None else choice.factors.nan_to_num(0.0)).split(lengths)
    deal = list(range(12))
    shuffle.shuffle(deal)
    shares = [deal[rank::size] for rank in range(size)]
    padded = rows.with_padding(4)
    answers = worlds[size](chosen_on_rank, [(padded.take(share), rule) for share in shares])
    for share, answer in zip(shares, answers, strict=True):
        for row, (is_kept, factor) in zip(share, answer, strict=True):
            assert torch.equal(is_kept, kept[row] if row < 8 else torch.zeros(1, dtype=torch.bool))
            assert torch.equal(factor, factors[row] if row < 8 else torch.zeros(1))


def fails_on(_: dict, broken: list[int]) -> str:
    ranks = Ranks(torch.distributed.group.WORLD)
    try:
        with ranks.fail_together():
            if ranks.rank in broken:
                raise ValueError(f"my own, of rank {ranks.rank}")
    except ValueError as error:
        return str(error)
    return "none"


@pytest.mark.parametrize("broken", [[], [0], [3], [1, 2], [0, 1, 2, 3]])
def test_ranks_fail_together(worlds: dict[int, Processes], broken: list[int]) -> None:
    for rank, said in enumerate(worlds[4](fails_on, [(broken,)] * 4)):
        if rank in broken:
            assert said == f"my own, of rank {rank}"
        elif broken:
            assert said == f"rank {broken[0]} of 4 has failed in this mini-batch; see its own message"
        else:
            assert said == "none"


def merged_tally(_: dict, tally: Tally) -> Tally:
    return Ranks(torch.distributed.group.WORLD).merge_tallies(tally)


def test_tallies_of_ranks_add_up(worlds: dict[int, Processes]) -> None:
    """Counts of four ranks add up to the count of one process."""
    rows = make_rows(5, num_rows=8)
    advantages = torch.randn(rows.entropy.numel(), generator=torch.Generator().manual_seed(1))

    def tally_of(members: list[int]) -> Tally:
        part = take(rows, members)
        by_row = advantages.split(rows.lengths.tolist())
        kept = part.entropy * part.eligible > 1.0
        pools = [Pool(int(part.eligible.sum()), int(kept.sum()), float(members[0]))]
        values = torch.cat([by_row[row] for row in members])
        return Tally.of(kept, part.entropy, part.eligible, part.lengths, pools, values, kept)

    parts = [tally_of([rank, rank + 4]) for rank in range(4)]
    for merged in worlds[4](merged_tally, [(part,) for part in parts]):
        whole = tally_of([0, 4, 1, 5, 2, 6, 3, 7])
        for name in ("num_tokens", "num_kept", "positive_kept", "negative_tokens", "responses", "kept_by_both"):
            assert getattr(merged, name) == getattr(whole, name)
        assert merged.entropy_dropped == pytest.approx(whole.entropy_dropped)
        assert (merged.thresholds, merged.threshold_sum) == (4, 0 + 1 + 2 + 3)
        assert (merged.threshold_min, merged.threshold_max) == (0, 3)
        assert merged.pool_tokens_min == min(part.num_tokens for part in parts)
