"""Rows of a batch with every field that a score can read. It imports nothing of verl, so that ranks start fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_fork.core.randomness import drawn
from entropy_fork.core.responses import Choice, Responses, choose, pool_of_responses, weigh_mini_batches
from entropy_fork.core.rule import Rule
from entropy_fork.core.scores import score_of
from entropy_fork.core.scoring import Tokens
from entropy_fork.core.where import where_of


@dataclass(frozen=True)
class ScoredRows:
    """Answers, each a row. Every list has one item per row.

    Attributes:
        fields: each field of a score that verl writes: float32 tensors, one number per token.
        masks: the response masks, int64.
        order: decides between equal tokens.
        seeds: of the draws.
    """

    fields: dict[str, list[Tensor]]
    masks: list[Tensor]
    order: list[int]
    seeds: list[int]

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def lengths(self) -> Tensor:
        """Tokens per row."""
        return torch.tensor([len(mask) for mask in self.masks], dtype=torch.int64)

    def take(self, rows: Sequence[int]) -> ScoredRows:
        """Some of the rows, in the order given."""
        return ScoredRows(
            {name: [values[row] for row in rows] for name, values in self.fields.items()},
            [self.masks[row] for row in rows],
            [self.order[row] for row in rows],
            [self.seeds[row] for row in rows],
        )

    def with_padding(self, number: int) -> ScoredRows:
        """With padding rows as verl makes them: one token outside of the mask, with any values; here wild ones."""
        wild = torch.tensor([3e3])
        return ScoredRows(
            {name: values + [wild] * number for name, values in self.fields.items()},
            self.masks + [torch.zeros(1, dtype=torch.int64)] * number,
            self.order + [1000 + row for row in range(number)],
            self.seeds + [5000 + row for row in range(number)],
        )

    def tokens(self, window: Tensor | None = None) -> Tokens:
        """As the scores see them."""
        return Tokens(
            {name: torch.cat(values) for name, values in self.fields.items()},
            torch.cat(self.masks),
            self.lengths,
            torch.tensor(self.seeds),
            torch.zeros(len(self), dtype=torch.int64) if window is None else window,
        )

    def responses(self, rule: Rule, window: Tensor | None = None) -> Responses:
        """As a selection sees them, with the score and the condition of a rule."""
        tokens = self.tokens(window)
        return Responses(
            tokens.fields["entropy"],
            tokens.eligible,
            tokens.lengths,
            torch.tensor(self.order),
            tokens.seeds,
            tokens.score(score_of(rule.score)),
            tokens.where(where_of(rule.where)) if rule.where else None,
        )

    def all_tokens(self) -> list[dict[str, float]]:
        """Each token as a dict of plain numbers, with ``eligible``, ``row`` and the fields that follow from the row."""
        draws = iter(drawn(self.lengths.numpy(), torch.tensor(self.seeds)).tolist())
        return [
            {name: float(values[row][place]) for name, values in self.fields.items()}
            | {"eligible": int(mask[place]), "row": row, "position": place, "length": len(mask), "draw": next(draws)}
            for row, mask in enumerate(self.masks)
            for place in range(len(mask))
        ]

    def eligible_tokens(self) -> list[dict[str, float]]:
        """Those of the response mask."""
        return [token for token in self.all_tokens() if token["eligible"]]


def make_batch(seed: int, num_rows: int, eligible: float = 0.85, longest: int = 13) -> ScoredRows:
    """Random rows: few distinct values, so that ties are common; tokens of p = 1; rows with an advantage of 0."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (num_rows,), generator=random).tolist()
    total = sum(lengths)

    def numbers(scale: float) -> Tensor:
        return torch.rand(total, generator=random) * scale

    certain = numbers(1.0) < 0.15
    entropy = ((numbers(6.0)).round() / 3).masked_fill(certain, 0.0)
    log_prob = -(numbers(8.0).round() / 4 + 0.01).masked_fill(certain, 0.0)
    advantages = torch.tensor([-1.5, -0.25, 0.0, 0.5, 2.0])
    advantage = advantages[torch.randint(0, 5, (num_rows,), generator=random)].repeat_interleave(torch.tensor(lengths))
    fields = {
        "entropy": entropy,
        "log_prob": log_prob,
        "advantage": advantage,
        "ref_log_prob": log_prob - numbers(0.3),
        "rollout_log_prob": log_prob + (numbers(4.0).round() - 2) / 16,
        "sum_pi_squared": (-entropy).exp() * (0.5 + numbers(0.5)),
    }
    mask = (numbers(1.0) < eligible).long()
    return ScoredRows(
        {name: list(values.split(lengths)) for name, values in fields.items()},
        list(mask.split(lengths)),
        torch.randperm(num_rows, generator=random).tolist(),
        torch.randint(0, 2**62, (num_rows,), generator=random).tolist(),
    )


def chosen(rows: ScoredRows, rule: Rule, micro_batch: Tensor | None = None) -> tuple[Choice, list[Tensor]]:
    """What a rule makes of a mini-batch in one process, and the token weights of each row."""
    mini_batch = torch.zeros(len(rows), dtype=torch.int64)
    responses = rows.responses(rule)
    choice = choose(responses, pool_of_responses(rule.pool, mini_batch, micro_batch), rule)
    weights = weigh_mini_batches(responses, choice, mini_batch, rule)
    return choice, list(weights.split(rows.lengths.tolist()))
