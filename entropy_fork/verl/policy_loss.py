"""The guard in the worker: verl's policy losses, refusing to run where the token weights did not arrive.

Hook: verl's public registry of policy losses (``verl/trainer/ppo/core_algos.py: register_policy_loss``). A masked run
sends its workers the loss ``entropy_fork/NAME`` in the place of ``NAME`` (see ``trainer.py``). It computes what verl's
loss computes. A worker without this plugin does not know the name and stops; a worker whose batch has no weights stops
too, instead of training on all tokens. Either way the error comes from the process that would have got it wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn, register_policy_loss

from entropy_fork.verl.config import MASKABLE_LOSSES, guarded_name
from entropy_fork.verl.errors import EntropyForkError, process_name


def _guarded(name: str) -> Callable[..., Any]:
    @functools.wraps(POLICY_LOSS_REGISTRY[name])
    def policy_loss(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("rollout_is_weights") is None:
            raise EntropyForkError(
                f"a mask was asked for, but no token weights reached the policy loss in {process_name()}: it would "
                f"train on all tokens, so it stops here."
            )
        # Looked up at every call, so that a loss which somebody registers anew under verl's name is the one used.
        return get_policy_loss_fn(name)(*args, **kwargs)

    return policy_loss


for _name in MASKABLE_LOSSES:
    register_policy_loss(guarded_name(_name))(_guarded(_name))
