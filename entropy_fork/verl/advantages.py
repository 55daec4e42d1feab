"""Forms of Ψ_t that verl does not have, as values of ``algorithm.adv_estimator``.

Hook: verl's public registry of advantage estimators (``verl/trainer/ppo/core_algos.py: register_adv_est``). The math is
in ``core/returns.py``. γ and λ are verl's ``algorithm.gamma`` and ``algorithm.lam``. These estimators do not whiten and
do not divide by a standard deviation, unlike verl's ``gae`` and ``grpo``. The mask does not depend on the estimator:
with ``entropy_fork=global`` each of them trains on forking tokens, which is the seventh form.

verl gives a registered estimator the rewards, the mask, the groups and the config. It gives the critic's values only to
its own ``gae``. So ``compute_advantage`` is wrapped, in the module that the V1 trainer imports it from, to remember the
values of the batch at hand. Version guard: plugin.py. ``tests/verl/test_advantages.py`` fails if verl calls it in
another way.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
import wrapt
from torch import Tensor
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, register_adv_est
from verl.trainer.ppo.v1 import utils

from entropy_fork.common.errors import EntropyForkError, process_name
from entropy_fork.core import returns
from entropy_fork.verl.config import NEED_CRITIC

_values: ContextVar[Tensor | None] = ContextVar("entropy_fork_values", default=None)


def _register(name: str) -> Callable[[Any], Any]:
    """verl's ``register_adv_est``, unless a user's module has registered an estimator with this name."""
    return (lambda estimator: estimator) if name in ADV_ESTIMATOR_REGISTRY else register_adv_est(name)


@_register("total_return")
def total_return(token_level_rewards: Tensor, response_mask: Tensor, config: Any, **_: Any) -> tuple[Tensor, Tensor]:
    """Form 1. All tensors have the shape (rows, response_length). Returns Ψ and the critic's targets."""
    psi = returns.total_return(token_level_rewards, response_mask, config.gamma)
    return psi, returns.reward_to_go(token_level_rewards, response_mask, config.gamma)


@_register("reward_to_go")
def reward_to_go(token_level_rewards: Tensor, response_mask: Tensor, config: Any, **_: Any) -> tuple[Tensor, Tensor]:
    """Form 2; shapes as :func:`total_return`."""
    to_go = returns.reward_to_go(token_level_rewards, response_mask, config.gamma)
    return to_go, to_go


@_register("reward_to_go_baseline")
def reward_to_go_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any, index: np.ndarray, **_: Any
) -> tuple[Tensor, Tensor]:
    """Form 3 with the mean of the group. ``index``: the question of each row, shape (rows,)."""
    return _minus_baseline(token_level_rewards, response_mask, config.gamma, index, leave_one_out=False)


@_register("reward_to_go_leave_one_out")
def reward_to_go_leave_one_out(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any, index: np.ndarray, **_: Any
) -> tuple[Tensor, Tensor]:
    """Form 3 with the mean of the other answers to the question; shapes as :func:`reward_to_go_baseline`."""
    return _minus_baseline(token_level_rewards, response_mask, config.gamma, index, leave_one_out=True)


def _minus_baseline(
    rewards: Tensor, mask: Tensor, gamma: float, index: np.ndarray, leave_one_out: bool
) -> tuple[Tensor, Tensor]:
    to_go = returns.reward_to_go(rewards, mask, gamma)
    group = torch.from_numpy(np.unique(index, return_inverse=True)[1]).to(rewards.device)
    worth = returns.trajectory_return(rewards, mask, gamma)
    baseline = returns.group_baseline(worth, group, leave_one_out)
    return (to_go - baseline[:, None]) * mask, to_go


@_register("q_value")
def q_value(token_level_rewards: Tensor, response_mask: Tensor, config: Any, **_: Any) -> tuple[Tensor, Tensor]:
    """Form 4, from the critic's values; shapes as :func:`total_return`. The targets are λ-returns, as in verl's gae."""
    values = _critic_values("q_value")
    psi = returns.q_value(token_level_rewards, values, response_mask, config.gamma)
    return psi, _lambda_returns(token_level_rewards, values, response_mask, config)


@_register("td_residual")
def td_residual(token_level_rewards: Tensor, response_mask: Tensor, config: Any, **_: Any) -> tuple[Tensor, Tensor]:
    """Form 6, from the critic's values; shapes as :func:`total_return`. The targets are λ-returns, as in verl's gae."""
    values = _critic_values("td_residual")
    psi = returns.td_residual(token_level_rewards, values, response_mask, config.gamma)
    return psi, _lambda_returns(token_level_rewards, values, response_mask, config)


def _lambda_returns(rewards: Tensor, values: Tensor, mask: Tensor, config: Any) -> Tensor:
    return returns.gae(rewards, values, mask, config.gamma, config.lam) + values * mask


def _critic_values(name: str) -> Tensor:
    values = _values.get()
    if values is None:
        raise EntropyForkError(
            f"algorithm.adv_estimator={name} needs the values of a critic, and there are none in {process_name()}. "
            f"Write critic.enable=True and trainer.use_v1=True."
        )
    return values


@wrapt.decorator
def _remembering_values(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    data, estimator = args[0], kwargs["adv_estimator"]
    token = _values.set(data.batch["values"] if estimator in NEED_CRITIC and "values" in data.batch else None)
    try:
        return wrapped(*args, **kwargs)
    finally:
        _values.reset(token)


utils.compute_advantage = _remembering_values(utils.compute_advantage)
