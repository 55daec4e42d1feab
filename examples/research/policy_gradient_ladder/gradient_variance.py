"""Measure, in the training worker of a real run, how much the gradient would vary from batch to batch.

``VERL_USE_EXTERNAL_MODULES=gradient_variance`` makes verl import this file in every process. A batch is N questions.
Each micro-batch is the answers to one question (``ppo_micro_batch_size_per_gpu`` = ``rollout.n``), so its gradient is
one of N independent terms of a sum. The spread of the terms gives the variance of the sum without a second batch:

    Var[g] ≈ N / (N - 1) · Σ_i |g_i - mean(g)|²,     |E[g]|² ≈ |g|² - Var[g]

All terms have the same denominator, the number of tokens of the batch. A line of JSON per gradient step goes to the
file ENTROPY_FORK_GRADIENTS. Works on one training rank only, whose gradients are not sharded.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import wrapt

FILE = Path(os.environ["ENTROPY_FORK_GRADIENTS"])


class Spread:
    """The gradients of one step's micro-batches: the differences between successive accumulated gradients."""

    def __init__(self) -> None:
        self.squares: list[float] = []
        self.sum: torch.Tensor | float = 0.0

    def note(self, accumulated: torch.Tensor) -> None:
        """The sum of the gradients so far, flat."""
        self.squares.append(float((accumulated - self.sum).square().sum()))
        self.sum = accumulated

    def line(self) -> dict[str, float]:
        """The variance of the sum (the trace), and the signal: the squared norm minus the variance."""
        terms, norm = len(self.squares), float(torch.as_tensor(self.sum).square().sum())
        variance = (terms * sum(self.squares) - norm) / (terms - 1)
        return {"terms": terms, "square": norm, "variance": variance, "signal": norm - variance}


def _gradients(engine: Any) -> torch.Tensor:
    parts = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.cat([getattr(part, "_local_tensor", part).detach().flatten() for part in parts])


def _in_groups(module: Any) -> None:
    """Sort a batch by its keys, ``{question}_{answer}_{output}``, so that a question's answers are neighbours."""

    @wrapt.decorator
    def sorting(wrapped, instance, args, kwargs):  # type: ignore[no-untyped-def]
        batch = wrapped(*args, **kwargs)
        batch.reorder(sorted(range(len(batch)), key=lambda row: batch.keys[row]))
        return batch

    module.PPOTrainer._balance_batch = sorting(module.PPOTrainer._balance_batch)


def _watch(module: Any) -> None:
    actor, critic = module.FSDPEngineWithLMHead, module.FSDPEngineWithValueHead
    forward_step, optimizer_step = actor.forward_step, module.FSDPEngine.optimizer_step

    def noting_forward_step(self: Any, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        if not forward_only and not isinstance(self, critic):
            if hasattr(self, "spread"):
                self.spread.note(_gradients(self))
            else:
                self.spread = Spread()
        return forward_step(self, micro_batch, loss_function, forward_only)

    def noting_optimizer_step(self: Any) -> Any:
        if hasattr(self, "spread"):
            self.spread.note(_gradients(self))
            with FILE.open("a") as file:
                file.write(json.dumps(self.spread.line()) + "\n")
            del self.spread
        return optimizer_step(self)

    actor.forward_step, module.FSDPEngine.optimizer_step = noting_forward_step, noting_optimizer_step


wrapt.register_post_import_hook(_in_groups, "verl.trainer.ppo.v1.trainer_base")
wrapt.register_post_import_hook(_watch, "verl.workers.engine.fsdp.transformer_impl")
