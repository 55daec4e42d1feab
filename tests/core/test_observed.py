"""How a score compares with the one that is trained on, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.scored_rows import make_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_fork.core import observed
from entropy_fork.core.observed import overlap, rank_correlation, sample_of
from entropy_fork.core.responses import Responses, select_in_pools
from entropy_fork.core.rule import Selector


def average_ranks(values: list[float]) -> list[float]:
    """From 1, for the lowest; equal values get the mean of their ranks."""
    ranks = []
    for value in values:
        below = sum(other < value for other in values)
        same = sum(other == value for other in values)
        ranks.append(below + (same + 1) / 2)
    return ranks


def spearman(first: list[float], second: list[float]) -> float:
    """Pearson's correlation of the ranks."""
    ranks = [average_ranks(values) for values in (first, second)]
    means = [sum(values) / len(values) if values else 0.0 for values in ranks]
    pairs = list(zip(*ranks, strict=True))
    together = sum((a - means[0]) * (b - means[1]) for a, b in pairs)
    spread = math.sqrt(sum((a - means[0]) ** 2 for a, _ in pairs) * sum((b - means[1]) ** 2 for _, b in pairs))
    return together / spread if spread else math.nan


FEW = st.sampled_from([-1.0, 0.0, 0.0, 0.5, 2.0, 2.0, 7.0])


@given(st.lists(st.tuples(FEW, FEW), max_size=25))
@settings(max_examples=200)
def test_the_rank_correlation_is_spearmans(pairs: list[tuple[float, float]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found = rank_correlation(torch.tensor(first), torch.tensor(second))
    assert found == pytest.approx(spearman(first, second), abs=1e-12, nan_ok=True)
    if not math.isnan(found):
        assert -1 - 1e-12 <= found <= 1 + 1e-12


def test_the_rank_correlation_of_known_orders() -> None:
    rising = torch.arange(50.0)
    assert rank_correlation(rising, rising.exp()) == pytest.approx(1.0)
    assert rank_correlation(rising, -rising) == pytest.approx(-1.0)
    # the textbook's formula without ties: 1 - 6 Σd² / n(n² - 1), with the ranks 1 to 5 and 2, 1, 4, 3, 5
    assert rank_correlation(torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([2.0, 1, 4, 3, 5])) == pytest.approx(0.8)
    for nothing in (torch.zeros(0), torch.zeros(1), torch.ones(9)):
        assert math.isnan(rank_correlation(nothing, torch.arange(float(nothing.numel()))))
    assert rank_correlation(rising.double(), rising.bfloat16()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "selector", [Selector(0.3), Selector(0.3, "bottom"), Selector(0.3, "band", band_from=0.1), Selector(0.3, "random")]
)
@pytest.mark.parametrize("pool", [[0] * 6, [0, 1, 0, 1, 0, 1], list(range(6))])
def test_the_overlap_is_a_share_of_what_is_kept(selector: Selector, pool: list[int]) -> None:
    rows = make_batch(3, num_rows=6)
    tokens = rows.tokens()
    kept = (torch.rand(tokens.eligible.numel(), generator=torch.Generator().manual_seed(0)) < 0.4) & (
        tokens.eligible == 1
    )
    other = Responses(
        tokens.fields["entropy"], tokens.eligible, tokens.lengths, torch.tensor(rows.order), tokens.seeds,
        -tokens.fields["log_prob"],
    )  # fmt: skip
    plain = rows.all_tokens()
    same = total = 0
    for number in set(pool):
        members = {row for row in range(6) if pool[row] == number}
        candidates = [place for place, token in enumerate(plain) if token["row"] in members and token["eligible"]]
        sign = -1 if selector.select != "bottom" else 1
        candidates.sort(
            key=lambda place: (
                sign * -plain[place]["log_prob"],
                plain[place]["position"],
                rows.order[int(plain[place]["row"])],
            )
        )
        first, end = (math.ceil(share * len(candidates) - 1e-9) for share in (selector.band_from, 0.3))
        theirs = set(candidates[min(first, len(candidates) - 1) : max(end, first + 1)])
        same += sum(bool(kept[place]) for place in theirs)
        total += sum(bool(kept[place]) for place in candidates)
    assert overlap(other, kept, torch.tensor(pool), selector) == pytest.approx(same / total)


def test_the_overlap_with_itself_and_with_nothing() -> None:
    rows = make_batch(4, num_rows=5)
    tokens = rows.tokens()
    itself = Responses(
        tokens.fields["entropy"], tokens.eligible, tokens.lengths, torch.tensor(rows.order), tokens.seeds
    )
    pool = torch.zeros(5, dtype=torch.int64)
    kept, _ = select_in_pools(itself, pool, Selector(0.2))
    assert overlap(itself, kept, pool, Selector(0.2)) == 1.0
    assert math.isnan(overlap(itself, torch.zeros_like(kept), pool, Selector(0.2)))


def test_a_sample_is_of_eligible_tokens_and_does_not_depend_on_the_order_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = make_batch(5, num_rows=40)
    eligible, lengths, seeds = torch.cat(rows.masks), rows.lengths, torch.tensor(rows.seeds)
    assert torch.equal(sample_of(eligible, lengths, seeds), eligible.bool()), "few tokens are all taken"
    monkeypatch.setattr(observed, "SAMPLE", 30)
    sample = sample_of(eligible, lengths, seeds)
    stride = math.ceil(int(eligible.sum()) / 30)
    assert stride > 2
    assert not (sample & ~eligible.bool()).any()
    for row, mask, taken in zip(range(40), rows.masks, sample.split(lengths.tolist()), strict=True):
        expected = [bool(mask[place]) and (place - rows.seeds[row]) % stride == 0 for place in range(len(mask))]
        assert taken.tolist() == expected
    order = list(reversed(range(40)))
    turned = rows.take(order)
    other = sample_of(torch.cat(turned.masks), turned.lengths, torch.tensor(turned.seeds))
    by_row = sample.split(lengths.tolist())
    assert torch.equal(other, torch.cat([by_row[row] for row in order]))
