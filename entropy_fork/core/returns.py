"""The six forms of Ψ_t in the policy gradient E[Σ_t Ψ_t ∇ log π(a_t | s_t)] (Schulman et al., 2016, Eq. 1).

| form | Ψ_t | here |
|---|---|---|
| 1 | total reward of the trajectory | :func:`total_return` |
| 2 | reward that follows the action | :func:`reward_to_go` |
| 3 | the same minus a baseline | :func:`reward_to_go` - :func:`group_baseline` |
| 4 | state-action value Q(s_t, a_t) | :func:`q_value` |
| 5 | advantage A(s_t, a_t) | :func:`gae` |
| 6 | TD residual | :func:`td_residual` |

The seventh form, training on forking tokens, multiplies any of these by 1 for a kept token and by 0 for a dropped one:
``selection.py``.

Unlike the rest of this package, these functions take padded tensors of shape (rows, length), as verl's advantage
estimators do. An *action* is a position where ``response_mask`` is set, and each action is one step of time. Positions
between actions (the output of a tool) and after the last action (padding) have no Ψ and no discount. A reward at such a
position belongs to the action before it, which caused it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Actions:
    """Numbers the actions of each row, and converts from positions to actions and back.

    Args:
        response_mask: bool or 0/1, shape (rows, length).
    """

    response_mask: Tensor

    @cached_property
    def _number(self) -> Tensor:
        """The action that a position belongs to: its own, else the last one before it, else the first of the row."""
        return (self.response_mask.long().cumsum(dim=1) - 1).clamp_(min=0)

    def gather(self, rewards: Tensor) -> Tensor:
        """The sum of the rewards that belong to each action, shape (rows, length): column k is the k-th action.

        Args:
            rewards: float, shape (rows, length).
        """
        return torch.zeros_like(rewards).scatter_add_(1, self._number, rewards)

    def pick(self, values: Tensor) -> Tensor:
        """The value at each action's position, shape (rows, length): column k is the k-th action, 0 after the last."""
        return self.gather(values.masked_fill(~self.response_mask.bool(), 0.0))

    def spread(self, of_actions: Tensor) -> Tensor:
        """The reverse, shape (rows, length): each action's number at the action's position, 0 at all others."""
        return of_actions.gather(1, self._number) * self.response_mask


def discounted_sums(x: Tensor, gamma: float) -> Tensor:
    """``Σ_{k ≥ t} gamma^(k-t) x_k`` for each t, along the last dimension, without a loop over it.

    After pass i, each number is the discounted sum of 2^i numbers: itself and those after it.

    Args:
        x: float, shape (…, length).
        gamma: the discount from one element to the next.

    Returns:
        Float, same shape.
    """
    if gamma == 1.0:
        return x.flip(-1).cumsum(-1).flip(-1)
    width, factor = 1, gamma
    while width < x.shape[-1] and factor != 0.0:
        x = x + torch.nn.functional.pad(factor * x[..., width:], (0, width))
        width, factor = 2 * width, factor**2
    return x


def reward_to_go(rewards: Tensor, response_mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Form 2: the discounted reward from each action on. An action cannot change what came before it.

    Args:
        rewards: float, shape (rows, length): any number of rewards per row.
        response_mask: bool or 0/1, same shape.
        gamma: the discount from one action to the next.

    Returns:
        Float, same shape; 0 where there is no action.
    """
    actions = Actions(response_mask)
    return actions.spread(discounted_sums(actions.gather(rewards), gamma))


def total_return(rewards: Tensor, response_mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Form 1: the (discounted) reward of the whole trajectory, at each of its actions: REINFORCE (Williams, 1992).

    Args and Returns as :func:`reward_to_go`, which gives the same number at the first action.
    """
    return trajectory_return(rewards, response_mask, gamma)[:, None] * response_mask


def trajectory_return(rewards: Tensor, response_mask: Tensor, gamma: float = 1.0) -> Tensor:
    """The discounted reward of each trajectory, float, shape (rows,). Args as :func:`reward_to_go`."""
    of_actions = Actions(response_mask).gather(rewards)
    steps = torch.arange(rewards.shape[1], device=rewards.device, dtype=rewards.dtype)
    return (of_actions * gamma**steps).sum(dim=1)


def group_baseline(returns: Tensor, group: Tensor, leave_one_out: bool = False) -> Tensor:
    """The mean return of the answers to the same question: the baseline b(s_t) of form 3.

    The mean over the whole group contains the answer itself, so in a group of n answers it multiplies the expected
    gradient by (n-1)/n. The mean over the *other* answers (Kool et al., 2019; RLOO) does not depend on the answer, so
    it does not change the expectation. In a group of one answer the baseline is 0.

    Args:
        returns: float, shape (rows,), see :func:`trajectory_return`.
        group: int64, shape (rows,): the number of each answer's question, from 0.
        leave_one_out: True for the mean over the other answers, False for the mean over the whole group.

    Returns:
        Float, shape (rows,).
    """
    groups = int(group.max()) + 1 if group.numel() else 0
    sums = returns.new_zeros(groups).index_add_(0, group, returns)[group]
    sizes = returns.new_zeros(groups).index_add_(0, group, torch.ones_like(returns))[group]
    if leave_one_out:
        return (sums - returns) / (sizes - 1).clamp(min=1)
    return torch.where(sizes > 1, sums / sizes, 0.0)


def q_value(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Form 4: ``r_t + gamma V(s_{t+1})``, an action's reward and the critic's value of the next state.

    Args:
        rewards: float, shape (rows, length).
        values: float, same shape: V(s_t), the critic's value of the state in which action t is chosen. Values at
            positions without an action have no effect.
        response_mask: bool or 0/1, same shape.
        gamma: the discount from one action to the next. After the last action the value is 0.

    Returns:
        Float, same shape; 0 where there is no action.
    """
    actions = Actions(response_mask)
    return actions.spread(_q_value(actions.gather(rewards), actions.pick(values), gamma))


def td_residual(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Form 6: ``r_t + gamma V(s_{t+1}) - V(s_t)``; with the true V its expectation is the advantage.

    Args and Returns as :func:`q_value`.
    """
    return gae(rewards, values, response_mask, gamma, lam=0.0)


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float = 1.0, lam: float = 1.0) -> Tensor:
    """Form 5, generalised (Schulman et al., 2016, Eq. 16): the TD residuals from each action on, discounted by γλ.

    ``lam`` = 0 is the TD residual, ``lam`` = 1 the reward to go minus V. verl's own ``gae`` is the same, whitened over
    the batch, except that it drops a reward at a position without an action.

    Args and Returns as :func:`q_value`.
    """
    actions = Actions(response_mask)
    value = actions.pick(values)
    residual = _q_value(actions.gather(rewards), value, gamma) - value
    return actions.spread(discounted_sums(residual, gamma * lam))


def _q_value(reward: Tensor, value: Tensor, gamma: float) -> Tensor:
    return reward + gamma * torch.nn.functional.pad(value[:, 1:], (0, 1))
