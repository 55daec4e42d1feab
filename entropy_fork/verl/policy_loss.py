"""The guard in the worker: policy losses that compute verl's loss, but refuse a batch without our token weights.

Hook: verl's public registry of policy losses (``verl/trainer/ppo/core_algos.py: register_policy_loss``). A masked run
tells its workers to use the loss ``entropy_fork/NAME`` instead of ``NAME`` (see ``trainer.py``, ``launch.py``). A
worker without this plugin does not know that name and stops. A worker with the plugin runs the loss only inside the
context :func:`weights_written`. The field ``rollout_is_weights`` alone proves nothing, because rollout correction
writes importance weights into the same field. Two callers open the context:

- :func:`weighed_by_driver`, around the worker's loss function, for batches with the driver's flag :data:`WEIGHED`;
- ``gradient_step.py``, if the worker itself writes the token weights.

``reinforce`` is a loss of our own: -Ψ_t log π, without a ratio and without clipping. With it, each form of Ψ_t can be
run as textbooks write it. verl's ``gpg`` is that formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn, register_policy_loss
from verl.utils import tensordict_utils as tu

from entropy_fork.common.errors import EntropyForkError, process_name

# A module, not a name: if it has caused this import, it is only half imported.
from entropy_fork.verl import clip_by_token
from entropy_fork.verl.config import MASKABLE_LOSSES, NODE, guarded_name

#: the flag of a batch whose token weights the driver has written
WEIGHED = "entropy_fork_weighed"

#: the flag of a batch that has a clip range for each token, and the fields that the driver writes then: the lowest and
#: the highest ratio of each response token; float32, shape (num_tokens,), flat
CLIPPED = "entropy_fork_clipped"
CLIP_LOWEST, CLIP_HIGHEST = "entropy_fork_clip_lowest", "entropy_fork_clip_highest"

_written = ContextVar("entropy_fork_weights_written", default=False)
_sees_kept_only = ContextVar("entropy_fork_sees_kept_only", default=False)
_bounds: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("entropy_fork_bounds", default=None)


@contextmanager
def weights_written() -> Iterator[None]:
    """Declare that the weights of the micro-batch at hand were written in this process."""
    token = _written.set(True)
    try:
        yield
    finally:
        _written.reset(token)


def weighed_by_driver(loss_function: Callable[..., Any]) -> Callable[..., Any]:
    """The same loss function, inside :func:`weights_written` if the batch has the flag :data:`WEIGHED`.

    If the batch has the flag :data:`CLIPPED`, the loss gets the clip range of each token.

    Raises:
        EntropyForkError: when it is called, the batch has that flag but no clip ranges.
    """

    def loss(**arguments: Any) -> Any:
        data = arguments["data"]
        if not tu.get_non_tensor_data(data, key=WEIGHED, default=False):
            return loss_function(**arguments)
        clipped = tu.get_non_tensor_data(data, key=CLIPPED, default=False)
        token = _bounds.set(_padded_bounds(data) if clipped else None)
        try:
            with weights_written():
                return loss_function(**arguments)
        finally:
            _bounds.reset(token)

    return loss


def _padded_bounds(data: Any) -> tuple[Tensor, Tensor]:
    """The clip range of each token in the shape of verl's losses: (rows, response_length), padded with 0."""
    if CLIP_LOWEST not in data or CLIP_HIGHEST not in data:
        raise EntropyForkError(
            f"entropy_fork.use=clip was asked for, but the batch has no clip ranges in {process_name()}. It would "
            f"train with verl's range, so it stops here."
        )
    padded = data.select(CLIP_LOWEST, CLIP_HIGHEST).to_padded_tensor()
    return padded[CLIP_LOWEST], padded[CLIP_HIGHEST]


def seeing_kept_only(loss_function: Callable[..., Any]) -> Callable[..., Any]:
    """The same loss function, with metrics over the kept tokens, because dropped tokens have no new log-probability."""

    def loss(**arguments: Any) -> Any:
        token = _sees_kept_only.set(True)
        try:
            return loss_function(**arguments)
        finally:
            _sees_kept_only.reset(token)

    return loss


def _guarded(name: str) -> Callable[..., Any]:
    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        if rollout_is_weights is None or not _written.get():
            raise EntropyForkError(
                f"a mask was asked for, but no token weights reached the policy loss in {process_name()}. It would "
                f"train on all tokens, so it stops here. Token weights come from verl's PPOTrainer: a trainer of your "
                f"own must call its _compute_advantage and _update_actor."
            )
        bounds = _bounds.get()
        arguments: dict[str, Any] = {
            "old_log_prob": old_log_prob,
            "log_prob": log_prob,
            "advantages": advantages,
            "response_mask": response_mask,
            "loss_agg_mode": loss_agg_mode,
            "config": config,
            "rollout_is_weights": rollout_is_weights,
        }
        if bounds is not None:
            loss, metrics = clip_by_token.clipped_by_token(**arguments, bounds=bounds)
        else:  # Looked up at every call: if somebody registers another loss under verl's name, that one is used.
            loss, metrics = get_policy_loss_fn(name)(**arguments)
        kept = (rollout_is_weights != 0) & response_mask.bool()
        if _sees_kept_only.get():
            metrics = _of_kept(metrics, float(kept.sum() / response_mask.sum()))
        sums = kept_sums(old_log_prob, log_prob.detach(), advantages, kept, config, bounds)
        sums[f"{NODE}/loss_dropped"] = float((response_mask.bool() & ~kept).sum())
        sums[f"{NODE}/loss_weighed"] = float((response_mask.bool() & (rollout_is_weights != 1)).sum())
        return loss, metrics | sums

    return policy_loss


def _of_kept(metrics: dict[str, Any], share: float) -> dict[str, Any]:
    """Turn verl's means over all tokens into means over the kept ones. A dropped token has added 0."""
    return {name: value / share if share else 0.0 for name, value in metrics.items()}


def kept_sums(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    kept: Tensor,
    config: Any,
    bounds: tuple[Tensor, Tensor] | None = None,
) -> dict[str, float]:
    """What verl's ``pg_clipfrac`` and ``ppo_kl`` would be on the kept tokens, as sums over a micro-batch.

    verl averages a loss's metrics over the micro-batches and ranks of a mini-batch, without regard to their sizes, and
    then over mini-batches. The ratio of two averaged sums (see :func:`kept_means`) is still exact in one mini-batch. It
    is exact in a step too, if all its mini-batches have the same number of micro-batches. With dynamic batch sizes that
    number may differ: then a mini-batch with more micro-batches counts for less.

    Args:
        old_log_prob: float, shape (rows, response_length), nats.
        log_prob: float, same shape, nats: of the current policy.
        advantages: float, same shape.
        kept: bool, same shape.
        config: verl's ``ActorConfig``, for its clip range.
        bounds: the lowest and the highest ratio of each token, same shape, if each has its own range.

    Returns:
        The number of kept tokens; how many of them PPO's clip would remove from the gradient (whether or not this loss
        clips); and the sum of ``old_log_prob - log_prob`` over them.
    """
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    log_ratio = (log_prob - old_log_prob).clamp(-20.0, 20.0)  # as verl does, against overflow
    ratio = log_ratio.exp()
    lowest, highest = (1 - low, 1 + high) if bounds is None else bounds
    clipped = ((ratio > highest) & (advantages > 0)) | ((ratio < lowest) & (advantages < 0))
    return {
        f"{NODE}/loss_tokens": float(kept.sum()),
        f"{NODE}/loss_clipped": float((clipped & kept).sum()),
        f"{NODE}/loss_kl": float(torch.where(kept, -log_ratio, 0.0).sum()),
    }


def kept_means(sums: dict[str, float]) -> dict[str, float]:
    """``pg_clipfrac`` and ``ppo_kl`` (nats) of the kept tokens, from (averaged) :func:`kept_sums`.

    Raises:
        EntropyForkError: there are no such sums, so the update did not run the guarded loss.
    """
    if f"{NODE}/loss_tokens" not in sums:
        raise EntropyForkError(
            f"a mask was asked for, but the actor's update did not run the loss that applies it: {process_name()} got "
            f"no metric {NODE}/loss_tokens back. A worker of your own must call the loss function that it is given "
            f"(set_loss_fn). entropy_fork=off trains without the mask."
        )
    tokens = sums[f"{NODE}/loss_tokens"]
    if tokens == 0:
        return {}
    return {
        f"{NODE}/pg_clipfrac": sums[f"{NODE}/loss_clipped"] / tokens,
        f"{NODE}/ppo_kl": sums[f"{NODE}/loss_kl"] / tokens,
    }


def reinforce(**arguments: Any) -> tuple[Tensor, dict[str, Any]]:
    """-Ψ_t log π(a_t | s_t), for one gradient step per batch (``checks.py: check_on_policy``).

    Arguments, shapes and aggregation are those of every policy loss of verl's.
    """
    return get_policy_loss_fn("gpg")(**arguments)


if "reinforce" not in POLICY_LOSS_REGISTRY:  # a user's module may have registered its own
    register_policy_loss("reinforce")(reinforce)

for _name in MASKABLE_LOSSES:
    register_policy_loss(guarded_name(_name))(_guarded(_name))
