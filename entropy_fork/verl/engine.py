"""verl's FSDP engines, with the mask of each gradient step where it can only be made in the worker.

Hook: verl's public ``EngineRegistry``. It looks for an engine under (device, vendor) before it looks under the device
alone, and verl registers its own under the device: so these subclasses are found first, and no entry is replaced. A
batch without a rule (every pass but the masked actor's update) goes straight to verl's own method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensordict import TensorDict
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name, get_vendor
from verl.workers.engine.base import EngineRegistry

# As a module: where importing it is what imported verl's engines, it is half-way through at this moment.
from entropy_fork.verl import gradient_step, sparse_head
from entropy_fork.verl.config import MASKED_STRATEGIES, NODE
from entropy_fork.verl.errors import EntropyForkError, process_name

#: vendors of verl's own platforms, which register no engine of their own; another vendor's plugin may, and keeps it
VENDORS = ("nvidia", "amd", "huawei", "cpu")


class ForkingTokens(sparse_head.SparseHead):
    """Mixin in front of an engine with an LM head."""

    def train_batch(self, data: TensorDict, loss_function: Callable[..., Any]) -> Any:
        """One gradient step; with a rule in ``data``, on the tokens that it keeps."""
        rule = tu.get_non_tensor_data(data, key=gradient_step.RULE, default=None)
        if rule is None:
            return super().train_batch(data, loss_function)  # type: ignore[misc]
        step = gradient_step.GradientStep(self, data, rule, loss_function)
        with step.entropy_without_gradient():
            outputs = super().train_batch(data, step.loss)  # type: ignore[misc]
        outputs["metrics"].update(step.metrics())
        return outputs


def install() -> None:
    """Register the subclasses for this process's platform; a second call changes nothing."""
    if get_vendor() not in VENDORS:
        return
    for strategy in MASKED_STRATEGIES:
        engine = _engine_of(strategy)
        if engine is not None and not issubclass(engine, ForkingTokens):
            masked = type(engine.__name__, (ForkingTokens, engine), {"__module__": __name__, "__doc__": engine.__doc__})
            register = EngineRegistry.register("language_model", strategy, get_device_name(), get_vendor())
            register(masked)


def check_worker(_: Any, loss_mode: str, strategy: str | None) -> None:
    """Run in each training worker before the first rollout; one without this plugin cannot even unpickle it.

    Args:
        loss_mode: the guarded loss that the worker will be asked for.
        strategy: its engine, where that is what makes the selection; else None.

    Raises:
        EntropyForkError: the worker's engine does not apply a rule.
        ValueError: verl's, for a loss that is not registered.
    """
    get_policy_loss_fn(loss_mode)
    if strategy is None:
        return
    engine = _engine_of(strategy)
    if engine is None or not issubclass(engine, ForkingTokens):
        raise EntropyForkError(
            f"a mask was asked for that is made in the engine, but the engine of {process_name()} is another one than "
            f"entropy_fork's. Unset VERL_ENGINE_DEVICE and VERL_ENGINE_VENDOR, or write {NODE}.entropy=old "
            f"{NODE}.pool=mini_batch actor_rollout_ref.actor.shuffle=False, which works in every engine."
        )


def _engine_of(strategy: str) -> type | None:
    try:
        return EngineRegistry.get_engine_cls("language_model", strategy)
    except ValueError:  # none for this device: a head node without accelerators, FSDP1 on a CPU
        return None


install()
