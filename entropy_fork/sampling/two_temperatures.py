"""Decoding with two temperatures: one where the entropy is high, another where it is low (2506.01939, §3, Eq. 5).

    T'_t = T_high if H_t > τ else T_low        token t is drawn from softmax(z_t / T'_t)

H_t is the entropy of softmax(z_t / T) at the ordinary decoding temperature T, at which the threshold τ was measured too
(``core/entropy.py``). A temperature of 0 takes the likeliest token. Everything is computed in float32 or better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_fork.core.entropy import column

#: nats: the 80th percentile of Qwen3-8B's entropies on its answers to AIME questions (§3)
PAPER_THRESHOLD = 0.672
#: the values that the paper tries for one temperature while the other one is 1
PAPER_TEMPERATURES = (0.0, 0.05, 0.3, 0.6, 1.0, 2.0, 3.0, 5.0)


@dataclass(frozen=True)
class TwoTemperatures:
    """The parameters of Eq. 5.

    Attributes:
        high: T_high, where the entropy is above the threshold; 0 takes the likeliest token there.
        low: T_low, everywhere else.
        threshold: τ in nats, 0 or more; if it is infinite, T_low is used everywhere.

    Raises:
        ValueError: a value has no meaning.
    """

    high: float
    low: float
    threshold: float = PAPER_THRESHOLD

    def __post_init__(self) -> None:
        for name in ("high", "low"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"T_{name} is {getattr(self, name)}, and must be 0 (likeliest token) or more")
        if not self.threshold >= 0:
            raise ValueError(f"the threshold is {self.threshold}, and must be an entropy in nats: 0 or more")


def two_temperatures(entropy: Tensor, high: Tensor | float, low: Tensor | float, threshold: Tensor | float) -> Tensor:
    """T'_t of Eq. 5 for each row, from its entropy.

    Args:
        entropy: H_t in nats, shape (rows,).
        high: T_high, a number or of shape (rows,).
        low: T_low, the same.
        threshold: τ in nats, the same.

    Returns:
        Shape and type of ``entropy``.
    """
    high, low, threshold = (torch.as_tensor(value).to(entropy) for value in (high, low, threshold))
    return torch.where(entropy > threshold, high, low)


def scaled(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """z_t / T' for each row. Where T' is 0, the row becomes certain of the likeliest token (the first of equals).

    Args:
        logits: shape (rows, vocabulary).
        temperature: T', a number or of shape (rows,).

    Returns:
        Shape (rows, vocabulary), float32 (float64 for such logits).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    temperature = column(temperature, logits)
    greedy = temperature == 0
    divided = logits / torch.where(greedy, 1.0, temperature)
    if not bool(greedy.any()):
        return divided
    certain = torch.full_like(logits, -torch.inf).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 0.0)
    return torch.where(greedy, certain, divided)
