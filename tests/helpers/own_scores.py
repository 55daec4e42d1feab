"""Scores of a user, by import path ``helpers.own_scores:NAME``."""

from __future__ import annotations

from torch import Tensor

#: how often each was called
CALLS: list[str] = []


def confident_and_wrong(entropy: Tensor, log_prob: Tensor) -> Tensor:
    """The surprisal <b>beyond</b> the entropy."""
    CALLS.append("confident_and_wrong")
    return -log_prob - entropy


def of_advantage(advantage: Tensor) -> Tensor:
    """The size of the advantage."""
    return advantage.abs()


def fails_on_long(entropy: Tensor, length: Tensor) -> Tensor:
    if length.max() > 13:
        raise RuntimeError("too long for me")
    return entropy


def no_number(entropy: Tensor) -> Tensor:
    return entropy / 0.0
