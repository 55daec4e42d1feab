"""One mini-batch on 1, 2 and 4 real gloo ranks: the same tokens with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Processes

from entropy_fork.core.batch import Rows, Rule, select_in_pools, weigh_mini_batches
from entropy_fork.core.ranks import Ranks, select_over_ranks
from entropy_fork.core.selection import Selector
from entropy_fork.core.statistics import Pool, Tally
from entropy_fork.core.weighting import TOKEN_MEAN, Counts, token_weights

TOP20 = Selector(0.2)
SELECTORS = st.sampled_from(
    [
        TOP20,
        Selector(1.0),
        Selector(0.03),
        Selector(0.8, "bottom"),
        Selector(0.2, "random"),
        Selector(0.5, "band", band_from=0.1),
        Selector(0.2, ties="threshold"),
    ]
)


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[int, Processes]]:
    worlds = {size: Processes(size) for size in (1, 2, 4)}
    yield worlds
    for world in worlds.values():
        world.close()


def make_rows(seed: int, num_rows: int, eligible: float = 0.8) -> Rows:
    """Few distinct entropies, so that ties are common, and rows of very different lengths."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 25, (num_rows,), generator=random)
    total = int(lengths.sum())
    return Rows(
        entropy=(torch.rand(total, generator=random) * 6).round() / 3,
        eligible=(torch.rand(total, generator=random) < eligible).long(),
        lengths=lengths,
        order=torch.randperm(num_rows, generator=random),
        seeds=torch.randint(0, 2**62, (num_rows,), generator=random),
    )


def take(rows: Rows, members: list[int]) -> Rows:
    """Some of the rows, in the order given."""
    entropy, eligible = (values.split(rows.lengths.tolist()) for values in (rows.entropy, rows.eligible))
    index = torch.tensor(members, dtype=torch.int64)
    return Rows(
        torch.cat([entropy[row] for row in members]),
        torch.cat([eligible[row] for row in members]),
        rows.lengths[index],
        rows.order[index],
        rows.seeds[index],
    )


def weights_on_rank(_: dict, rows: Rows, rule: Rule) -> tuple[list[torch.Tensor], Pool]:
    """What a rank does, on the rows that it has."""
    ranks = Ranks(torch.distributed.group.WORLD)
    kept, pool = select_over_ranks(rows, rule.selector, ranks)
    soft = rows.entropy if rule.weight == "soft" else None
    counts = ranks.sum_counts(Counts.of(kept, rows.eligible, soft))
    weights = token_weights(kept, rows.eligible, rows.lengths, rule.loss_agg_mode, rule.denominator, soft, counts)
    return list(weights.split(rows.lengths.tolist())), pool


@given(
    seed=st.integers(0, 10_000),
    selector=SELECTORS,
    mode=st.sampled_from([TOKEN_MEAN, "seq-mean-token-mean", "token-sum"]),
    denominator=st.sampled_from(["kept", "all"]),
    weight=st.sampled_from(["hard", "soft"]),
    size=st.sampled_from([1, 2, 4]),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=120, deadline=None)
def test_the_same_weights_on_any_number_of_ranks(
    worlds: dict[int, Processes], seed: int, selector: Selector, mode: str, denominator: str, weight: str, size: int,
    shuffle: Any,
) -> None:  # fmt: skip
    """Against one process with all rows: rows dealt out in another order, and padding rows among them."""
    rule = Rule(selector, loss_agg_mode=mode, denominator=denominator, weight=weight)
    rows = make_rows(seed, num_rows=8)
    one = torch.zeros(8, dtype=torch.int64)
    kept, pools = select_in_pools(rows, one, selector)
    expected = weigh_mini_batches(rows, kept, one, rule).split(rows.lengths.tolist())

    padded = Rows(
        torch.cat([rows.entropy, torch.full((4,), 9.0)]),
        torch.cat([rows.eligible, torch.zeros(4, dtype=torch.int64)]),
        torch.cat([rows.lengths, torch.ones(4, dtype=torch.int64)]),
        torch.cat([rows.order, torch.arange(100, 104)]),
        torch.cat([rows.seeds, torch.arange(4)]),
    )
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
            else:  # divided by a mean, whose last bits depend on the order of summation
                torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_with_other_numbers_of_tokens_and_with_none(worlds: dict[int, Processes], size: int) -> None:
    """The last rank has no eligible token, the others have very different numbers of them."""
    shares = [make_rows(rank, num_rows=1 + 3 * rank) for rank in range(size)]
    shares[-1] = replace(shares[-1], eligible=torch.zeros_like(shares[-1].eligible))
    answers = worlds[size](weights_on_rank, [(share, Rule(TOP20)) for share in shares])
    tokens = sum(int(share.eligible.sum()) for share in shares)
    kept = sum(int((row > 0).sum()) for weights, _ in answers for row in weights)
    assert kept == -(-tokens // 5)
    assert not any(row.any() for row in answers[-1][0])


def test_no_token_anywhere(worlds: dict[int, Processes]) -> None:
    """A mini-batch of padding rows alone, which verl's balancing can make."""
    nothing = make_rows(0, num_rows=3, eligible=0.0)
    for weights, pool in worlds[2](weights_on_rank, [(nothing, Rule(TOP20))] * 2):
        assert pool.num_kept == pool.num_tokens == 0
        assert not any(row.any() for row in weights)


def test_broken_entropies_of_one_rank_stop_all(worlds: dict[int, Processes]) -> None:
    """Every rank raises; none is left waiting in a collective."""
    good, bad = make_rows(0, 4, eligible=1.0), make_rows(1, 4, eligible=1.0)
    bad.entropy[3] = float("nan")
    with pytest.raises(RuntimeError) as error:
        worlds[2](weights_on_rank, [(good, Rule(TOP20)), (bad, Rule(TOP20))])
    assert str(error.value).count("ValueError: the entropy of a response token is not finite") == 2
    worlds[2](weights_on_rank, [(good, Rule(TOP20))] * 2)  # and the group is still in step


def merged_tally(_: dict, tally: Tally) -> Tally:
    return Ranks(torch.distributed.group.WORLD).merge_tallies(tally)


def test_tallies_of_ranks_add_up(worlds: dict[int, Processes]) -> None:
    """Counting on four ranks is counting once."""
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
