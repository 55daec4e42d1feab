"""PPO's clipped loss with a clip range for each token (``use=clip``).

verl's ``vanilla`` has one range for all tokens (``verl/trainer/ppo/core_algos.py: compute_policy_loss_vanilla``). This
loss does the same with a range per token, and with equal ranges it is equal to the last bit. The driver computes the
ranges, so this loss knows nothing of scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils.torch_functional import masked_mean

from entropy_fork.common.errors import EntropyForkError


def clipped_by_token(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: Any,
    rollout_is_weights: Tensor,
    bounds: tuple[Tensor, Tensor],
) -> tuple[Tensor, dict[str, Any]]:
    """The loss of a micro-batch, and verl's metrics of it.

    Args:
        old_log_prob: float, shape (rows, response_length), nats.
        log_prob: float, same shape, nats: of the current policy, with a gradient.
        advantages: float, same shape.
        response_mask: bool, same shape.
        loss_agg_mode: verl's.
        config: verl's ``ActorConfig``, for ``clip_ratio_c`` and the sizes of the whole mini-batch.
        rollout_is_weights: float, same shape: multiplied into the loss of each token.
        bounds: the lowest and the highest ratio of each token: two tensors, float32, same shape.

    Raises:
        EntropyForkError: ``clip_ratio_c`` is not above 1, which verl refuses too.
    """
    dual = config.get("clip_ratio_c", 3.0)
    if not dual > 1.0:
        raise EntropyForkError(f"actor.clip_ratio_c must be above 1, got {dual}; verl's default is 3.0")
    log_ratio = (log_prob - old_log_prob).clamp(min=-20.0, max=20.0)  # as verl does, against overflow
    ratio = log_ratio.exp()
    lowest, highest = (bound.to(ratio.dtype) for bound in bounds)
    plain, clipped = -advantages * ratio, -advantages * torch.clamp(ratio, lowest, highest)
    larger = torch.maximum(plain, clipped)
    limit = -advantages * dual  # PPO's second clip, for negative advantages
    losses = torch.where(advantages < 0, torch.min(limit, larger), larger) * rollout_is_weights
    loss = agg_loss(losses, response_mask, loss_agg_mode, **config.global_batch_info)
    below = torch.gt(larger, limit) * (advantages < 0).float()
    return loss, {
        "actor/pg_clipfrac": masked_mean(torch.gt(clipped, plain).float(), response_mask).detach().item(),
        "actor/ppo_kl": masked_mean(-log_ratio, response_mask).detach().item(),
        "actor/pg_clipfrac_lower": masked_mean(below, response_mask).detach().item(),
    }
