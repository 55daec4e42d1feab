"""Which tokens are forks: the top ρ of a pool by entropy, exactly ceil(ρN) of them (arXiv 2506.01939, Eq. 6).

The paper keeps every token with ``H_t >= τ_ρ``. That is not well defined when entropies are equal (with 90% of them
equal it keeps everything), and an interpolated quantile keeps another number than was asked for. Here exactly
``ceil(ρN)`` tokens are kept, and among equals at the threshold the one that comes first in its response.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """The tokens kept of one pool.

    Attributes:
        kept: bool, shape (num_tokens,): True where the token is trained on.
        threshold: τ in nats, the entropy of the last token that was kept; NaN for a pool without tokens.
        num_tokens: N, the tokens of the pool that could be kept (those with ``eligible``).
        num_kept: ceil(ρN), or 0 for a pool without tokens.
    """

    kept: Tensor
    threshold: float
    num_tokens: int
    num_kept: int


def kept_count(num_tokens: int, top_ratio: float) -> int:
    """ceil(ρN), at least 1 when there is a token at all.

    ρ is taken as the decimal that was written down, not as its binary neighbour: ``0.07 * 100`` is
    ``7.000000000000001`` in floating point, whose ceiling would be one token too many.
    """
    if not 0.0 < top_ratio <= 1.0:
        raise ValueError(f"top_ratio must be in (0, 1], got {top_ratio!r}; 0.2 keeps the top 20%, 1.0 keeps everything")
    if num_tokens == 0:
        return 0
    return max(1, math.ceil(Fraction(repr(float(top_ratio))) * num_tokens))


def select_top(
    entropy: Tensor, eligible: Tensor, lengths: Tensor, top_ratio: float, row_order: Tensor | None = None
) -> Selection:
    """Keep the ceil(ρN) tokens of highest entropy in one pool.

    Linear in the number of tokens and without a limit on it (``torch.quantile`` refuses more than 2^24).

    Args:
        entropy: float, shape (num_tokens,), nats: H_t of each position, rows behind one another.
        eligible: bool or int, shape (num_tokens,): the response mask. Tokens outside (tool output in a multi-turn
            answer, padding rows) are neither counted in N nor kept.
        lengths: int, shape (num_rows,): tokens per row; sums to num_tokens.
        top_ratio: ρ in (0, 1].
        row_order: int, shape (num_rows,), distinct: decides between tokens of equal entropy at equal positions of
            different rows. Give something that belongs to the row itself, so that the choice does not depend on where
            the row happens to lie in the batch. By default the order in which the rows are given.

    Returns:
        The :class:`Selection`, on the CPU.

    Raises:
        ValueError: ρ outside (0, 1], shapes that do not fit, or an entropy of an eligible token that is not finite.
    """
    eligible_np = eligible.detach().cpu().numpy().astype(bool, copy=False)
    lengths_np = lengths.detach().cpu().numpy()
    if entropy.shape != eligible.shape or entropy.ndim != 1 or int(lengths_np.sum()) != entropy.numel():
        raise ValueError(
            f"entropy {tuple(entropy.shape)} and eligible {tuple(eligible.shape)} must both be flat, with "
            f"sum(lengths) = {int(lengths_np.sum())} tokens"
        )
    num_tokens = int(np.count_nonzero(eligible_np))
    num_kept = kept_count(num_tokens, top_ratio)
    if num_kept == 0:
        return Selection(torch.zeros_like(eligible, dtype=torch.bool, device="cpu"), math.nan, 0, 0)

    values = entropy.detach().to("cpu", torch.float32).numpy()
    if not np.isfinite(values, where=eligible_np, out=np.ones(values.shape, dtype=bool)).all():
        raise ValueError("the entropy of a response token is not finite: the policy's logits are broken at this step")
    if num_kept == num_tokens:
        threshold = float(values.min(where=eligible_np, initial=math.inf))
        return Selection(torch.from_numpy(eligible_np.copy()), threshold, num_tokens, num_kept)

    # Entropies of what must not be kept are put below all others: N < kept is impossible, so they never come in.
    ranked = values if num_tokens == values.size else np.where(eligible_np, values, -np.inf)
    threshold = np.partition(ranked, ranked.size - num_kept)[ranked.size - num_kept]
    kept = ranked > threshold
    missing = num_kept - int(np.count_nonzero(kept))
    tied = np.flatnonzero(ranked == threshold)
    if missing < tied.size:
        tied = _earliest(tied, missing, lengths_np, None if row_order is None else row_order.cpu().numpy())
    kept[tied] = True
    return Selection(torch.from_numpy(kept), float(threshold), num_tokens, num_kept)


def _earliest(tied: np.ndarray, count: int, lengths: np.ndarray, row_order: np.ndarray | None) -> np.ndarray:
    """The ``count`` of the flat indices ``tied`` that come first in their own response."""
    ends = np.cumsum(lengths)
    row = np.searchsorted(ends, tied, side="right")
    position = tied - (ends[row] - lengths[row])
    order = np.lexsort((row if row_order is None else row_order[row], position))
    return tied[order[:count]]
