"""The selection, compared with a slow restatement, and its invariants on random batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import ROUND_CEILING, Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_fork.core import selection
from entropy_fork.core.randomness import uniform_numbers
from entropy_fork.core.rule import SELECTS, Selector
from entropy_fork.core.selection import exact_count, kept_count, ranks_kept, select_tokens

TOP20 = Selector(0.2)
RATIOS = st.one_of(st.sampled_from([0.01, 0.07, 0.1, 0.2, 0.3, 0.5, 0.9, 1.0]), st.floats(0.001, 1.0))


@st.composite
def pools(draw: st.DrawFn) -> tuple[list[list[float]], list[list[int]]]:
    """Rows of entropies with few distinct values, so that ties are common, and masks with holes and empty rows."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    values = st.sampled_from([0.0, 0.0, 0.001, 0.5, 0.5, 1.25, 2.0, 3.5])
    rows = [draw(st.lists(values, min_size=n, max_size=n)) for n in lengths]
    masks = [draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)) for n in lengths]
    return rows, masks


def in_order(rows: list[list[float]], masks: list[list[int]], sign: int = -1) -> list[tuple[int, int]]:
    """Every eligible token as (row, position), sorted by (entropy down, position up, row up)."""
    tokens = [
        (sign * entropy, position, row)
        for row, (entropies, mask) in enumerate(zip(rows, masks, strict=True))
        for position, (entropy, eligible) in enumerate(zip(entropies, mask, strict=True))
        if eligible
    ]
    return [(row, position) for _, position, row in sorted(tokens)]


def restated(rows: list[list[float]], masks: list[list[int]], ratio: float, sign: int = -1) -> set[tuple[int, int]]:
    """The first ceil(ρN) of the sorted tokens."""
    tokens = in_order(rows, masks, sign)
    count = int((Decimal(repr(ratio)) * len(tokens)).to_integral_value(ROUND_CEILING))
    return set(tokens[: max(1, count)])


def flat(rows: list[list[float]], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=dtype)


def select(
    rows: list[list[float]],
    masks: list[list[int]],
    ratio: float,
    row_order: list[int] | None = None,
    row_seeds: list[int] | None = None,
    **settings: Any,
) -> tuple[set[tuple[int, int]], float]:
    lengths = torch.tensor([len(row) for row in rows])
    order = None if row_order is None else torch.tensor(row_order)
    selector = Selector(ratio, **settings)
    seeds = torch.arange(len(rows)) if row_seeds is None else torch.tensor(row_seeds)
    selection = select_tokens(flat(rows), flat(masks, torch.int64), lengths, selector, order, seeds)
    kept = {
        (row, position)
        for row, values in enumerate(selection.kept.split(lengths.tolist()))
        for position in values.nonzero().squeeze(1).tolist()
    }
    return kept, selection.threshold


@given(pools(), RATIOS)
@settings(max_examples=300)
def test_equals_the_sorted_restatement(pool: tuple[list[list[float]], list[list[int]]], ratio: float) -> None:
    rows, masks = pool
    kept, threshold = select(rows, masks, ratio)
    assert kept == restated(rows, masks, ratio)
    if kept:
        assert threshold == min(torch.tensor(rows[row][position]).item() for row, position in kept)
    else:
        assert math.isnan(threshold)


BANDS = st.sampled_from([(0.1, 0.2), (0.1, 0.6), (0.25, 0.8), (0.5, 0.6), (0.5, 1.0), (0.9, 1.0)])


def restated_band(rows: list[list[float]], masks: list[list[int]], band_from: float, ratio: float) -> tuple[set, set]:
    """The upper top, and the lower top without the upper one. If that is empty: the token right below the upper top."""
    tokens = in_order(rows, masks)
    above = restated(rows, masks, band_from)
    if len(above) == len(tokens):
        above -= set(tokens[-1:])
    band = restated(rows, masks, ratio) - above
    return band or set([token for token in tokens if token not in above][:1]), above


@given(pools(), BANDS)
@settings(max_examples=300)
def test_a_band_is_one_top_without_the_other_but_never_empty(pool: tuple, band: tuple[float, float]) -> None:
    rows, masks = pool
    band_from, ratio = band
    kept, threshold = select(rows, masks, ratio, select="band", band_from=band_from)
    assert kept == restated_band(rows, masks, band_from, ratio)[0]
    num_tokens = sum(map(sum, masks))
    assert len(kept) == exact_count(num_tokens, Selector(ratio, "band", band_from=band_from)) >= min(1, num_tokens)
    if kept:
        assert threshold == min(torch.tensor(rows[row][position]).item() for row, position in kept)


@given(pools(), BANDS)
@settings(max_examples=300)
def test_a_band_by_threshold_is_never_empty(pool: tuple, band: tuple[float, float]) -> None:
    """It keeps every token between the two edges. If the edges are equal, it keeps what ``ties=exact`` keeps."""
    rows, masks = pool
    band_from, ratio = band
    kept, _ = select(rows, masks, ratio, select="band", band_from=band_from, ties="threshold")
    exact, above = restated_band(rows, masks, band_from, ratio)
    lower = min((rows[row][position] for row, position in exact), default=math.inf)
    upper = min((rows[row][position] for row, position in above), default=math.inf)
    between = {(row, position) for row, position in in_order(rows, masks) if lower <= rows[row][position] < upper}
    assert kept == (between or exact)
    assert kept or not any(map(any, masks))


def drawn(rows: list[list[float]]) -> list[list[float]]:
    """The number that ``random`` draws for each token, if the seeds of the rows are 0, 1, 2, …"""
    return [
        [
            float(uniform_numbers(np.array([row], np.uint64), np.array([place], np.uint64))[0])
            for place in range(len(values))
        ]
        for row, values in enumerate(rows)
    ]


#: Each value of ``select``, restated plainly: from rows, masks and ρ to the (row, position) of each kept token.
RESTATED: dict[str, Callable[[list[list[float]], list[list[int]], float], set[tuple[int, int]]]] = {
    "top": restated,
    "bottom": lambda rows, masks, ratio: restated(rows, masks, ratio, sign=1),
    "random": lambda rows, masks, ratio: restated(drawn(rows), masks, ratio),
    "band": lambda rows, masks, ratio: restated_band(rows, masks, ratio / 2, ratio)[0],
}


@pytest.mark.parametrize("select_by", SELECTS)
@given(pool=pools(), ratio=RATIOS)
@settings(max_examples=200)
def test_every_way_to_select_equals_its_restatement(select_by: str, pool: tuple, ratio: float) -> None:
    """A new value of ``select`` needs a line in ``RESTATED``."""
    assert select_by in RESTATED, f"say in RESTATED what select={select_by} keeps"
    rows, masks = pool
    band_from = ratio / 2 if select_by == "band" else 0.0
    kept, threshold = select(rows, masks, ratio, select=select_by, band_from=band_from)
    assert kept == RESTATED[select_by](rows, masks, ratio)
    if kept and not math.isnan(threshold):  # τ is the entropy of a token that is kept
        assert threshold in {torch.tensor(rows[row][position]).item() for row, position in kept}


@pytest.mark.parametrize(
    ("num_tokens", "ranks"),
    [(0, (0, 0)), (1, (0, 1)), (2, (1, 2)), (5, (1, 2)), (6, (1, 2)), (10, (1, 2)), (11, (2, 3)), (20, (2, 4))],
)
def test_the_band_between_the_top_10_and_the_top_20_percent(num_tokens: int, ranks: tuple[int, int]) -> None:
    """In a pool of 2 to 5 tokens both tops are the same token. The band is then the token below it."""
    assert ranks_kept(num_tokens, Selector(0.2, "band", band_from=0.1)) == ranks


@given(pools(), RATIOS)
@settings(max_examples=200)
def test_threshold_keeps_every_token_at_the_threshold(pool: tuple, ratio: float) -> None:
    rows, masks = pool
    exact = restated(rows, masks, ratio)
    edge = min((rows[row][position] for row, position in exact), default=math.inf)
    expected = {
        (row, position)
        for row, mask in enumerate(masks)
        for position, eligible in enumerate(mask)
        if eligible and rows[row][position] >= edge
    }
    assert select(rows, masks, ratio, ties="threshold")[0] == expected >= exact


def test_random_keeps_its_share_uniformly_and_differently_for_other_seeds() -> None:
    rows = [[float(position) for position in range(200)] for _ in range(50)]
    masks = [[1] * 200 for _ in rows]
    kept, threshold = select(rows, masks, 0.2, select="random")
    assert len(kept) == 2000
    assert math.isnan(threshold)
    by_position = torch.bincount(torch.tensor([position for _, position in kept]), minlength=200)
    assert 3 <= by_position.float().mean() <= 17
    assert by_position.max() < 30, "positions are favoured"
    other, _ = select(rows, masks, 0.2, select="random", row_seeds=list(range(1000, 1050)))
    assert 300 < len(kept & other) < 500, "two independent draws share a fifth of a fifth"


def test_random_without_seeds_is_refused() -> None:
    with pytest.raises(ValueError, match="needs row_seeds"):
        select_tokens(torch.rand(4), torch.ones(4), torch.tensor([4]), Selector(0.5, select="random"))


#: every way to select, and the value of ``ties`` that is not the default
SELECTORS = st.sampled_from(
    [
        *({"select": select, "band_from": 0.0005 if select == "band" else 0.0} for select in SELECTS),
        {"ties": "threshold"},
    ]
)


@given(pools(), RATIOS, SELECTORS, st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_the_order_of_rows_does_not_matter(pool, ratio: float, settings: dict, random) -> None:  # type: ignore[no-untyped-def]
    rows, masks = pool
    order = list(range(len(rows)))
    expected, threshold = select(rows, masks, ratio, order, order, **settings)
    random.shuffle(order)
    shuffled_rows, shuffled_masks = [rows[i] for i in order], [masks[i] for i in order]
    kept, shuffled_threshold = select(shuffled_rows, shuffled_masks, ratio, order, order, **settings)
    assert {(order[row], position) for row, position in kept} == expected
    assert shuffled_threshold == threshold or (math.isnan(threshold) and math.isnan(shuffled_threshold))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"select": "upper"}, "select must be one of .+, got 'upper'"),
        ({"ties": "all"}, "ties must be one of .+"),
        ({"select": "band"}, r"band_from must be in \(0, top_ratio\)"),
        ({"select": "band", "band_from": 0.3}, r"band_from must be in \(0, top_ratio\)"),
        ({"band_from": 0.1}, "needs select=band; write select=band, or band_from=0"),
        ({"select": "random", "ties": "threshold"}, "write ties=exact"),
    ],
)
def test_a_selector_without_meaning_is_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Selector(0.2, **settings)


@pytest.mark.parametrize(
    ("num_tokens", "ratio", "expected"),
    [(0, 0.2, 0), (1, 0.01, 1), (100, 0.07, 7), (30, 0.1, 3), (15, 0.2, 3), (16, 0.2, 4), (10**9, 0.2, 2 * 10**8)],
)
def test_count_is_the_ceiling_of_the_decimal_that_was_written(num_tokens: int, ratio: float, expected: int) -> None:
    assert kept_count(num_tokens, ratio) == expected


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.2, math.nan, math.inf])
def test_a_ratio_outside_is_refused_with_the_way_out(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \(0, 1\].*0.2 keeps the top 20%"):
        kept_count(10, ratio)


def test_broken_entropies_are_refused_but_not_outside_of_the_mask() -> None:
    entropy = torch.tensor([1.0, math.nan, 2.0])
    lengths = torch.tensor([3])
    assert select_tokens(entropy, torch.tensor([1, 0, 1]), lengths, Selector(0.5)).kept.tolist() == [False, False, True]
    with pytest.raises(ValueError, match="not finite"):
        select_tokens(entropy, torch.ones(3), lengths, Selector(0.5))


def test_bfloat16_entropies_select_like_their_values() -> None:
    entropy = torch.rand(1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    lengths = torch.tensor([1000])
    exact = select_tokens(entropy.float(), torch.ones(1000), lengths, TOP20).kept
    assert torch.equal(select_tokens(entropy, torch.ones(1000), lengths, TOP20).kept, exact)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="must both be flat"):
        select_tokens(torch.rand(4), torch.ones(5), torch.tensor([4]), TOP20)
    with pytest.raises(ValueError, match="must both be flat"):
        select_tokens(torch.rand(4), torch.ones(4), torch.tensor([3]), TOP20)


@given(data=st.data(), size=st.integers(16, 300), distinct=st.sampled_from([1, 2, 5, 1000]))
@settings(max_examples=300)
def test_the_threshold_of_many_is_exact_whatever_the_sample_says(data: st.DataObject, size: int, distinct: int) -> None:
    """Test the path for millions of scores on few scores, with changed limits; also on sorted scores."""
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    scores = random.integers(0, distinct, size).astype(np.float32)
    scores[random.random(size) < 0.2] = -np.inf
    if data.draw(st.booleans()):
        scores.sort()
    count = data.draw(st.integers(1, size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "MANY", 16)
        patch.setattr(selection, "SAMPLE", 16)
        patch.setattr(selection, "MARGIN", 2)
        assert selection._highest_but(scores, count) == np.sort(scores)[size - count]


# --- the control: as many tokens of each row, drawn at random ---------------------------------------------------------


@given(pool=pools(), ratio=RATIOS, seed=st.integers(0, 2**62), random=st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_shuffling_keeps_as_many_tokens_of_each_row_and_their_scores(
    pool: tuple, ratio: float, seed: int, random: Any
) -> None:
    """Each token keeps its company: the pairs of (kept, score) of a row are the same, at other places of the pool."""
    rows, masks = pool
    lengths = torch.tensor([len(row) for row in rows])
    score, eligible = flat(rows), flat(masks, torch.int64)
    seeds = torch.tensor([seed % (row + 7) * 1000 + row for row in range(len(rows))])
    kept = select_tokens(score, eligible, lengths, Selector(ratio)).kept
    shuffled_kept, shuffled_score = selection.shuffled(kept, score, eligible, lengths, seeds)
    assert shuffled_score is not None
    parts = [values.split(lengths.tolist()) for values in (kept, shuffled_kept, score, shuffled_score, eligible)]
    for before, after, score_before, score_after, mask in zip(*parts, strict=True):
        inside = mask.bool()
        assert not (after & ~inside).any()
        assert torch.equal(score_after[~inside], score_before[~inside])
        pairs = [sorted(zip(k[inside].tolist(), s[inside].tolist(), strict=True)) for k, s in
                 ((before, score_before), (after, score_after))]  # fmt: skip
        assert pairs[0] == pairs[1]
    assert selection.shuffled(kept, None, eligible, lengths, seeds)[1] is None
    # a row is shuffled alike wherever it stands
    order = list(range(len(rows)))
    random.shuffle(order)
    moved = [torch.cat([part[row] for row in order]) for part in (parts[0], parts[2], parts[4])]
    again, scores_again = selection.shuffled(moved[0], moved[1], moved[2], lengths[order], seeds[order])
    assert torch.equal(again, torch.cat([parts[1][row] for row in order]))
    assert scores_again is not None
    assert torch.equal(scores_again, torch.cat([parts[3][row] for row in order]))


def test_shuffling_draws_uniformly_from_the_pool_and_other_tokens_for_other_seeds() -> None:
    """A row of 10 tokens has 8 in the pool, and two of these are kept. Each is kept in a quarter of 4000 draws."""
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1, 1])
    kept = torch.zeros(10, dtype=torch.bool)
    kept[:2] = True
    draws = 4000
    shuffled, _ = selection.shuffled(
        kept.repeat(draws), None, mask.repeat(draws), torch.full((draws,), 10), torch.arange(draws)
    )
    table = shuffled.view(draws, 10)
    assert (table.sum(1) == 2).all()
    share = table.double().mean(0)
    assert (share[mask == 0] == 0).all()
    assert ((share[mask == 1] - 0.25).abs() < 0.03).all()
    pairs = {tuple(row.nonzero().flatten().tolist()) for row in table}
    assert len(pairs) == 8 * 7 // 2, "every pair comes"


def test_shuffling_is_independent_of_the_draws_of_a_score() -> None:
    """``score=random`` with the control: the tokens with the highest draws are not favoured."""
    rows = 3000
    lengths, seeds = torch.full((rows,), 6), torch.arange(rows)
    draws = torch.from_numpy(selection.drawn(lengths.numpy(), seeds))
    mask = torch.ones(6 * rows, dtype=torch.bool)
    highest = draws.view(rows, 6).argmax(1)
    kept = torch.zeros(rows, 6, dtype=torch.bool)
    kept[torch.arange(rows), highest] = True
    shuffled, _ = selection.shuffled(kept.flatten(), None, mask, lengths, seeds)
    same = shuffled.view(rows, 6)[torch.arange(rows), highest].double().mean()
    assert abs(float(same) - 1 / 6) < 0.03
    assert ((shuffled.view(rows, 6).double().mean(0) - 1 / 6).abs() < 0.03).all(), "nor is a place in the response"
