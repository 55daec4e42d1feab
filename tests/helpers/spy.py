"""Record what reaches the loss in the worker. Every process of a real run loads this (VERL_USE_EXTERNAL_MODULES).

It wraps entries of verl's public registry of policy losses, so it sees exactly what verl's ppo_loss passes to them. It
also wraps the advantages and the selection on the driver, and the selection in the worker, so that a test can compare
driver and worker of the same run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import wrapt

FOLDER = Path(os.environ["ENTROPY_FORK_SPY"])


def _save(kind: str, **tensors: Any) -> None:
    number = len(list(FOLDER.glob(f"{kind}-{os.getpid()}-*.pt")))
    torch.save(tensors, FOLDER / f"{kind}-{os.getpid()}-{number:03d}.pt")


def _note_loss(module: Any) -> None:
    @wrapt.decorator
    def noting(wrapped, instance, args, kwargs):  # type: ignore[no-untyped-def]
        names = ("rollout_is_weights", "response_mask", "old_log_prob", "advantages")
        _save("loss", **{name: kwargs[name] for name in names})
        return wrapped(**kwargs)

    for name in ("vanilla", "gpg"):  # "reinforce" calls gpg
        module.POLICY_LOSS_REGISTRY[name] = noting(module.POLICY_LOSS_REGISTRY[name])


def _note_advantages(module: Any) -> None:
    @wrapt.decorator
    def noting(wrapped, instance, args, kwargs):  # type: ignore[no-untyped-def]
        data = wrapped(*args, **kwargs)
        names = ("token_level_rewards", "values", "response_mask", "advantages", "returns")
        _save("advantages", **{name: data.batch[name] for name in names if name in data.batch})
        return data

    wrapped = module.compute_advantage_for_multi_trajectories
    module.compute_advantage_for_multi_trajectories = noting(wrapped)


def _note_selection(module: Any) -> None:
    @wrapt.decorator
    def noting(wrapped, instance, args, kwargs):  # type: ignore[no-untyped-def]
        weights = wrapped(*args, **kwargs)
        responses, _, mini_batch, _ = args
        _save(
            "selection",
            weights=weights,
            mini_batch=mini_batch,
            response_mask=responses.eligible,
            entropy=responses.entropy,
            lengths=responses.lengths,
        )
        return weights

    module.weigh_mini_batches = noting(module.weigh_mini_batches)


def _note_gradient_steps(module: Any) -> None:
    @wrapt.decorator
    def noting(wrapped, instance, args, kwargs):  # type: ignore[no-untyped-def]
        weights = wrapped(*args, **kwargs)
        responses, choice, counts = args
        _save(
            "step",
            weights=weights,
            kept=choice.kept,
            response_mask=responses.eligible,
            entropy=responses.entropy,
            lengths=responses.lengths,
            rows=responses.order,
            counts=torch.tensor([counts.num_tokens, counts.num_kept]),
        )
        return weights

    module.GradientStep._weigh = noting(module.GradientStep._weigh)


wrapt.register_post_import_hook(_note_loss, "verl.trainer.ppo.core_algos")
wrapt.register_post_import_hook(_note_advantages, "verl.trainer.ppo.v1.trainer_base")
wrapt.register_post_import_hook(_note_selection, "entropy_fork.verl.masking")
wrapt.register_post_import_hook(_note_gradient_steps, "entropy_fork.verl.gradient_step")
