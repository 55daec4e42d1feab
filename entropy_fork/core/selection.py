"""Which tokens are trained on: a share ρ of a pool, by entropy (arXiv 2506.01939, Eq. 6) or by its controls.

The paper keeps every token with ``H_t >= τ_ρ``. That is not well defined when entropies are equal (with 90% of them
equal it keeps everything), and an interpolated quantile keeps another number than was asked for. ``ties="exact"``
keeps exactly ``ceil(ρN)`` tokens, and among equals at the threshold the one that comes first in its response;
``ties="threshold"`` is the paper's text. All selections are one: the tokens of highest *score*, where the score is the
entropy (top, band), its negative (bottom) or a hash of the token's identity (random).
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
    """The tokens kept of one pool.

    Attributes:
        kept: bool, shape (num_tokens,): True where the token is trained on.
        threshold: τ in nats, the entropy at the edge: of the last token that was kept (the lowest for top and band,
            the highest for bottom); NaN for random and for a pool without tokens.
        num_tokens: N, the tokens of the pool that could be kept (those with ``eligible``).
        num_kept: how many were; :func:`exact_count` with ``ties="exact"``, so ceil(ρN) without a band.
    """

    kept: Tensor
    threshold: float
    num_tokens: int
    num_kept: int


def kept_count(num_tokens: int, top_ratio: float) -> int:
    """ceil(ρN), at least 1 when there is a token at all.

    ρ is taken as the decimal that was written down, not as its binary neighbour: ``0.07 * 100`` is
    ``7.000000000000001`` in floating point, whose ceiling would be one token too many.

    Raises:
        ValueError: a ρ outside (0, 1].
    """
    check_ratio(top_ratio)
    if num_tokens == 0:
        return 0
    return max(1, math.ceil(Fraction(repr(float(top_ratio))) * num_tokens))


def ranks_kept(num_tokens: int, selector: Selector) -> tuple[int, int]:
    """Which ranks of a pool's scores ``ties="exact"`` keeps: (first, end), counted from 0 for the highest score.

    Without a band the ranks are 0 to ceil(ρN). A band leaves out the ceil(band_from·N) highest. In a small pool these
    may be all that ρ keeps: of 5 tokens, both the top 10% and the top 20% are one. A pool that has a token keeps at
    least one, so the band then is the one token right below those left out, and in a pool of one token that token.
    """
    end = kept_count(num_tokens, selector.top_ratio)
    if selector.select != "band" or num_tokens == 0:
        return 0, end
    first = min(kept_count(num_tokens, selector.band_from), num_tokens - 1)
    return first, max(end, first + 1)


def exact_count(num_tokens: int, selector: Selector) -> int:
    """How many tokens of a pool ``ties="exact"`` keeps: known before any entropy is; 0 only for a pool without any."""
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

    Linear in the number of tokens and without a limit on it (``torch.quantile`` refuses more than 2^24).

    Args:
        entropy: float, shape (num_tokens,), nats: H_t of each position, rows behind one another.
        eligible: bool or int, shape (num_tokens,): the response mask. Tokens outside (tool output in a multi-turn
            answer, padding rows) are neither counted in N nor kept.
        lengths: int, shape (num_rows,): tokens per row; sums to num_tokens.
        selector: what to keep.
        row_order: int, shape (num_rows,), distinct: decides between tokens of equal score at equal positions of
            different rows. Give something that belongs to the row itself, so that the choice does not depend on where
            the row happens to lie in the batch. By default the order in which the rows are given.
        row_seeds: int64, shape (num_rows,): for ``random``, what a row's draws are derived from.

    Returns:
        The :class:`Selection`, on the CPU.

    Raises:
        ValueError: shapes that do not fit, an entropy of an eligible token that is not finite, or ``random`` without
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
    # What must not be kept is put below all others: no more than N are ever kept, so it never comes in.
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
    """What a score is made of: the tokens of one pool, rows behind one another.

    Attributes:
        entropy: float32, shape (num_tokens,), nats; finite where ``eligible``.
        eligible: bool, same shape: the response mask.
        lengths: int, shape (num_rows,): tokens per row.
        row_seeds: int64, shape (num_rows,): what a row's draws are derived from.
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
        sign: times the lowest score that is kept, it gives τ in nats; NaN where the score is not made of entropy alone.
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
    """The ``count`` highest scores as a mask; with ``ties="threshold"`` also all that equal the last of them.

    And the last of them.
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


#: fewer scores than these are partitioned as they are
MANY = 2**20

#: scores of the sample that narrows down where the threshold is, and how many of them to either side it may lie
SAMPLE, MARGIN = 2**16, 2**10


def _highest_but(scores: np.ndarray, count: int) -> np.floating:
    """The ``count``-th highest score.

    numpy's quickselect is fast, but takes up to fifty times as long where many scores are equal (as entropies near
    zero are, or all of them in 16 bits). So a sample says between which two scores the threshold must lie, passes that
    only compare say whether it does, and what lies strictly between is partitioned: a few percent, without the values
    that are so frequent that they bound it. The result is exact whatever the sample.
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
    """Leave of the tokens set in ``tied`` the ``count`` that come first in their own response.

    Row by row: of a policy that is sure of itself most entropies are exactly 0, and a number for each would be eight
    times as large as the mask.
    """
    at_position = np.zeros(lengths.max(), dtype=np.int64)
    for row in row_slices(lengths):
        at_position[: row.stop - row.start] += tied[row]
    # All before the position at which there are enough; of those at it, the first rows.
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
