"""The entropy of a next-token distribution, H_t (arXiv 2506.01939, Eq. 1), from its logits.

The computation is in float32 or better, whatever type the logits have. An entropy is a small difference of large sums,
and 16-bit sums would lose it.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def entropies(logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """H_t of softmax(z_t / T), the paper's Eq. 1, without a gradient. It needs one tensor beside the logits.

    Args:
        logits: shape (rows, vocabulary); -inf for tokens of probability 0.
        temperature: T above 0, a number or of shape (rows,).

    Returns:
        Nats, at least 0, shape (rows,), float32 (float64 if the logits are).
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    if isinstance(temperature, Tensor) or temperature != 1.0:
        logits = logits.to(wide)
        logits = logits / column(temperature, logits)
    probabilities = torch.softmax(logits, dim=-1, dtype=wide)
    return torch.special.entr(probabilities, out=probabilities).sum(dim=-1)


def column(temperature: Tensor | float, logits: Tensor) -> Tensor:
    """The temperature as a column, a divisor of logits: shape (rows, 1) for one per row, (1, 1) for one number."""
    return torch.as_tensor(temperature).to(logits).reshape(-1, 1)
