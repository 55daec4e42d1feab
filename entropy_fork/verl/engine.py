"""verl's FSDP engines, with the mask of each gradient step if only the worker can make it.

Hook: verl's public ``EngineRegistry``. It looks for an engine under (device, vendor) first, and then under the device
alone. verl registers its own engines under the device. So our subclasses, registered under (device, vendor), are found
first, and no entry is replaced. A batch without a rule goes straight to verl's own method. Only the update of an actor
has a rule, and only if the worker makes the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tensordict import TensorDict
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name, get_vendor
from verl.workers.engine.base import EngineRegistry

from entropy_fork.common.errors import EntropyForkError, process_name
from entropy_fork.core.user_function import load_function

# Import modules, not names: if one of them has caused this import, it is only half imported and lacks some names.
from entropy_fork.verl import gradient_step, policy_loss, sparse_head
from entropy_fork.verl.config import MASKED_STRATEGIES, NODE

#: vendors of verl's own platforms: verl registers no engine for them. The plugin of another vendor keeps its engine.
VENDORS = ("nvidia", "amd", "huawei", "cpu")


class ForkingTokens(sparse_head.SparseHead):
    """Mixin in front of an engine with an LM head."""

    def train_batch(self, data: TensorDict, loss_function: Callable[..., Any]) -> Any:
        """One gradient step; with a rule in ``data``, on the tokens that it keeps."""
        rule = tu.get_non_tensor_data(data, key=gradient_step.RULE, default=None)
        if rule is None:
            return super().train_batch(data, loss_function)
        step = gradient_step.GradientStep(self, data, rule, loss_function)
        with step.selecting_in_loss():
            outputs = super().train_batch(data, step.loss)
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


def admit_worker(worker: Any, loss_mode: str, in_worker: bool, own: Sequence[tuple[str, str]] = ()) -> None:
    """Run in each training worker before the first rollout: let its loss run on batches that the driver has weighed.

    A worker without this plugin cannot even unpickle this function, so its run stops.

    Args:
        worker: verl's, as Ray holds it.
        loss_mode: the guarded loss that the worker will use.
        in_worker: whether its engine must write the token weights.
        own: the functions of the user's that it will call, as (key, import path).

    Raises:
        EntropyForkError: the worker has no actor that takes a loss function, its engine cannot select, or a function
            of the user's cannot be imported here.
        ValueError: from verl, if the loss is not registered.
    """
    get_policy_loss_fn(loss_mode)
    actor = _actor_of(worker)
    engine = getattr(actor, "engine", None)
    if in_worker and not isinstance(engine, ForkingTokens):
        raise EntropyForkError(
            f"the mask that was asked for is made in the training engine, but the engine of {process_name()} is "
            f"{_full_name(type(engine))}, which cannot make it. Unset VERL_ENGINE_DEVICE and VERL_ENGINE_VENDOR and "
            f"build the engine by verl's EngineRegistry, or write {NODE}.entropy=old {NODE}.pool=mini_batch "
            f"actor_rollout_ref.actor.shuffle=False, which works in every engine."
        )
    for key, path in own:
        try:
            load_function(path, key)
        except ValueError as error:
            raise EntropyForkError(f"{error} (in {process_name()}).") from error
    actor.set_loss_fn(policy_loss.weighed_by_driver(actor.loss_fn))


def _actor_of(worker: Any) -> Any:
    """The actor in a worker, which trains the policy. One worker of verl may hold the workers of several roles."""
    for held in (worker, *getattr(worker, "worker_dict", {}).values()):
        actor = getattr(held, "actor", None)
        if callable(getattr(actor, "set_loss_fn", None)) and getattr(actor, "loss_fn", None) is not None:
            return actor
    raise EntropyForkError(
        f"a mask was asked for, but {_full_name(type(worker))} in {process_name()} has no actor with a loss function: "
        f"it would train on all tokens. Derive a worker of your own from verl's ActorRolloutRefWorker, or write "
        f"entropy_fork=off."
    )


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _engine_of(strategy: str) -> type | None:
    try:
        return EngineRegistry.get_engine_cls("language_model", strategy)
    except ValueError:  # none for this device: a head node without accelerators, FSDP1 on a CPU
        return None


install()
