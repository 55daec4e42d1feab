"""Draw tokens so that each answer depends only on its own seed, in every engine.

A token is drawn by inverting the cumulative distribution at a uniform number, which is a hash of the answer's seed and
the token's position. There is no generator with a state, so neither the order of the requests nor the engine matters:
the light sampler (``generation.py``) and vLLM (``vllm_processor.py``) take the same token from the same logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entropy_fork.core.entropy import entropies
from entropy_fork.core.randomness import uniform_numbers
from entropy_fork.sampling.two_temperatures import TwoTemperatures, two_temperatures


@dataclass(frozen=True)
class Decoding:
    """How the tokens of one answer are drawn.

    Attributes:
        seed: non-negative; decides all random draws of this answer.
        temperature: T; 0 takes the likeliest token.
        top_p, top_k: nucleus and top-k truncation; 1.0 and -1 leave the distribution as it is.
        two_temperatures: draws with these instead of T. Entropies are then measured at T, which must be above 0.

    Raises:
        ValueError: there are two temperatures, and T is 0.
    """

    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    two_temperatures: TwoTemperatures | None = None

    def __post_init__(self) -> None:
        if self.two_temperatures is not None and not self.temperature > 0:
            raise ValueError("entropies need a temperature above 0; for likeliest tokens write T_high=0 and T_low=0")


class Sampler:
    """Draws a token for each row of a batch.

    Args:
        rows: decoding settings, one per row of the logits.
        device: the device of the logits.
    """

    def __init__(self, rows: Sequence[Decoding], device: torch.device):
        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=device)[:, None]

        self.seeds = np.array([row.seed for row in rows], dtype=np.uint64)
        self.temperature = column([float(row.temperature) for row in rows])
        self.top_p = column([row.top_p for row in rows])
        self.top_k = column([row.top_k for row in rows])
        self.truncates = bool((self.top_p < 1).any() or (self.top_k > 0).any())
        self.has_two = any(row.two_temperatures is not None for row in rows)
        # A row with one temperature is a row with two equal ones.
        pairs = [row.two_temperatures or TwoTemperatures(row.temperature, row.temperature) for row in rows]
        self.high = column([float(pair.high) for pair in pairs])
        self.low = column([float(pair.low) for pair in pairs])
        self.threshold = column([float(pair.threshold) for pair in pairs])

    def draw(self, logits: Tensor, positions: np.ndarray) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take one token for each row.

        Args:
            logits: float32, shape (rows, vocabulary).
            positions: uint64, shape (rows,): the position of the new token in its sequence, the prompt included.

        Returns:
            Three tensors of shape (rows,): tokens (int64); their log-probs (nats) under the distribution drawn from,
            which is softmax(z) for a token that was taken as the likeliest; and the entropies H_t (nats), or None if no
            row has two temperatures.
        """
        entropy, temperature = None, self.temperature
        if self.has_two:
            entropy = entropies(logits, torch.where(self.temperature == 0, 1.0, self.temperature))
            temperature = two_temperatures(entropy[:, None], self.high, self.low, self.threshold)
        greedy = temperature == 0
        log_probs = torch.log_softmax(logits / torch.where(greedy, 1.0, temperature), dim=-1)
        if self.truncates:
            log_probs = self._truncated(log_probs)
        cumulative = log_probs.double().exp().cumsum(dim=-1)
        uniform = uniform_numbers(self.seeds, positions)
        target = torch.from_numpy(uniform).to(cumulative)[:, None] * cumulative[:, -1:]
        # right=True: a token of probability zero does not raise the sum, and is never taken.
        drawn = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
        tokens = torch.where(greedy, logits.argmax(dim=-1, keepdim=True), drawn)
        return tokens.squeeze(1), log_probs.gather(1, tokens).squeeze(1), entropy

    def _truncated(self, log_probs: Tensor) -> Tensor:
        ranked, order = log_probs.sort(dim=-1, descending=True)
        rank = torch.arange(ranked.shape[-1], device=ranked.device)
        before = ranked.exp().cumsum(dim=-1) - ranked.exp()
        keep = (before < self.top_p) & ((rank < self.top_k) | (self.top_k <= 0))
        keep[:, 0] = True
        kept = torch.empty_like(keep).scatter_(1, order, keep)
        return torch.log_softmax(log_probs.masked_fill(~kept, -torch.inf), dim=-1)
