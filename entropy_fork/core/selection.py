"""Choose the tokens to train on: a share ρ of a pool, by entropy (arXiv 2506.01939, Eq. 6) or by another score.

The paper keeps every token with ``H_t >= τ_ρ``. That does not fix the number of tokens: if 90% of the entropies are
equal it can keep everything, and an interpolated quantile keeps more or fewer than ρN. ``ties="exact"`` keeps exactly
``ceil(ρN)`` tokens. Of tokens with a score of exactly τ, it takes those that come first in their response.
``ties="threshold"`` does what the paper says.

Every selection keeps the highest *ranks*. A token's rank is its score (top, band), the score's negative (bottom) or a
random number that depends on the token's row and position (random). Scores: ``scores.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from entropy_fork.core.flat import row_slices
from entropy_fork.core.randomness import drawn
from entropy_fork.core.rule import BLIND, Selector, check_ratio


@dataclass(frozen=True)
class Selection:
    """The tokens of one pool that are kept.

    Attributes:
        kept: bool, shape (num_tokens,): True where the token is trained on.
        threshold: τ, in the unit of the score (nats for the entropy): the lowest score that is kept (top and band), or
            the highest one (bottom). NaN for random, and for a pool without tokens.
        num_tokens: N, the number of eligible tokens in the pool.
        num_kept: how many of them are kept. With ``ties="exact"`` it is :func:`exact_count`: ceil(ρN), but for a band.
    """

    kept: Tensor
    threshold: float
    num_tokens: int
    num_kept: int


def kept_count(num_tokens: int, top_ratio: float) -> int:
    """ceil(ρN), and at least 1 if there is a token.

    The computation uses the decimal number ρ as it was written, not its nearest binary fraction: ``0.07 * 100`` is
    ``7.000000000000001`` in floating point, and its ceiling would be one token too many.

    Raises:
        ValueError: a ρ outside (0, 1].
    """
    check_ratio(top_ratio)
    if num_tokens == 0:
        return 0
    return max(1, math.ceil(Fraction(repr(float(top_ratio))) * num_tokens))


def ranks_kept(num_tokens: int, selector: Selector) -> tuple[int, int]:
    """Which ranks of a pool's scores ``ties="exact"`` keeps: (first, end), counted from 0 for the highest score.

    Without a band, (first, end) is (0, ceil(ρN)). A band leaves out the ceil(band_from·N) highest. In a small pool that
    may leave nothing: of 5 tokens, the top 10% is one token, and so is the top 20%. A pool with tokens keeps at least
    one: then it is the next lower token, or, in a pool of one token, that token.
    """
    end = kept_count(num_tokens, selector.top_ratio)
    if selector.select != "band" or num_tokens == 0:
        return 0, end
    first = min(kept_count(num_tokens, selector.band_from), num_tokens - 1)
    return first, max(end, first + 1)


def exact_count(num_tokens: int, selector: Selector) -> int:
    """How many tokens of a pool ``ties="exact"`` keeps. Only the pool's size decides; 0 only for an empty pool."""
    first, end = ranks_kept(num_tokens, selector)
    return end - first


def select_tokens(
    score: Tensor,
    eligible: Tensor,
    lengths: Tensor,
    selector: Selector,
    row_order: Tensor | None = None,
    row_seeds: Tensor | None = None,
) -> Selection:
    """Keep a share of the tokens of one pool: the indicator in the paper's Eq. 6.

    The time is linear in the number of tokens. There is no limit on their number (``torch.quantile`` refuses more than
    2^24).

    Args:
        score: float, shape (num_tokens,): what tokens are ranked by, one row after another. In the paper it is H_t in
            nats, the entropy of the position.
        eligible: bool or int, shape (num_tokens,): the response mask. Tokens outside it (tool output in a multi-turn
            answer, padding rows) are neither counted in N nor kept.
        lengths: int, shape (num_rows,): tokens per row; sums to num_tokens.
        selector: what to keep.
        row_order: int, shape (num_rows,), distinct: decides between tokens of equal score at equal positions of
            different rows. Compute it from the row itself (:func:`entropy_fork.core.identity.row_order`), so that the
            choice does not depend on the row's place in the batch. The default is the order of the rows given.
        row_seeds: int64, shape (num_rows,): the seed of each row's draws, for ``random``.

    Returns:
        The :class:`Selection`, on the CPU.

    Raises:
        ValueError: the shapes do not fit, the score of an eligible token is not finite, or ``random`` has no
            ``row_seeds``.
    """
    mask = eligible.detach().cpu().numpy().astype(bool, copy=False)
    rows = lengths.detach().cpu().numpy()
    if score.shape != eligible.shape or score.ndim != 1 or int(rows.sum()) != score.numel():
        raise ValueError(
            f"score {tuple(score.shape)} and eligible {tuple(eligible.shape)} must both be flat, with "
            f"sum(lengths) = {int(rows.sum())} tokens"
        )
    num_tokens = int(np.count_nonzero(mask))
    if num_tokens == 0:
        return Selection(torch.zeros(mask.shape, dtype=torch.bool), math.nan, 0, 0)
    values = _as_numpy(score)
    everything = num_tokens == values.size
    finite = np.isfinite(values)
    if not everything:
        finite |= ~mask
    if not finite.all():
        raise ValueError(
            "the score of a response token is not finite: if it is the entropy, the policy's logits are broken at this "
            "step"
        )

    if selector.select in BLIND:
        if row_seeds is None:
            raise ValueError("select=random needs row_seeds, so that the same tokens are drawn again on other ranks")
        scores = drawn(rows, row_seeds)
    else:
        scores = -values if selector.select == "bottom" else values
    # Tokens that must not be kept get the lowest score. At most N tokens are kept, so these never are.
    ranked = scores if everything else np.where(mask, scores, -np.inf)
    order = None if row_order is None else row_order.cpu().numpy()
    first, end = ranks_kept(num_tokens, selector)
    kept, last = _highest(ranked, end, selector.ties, rows, order)
    if first > 0:
        above, upper = _highest(ranked, first, selector.ties, rows, order)
        if selector.ties == "threshold" and upper == last:  # no score lies between the edges, so positions decide
            kept, above = (_highest(ranked, count, "exact", rows, order)[0] for count in (end, first))
        kept &= ~above
    if not everything:
        kept &= mask  # with ties="threshold" and everything kept, -inf itself would pass
    return Selection(torch.from_numpy(kept), SIGNS[selector.select] * last, num_tokens, int(np.count_nonzero(kept)))


#: τ is this times the lowest rank that is kept
SIGNS = {"top": 1.0, "bottom": -1.0, "random": math.nan, "band": 1.0}


def shuffled(
    kept: Tensor, score: Tensor | None, eligible: Tensor, lengths: Tensor, row_seeds: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Shuffle a selection within each row: as many tokens of a row are kept as before, drawn at random.

    The scores of a row are dealt to its tokens in the same order, so that a kept token still has the score of a kept
    one.

    Args:
        kept: bool, shape (num_tokens,).
        score: float, same shape, if it is needed.
        eligible: bool, same shape: the tokens of the pools. No other token is kept or moved.
        lengths: int, shape (num_rows,): tokens per row.
        row_seeds: int64, shape (num_rows,): the seed of each row's draws.

    Returns:
        Both, shuffled.
    """
    rows, mask = lengths.cpu().numpy(), eligible.cpu().numpy().astype(bool, copy=False)
    new_kept = kept.clone()
    new_score = None if score is None else score.clone()
    numbers = drawn(rows, row_seeds, stream=1)
    for row in row_slices(rows):
        places = torch.from_numpy(np.flatnonzero(mask[row]) + row.start)
        dealt = places[torch.from_numpy(np.argsort(numbers[places.numpy()], kind="stable"))]
        new_kept[places] = kept[dealt]
        if score is not None and new_score is not None:
            new_score[places] = score[dealt]
    return new_kept, new_score


def _as_numpy(score: Tensor) -> np.ndarray:
    """float64 as it is, any other type as float32."""
    values = score.detach().cpu()
    return values.numpy() if values.dtype == torch.float64 else values.to(torch.float32).numpy()


def _highest(
    scores: np.ndarray, count: int, ties: str, lengths: np.ndarray, order: np.ndarray | None
) -> tuple[np.ndarray, float]:
    """A mask of the ``count`` highest scores, and the lowest of these scores.

    With ``ties="threshold"`` the mask includes every score that equals the lowest.
    """
    threshold = _highest_but(scores, count)
    if ties == "threshold":
        return scores >= threshold, float(threshold)
    kept = scores > threshold
    missing = count - int(np.count_nonzero(kept))
    tied = scores == threshold
    if missing < np.count_nonzero(tied):
        _drop_all_but_earliest(tied, missing, lengths, order)
    kept |= tied
    return kept, float(threshold)


#: with fewer scores than this, all of them are partitioned
MANY = 2**20

#: the size of the sample that estimates the threshold, and how many places of the sample the estimate may be off
SAMPLE, MARGIN = 2**16, 2**10


def _highest_but(scores: np.ndarray, count: int) -> np.floating:
    """The ``count``-th highest score.

    numpy's quickselect is fast, but takes up to fifty times as long if many scores are equal, as entropies near zero
    are, or entropies in 16 bits. So first a sorted sample gives a lower and an upper bound of the threshold. Then
    passes that only compare check the bounds. At last only the scores strictly between the bounds are partitioned: a
    few percent, without very frequent values, because these are bounds themselves. The result is exact for any sample.
    """
    if scores.size >= MANY:
        sample = np.sort(scores[:: scores.size // SAMPLE])
        middle = round((1 - count / scores.size) * sample.size)
        low, high = sample[max(0, middle - MARGIN)], sample[min(sample.size - 1, middle + MARGIN)]
        num_above, num_high = np.count_nonzero(scores > high), np.count_nonzero(scores >= high)
        if num_above < count <= num_high:
            return high
        if num_high < count:
            inside = scores > low
            inside &= scores < high
            between = scores[inside]
            if count <= num_high + between.size:
                rank = num_high + between.size - count
                return np.partition(between, rank)[rank]
            if count <= np.count_nonzero(scores >= low):
                return low
    return np.partition(scores, scores.size - count)[scores.size - count]


def _drop_all_but_earliest(tied: np.ndarray, count: int, lengths: np.ndarray, row_order: np.ndarray | None) -> None:
    """Clear ``tied`` in place, except for the ``count`` tokens that come first in their own response.

    It works row by row. With a confident policy most entropies are exactly 0, and an index of each tied token would
    take eight times the memory of the mask.
    """
    at_position = np.zeros(lengths.max(), dtype=np.int64)
    for row in row_slices(lengths):
        at_position[: row.stop - row.start] += tied[row]
    # There are enough tied tokens up to position ``edge``. Keep all before it, and at it those of the first rows.
    edge = int(np.searchsorted(np.cumsum(at_position), count))
    rows_at_edge = np.flatnonzero(lengths > edge)
    tokens_at_edge = (np.cumsum(lengths) - lengths)[rows_at_edge] + edge
    is_tied = tied[tokens_at_edge]
    rows_at_edge, tokens_at_edge = rows_at_edge[is_tied], tokens_at_edge[is_tied]
    first = np.argsort(rows_at_edge if row_order is None else row_order[rows_at_edge])
    chosen = tokens_at_edge[first[: count - int(at_position[:edge].sum())]]
    for row in row_slices(lengths):
        tied[row.start + edge : row.stop] = False
    tied[chosen] = True
