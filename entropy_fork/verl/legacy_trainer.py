"""Refuse verl's legacy trainer, which has no token weights, if the config asks for a mask.

Hook: none. ``RayPPOTrainer`` is the legacy trainer. Programs outside of verl still derive their trainers from it, and
such a program does not run main_ppo's checks. So the constructor is wrapped: if the config asks for a mask, it stops
instead of training on all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import wrapt
from verl.trainer.ppo.ray_trainer import RayPPOTrainer

from entropy_fork.common.errors import EntropyForkError, process_name
from entropy_fork.verl.config import read_config


@wrapt.decorator
def _refusing_a_mask(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    if read_config(kwargs["config"] if "config" in kwargs else args[0]) is not None:
        raise EntropyForkError(
            f"{type(instance).__name__} in {process_name()} has no token weights and would train on all tokens. Use "
            f"the V1 trainer (verl.trainer.main_ppo with trainer.use_v1=True), or entropy_fork=off."
        )
    return wrapped(*args, **kwargs)


RayPPOTrainer.__init__ = _refusing_a_mask(RayPPOTrainer.__init__)
