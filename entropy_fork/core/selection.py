"""Choose the tokens to train on: a share ρ of a pool, by entropy (arXiv 2506.01939, Eq. 6) or by a control.

The paper keeps every token with ``H_t >= τ_ρ``. That does not fix the number of tokens: if 90% of the entropies are
equal it can keep everything, and an interpolated quantile keeps more or fewer than ρN. ``ties="exact"`` keeps exactly
``ceil(ρN)`` tokens. Of tokens with an entropy of exactly τ, it takes those that come first in their response.
``ties="threshold"`` does what the paper says.

Every selection keeps the tokens of the highest *score*. The score is the entropy (top, band), its negative (bottom) or
a random number that depends on the token's row and position (random).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from entropy_fork.core.flat import row_slices
from entropy_fork.core.randomness import uniform_numbers
from entropy_fork.core.rule import Selector, check_ratio


@dataclass(frozen=True)
class Selection:
    """The tokens of one pool that are kept.

    Attributes:
        kept: bool, shape (num_tokens,): True where the token is trained on.
        threshold: τ in nats: the lowest entropy that is kept (top and band), or the highest one (bottom). NaN for
            random, and for a pool without tokens.
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
    entropy: Tensor,
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
        entropy: float, shape (num_tokens,), nats: H_t of each position, one row after another.
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
        ValueError: the shapes do not fit, the entropy of an eligible token is not finite, or ``random`` has no
            ``row_seeds``.
    """
    mask = eligible.detach().cpu().numpy().astype(bool, copy=False)
    rows = lengths.detach().cpu().numpy()
    if entropy.shape != eligible.shape or entropy.ndim != 1 or int(rows.sum()) != entropy.numel():
        raise ValueError(
            f"entropy {tuple(entropy.shape)} and eligible {tuple(eligible.shape)} must both be flat, with "
            f"sum(lengths) = {int(rows.sum())} tokens"
        )
    num_tokens = int(np.count_nonzero(mask))
    if num_tokens == 0:
        return Selection(torch.zeros(mask.shape, dtype=torch.bool), math.nan, 0, 0)
    values = entropy.detach().to("cpu", torch.float32).numpy()
    everything = num_tokens == values.size
    finite = np.isfinite(values)
    if not everything:
        finite |= ~mask
    if not finite.all():
        raise ValueError("the entropy of a response token is not finite: the policy's logits are broken at this step")

    score = SCORES[selector.select]
    scores = score.of(PoolTokens(values, mask, rows, row_seeds))
    # Tokens that must not be kept get the lowest score. At most N tokens are kept, so these never are.
    ranked = scores if everything else np.where(mask, scores, -np.inf)
    order = None if row_order is None else row_order.cpu().numpy()
    first, end = ranks_kept(num_tokens, selector)
    kept, last = _highest(ranked, end, selector.ties, rows, order)
    if first > 0:
        above, upper = _highest(ranked, first, selector.ties, rows, order)
        if selector.ties == "threshold" and upper == last:  # no entropy lies between the edges, so positions decide
            kept, above = (_highest(ranked, count, "exact", rows, order)[0] for count in (end, first))
        kept &= ~above
    if not everything:
        kept &= mask  # with ties="threshold" and everything kept, -inf itself would pass
    return Selection(torch.from_numpy(kept), score.sign * last, num_tokens, int(np.count_nonzero(kept)))


@dataclass(frozen=True)
class PoolTokens:
    """The tokens of one pool, one row after another: the input of a score.

    Attributes:
        entropy: float32, shape (num_tokens,), nats; finite where ``eligible``.
        eligible: bool, same shape: the response mask.
        lengths: int, shape (num_rows,): tokens per row.
        row_seeds: int64, shape (num_rows,): the seed of each row's draws; None if there are no draws.
    """

    entropy: np.ndarray
    eligible: np.ndarray
    lengths: np.ndarray
    row_seeds: Tensor | None


@dataclass(frozen=True)
class Score:
    """How a value of ``select`` ranks tokens.

    Attributes:
        of: the scores, float, shape (num_tokens,). The tokens with the highest ones are kept.
        sign: 1 or -1: τ in nats is this times the lowest score that is kept. NaN if the score is not an entropy.
    """

    of: Callable[[PoolTokens], np.ndarray]
    sign: float = math.nan


def _drawn(tokens: PoolTokens) -> np.ndarray:
    """A number in [0, 1) for each token, from the seed of its row and its position."""
    if tokens.row_seeds is None:
        raise ValueError("select=random needs row_seeds, so that the same tokens are drawn again on other ranks")
    scores = np.empty(tokens.entropy.size)
    positions = np.arange(tokens.lengths.max(), dtype=np.uint64)
    seeds = tokens.row_seeds.cpu().numpy().astype(np.uint64)[:, None]
    for row, seed in zip(row_slices(tokens.lengths), seeds, strict=True):
        scores[row] = uniform_numbers(seed, positions[: row.stop - row.start])
    return scores


#: the score of each value of ``select``
SCORES = {
    "top": Score(lambda tokens: tokens.entropy, sign=1.0),
    "bottom": Score(lambda tokens: -tokens.entropy, sign=-1.0),
    "random": Score(_drawn),
    "band": Score(lambda tokens: tokens.entropy, sign=1.0),
}


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
