"""The place of our engines in verl's registry, and how a worker is admitted before the first rollout."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from verl.utils import tensordict_utils as tu
from verl.workers import engine_workers
from verl.workers.engine.base import EngineRegistry

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.verl.config import guarded_name
from entropy_fork.verl.engine import ForkingTokens, admit_worker
from entropy_fork.verl.policy_loss import WEIGHED, _written

VANILLA = guarded_name("vanilla")


class Actor:
    """The actor of verl's worker, which trains the policy."""

    def __init__(self, engine: object) -> None:
        self.engine, self.loss_fn = engine, loss_that_tells

    def set_loss_fn(self, loss_fn: Callable[..., Any]) -> None:
        self.loss_fn = loss_fn


def loss_that_tells(data: Any, **_: Any) -> bool:
    return _written.get()


def worker(engine: object) -> SimpleNamespace:
    return SimpleNamespace(actor=Actor(engine))


def masked_engine() -> ForkingTokens:
    return ForkingTokens.__new__(ForkingTokens)


@pytest.mark.parametrize("held", [False, True])
def test_an_admitted_worker_runs_its_loss_on_weighed_batches_alone(held: bool) -> None:
    """verl holds a worker alone, or beside the worker of another role in one process."""
    ours = worker(masked_engine())
    process = SimpleNamespace(worker_dict={"critic": SimpleNamespace(), "actor_rollout": ours}) if held else ours
    admit_worker(process, VANILLA, True)
    admit_worker(process, VANILLA, True)
    for flags, expected in (({}, False), ({WEIGHED: True}, True)):
        assert ours.actor.loss_fn(model_output={}, data=tu.get_tensordict({}, flags)) is expected


def test_a_worker_that_does_not_know_the_loss_stops() -> None:
    with pytest.raises(ValueError, match="entropy_fork/mine"):
        admit_worker(worker(masked_engine()), guarded_name("mine"), False)


def test_a_worker_with_another_engine_stops() -> None:
    """The check looks at the engine itself, because a user's worker class may not build the registered one."""

    class TheirEngine: ...

    with pytest.raises(EntropyForkError, match=r"engine of .* pid \d+.*TheirEngine.*VERL_ENGINE_VENDOR.*entropy=old"):
        admit_worker(worker(TheirEngine()), VANILLA, True)
    admit_worker(worker(TheirEngine()), VANILLA, False)  # if the driver selects, no engine of ours is needed


def test_a_worker_that_takes_no_loss_stops() -> None:
    for theirs in (SimpleNamespace(), SimpleNamespace(actor=object()), SimpleNamespace(worker_dict={})):
        with pytest.raises(EntropyForkError, match=r"SimpleNamespace in .* has no actor with a loss function"):
            admit_worker(theirs, VANILLA, False)


def test_verls_workers_are_as_they_are_admitted() -> None:
    """Fails if verl changes where a worker has its actor, or where the actor has its loss and engine."""
    from verl.single_controller.ray import base

    assert "self.worker_dict[key] = user_defined_cls(" in inspect.getsource(base.create_colocated_worker_cls)
    assert "self.actor.set_loss_fn(self.loss_fn)" in inspect.getsource(engine_workers.ActorRolloutRefWorker.init_model)
    assert "self.loss_fn = loss_fn" in inspect.getsource(engine_workers.TrainingWorker.set_loss_fn)
    assert "self.engine: BaseEngine = EngineRegistry.new(" in inspect.getsource(engine_workers.TrainingWorker.__init__)


def test_verls_own_entry_stays_in_the_registry() -> None:
    entries = EngineRegistry._engines["language_model"]["fsdp2"]
    assert issubclass(entries[("cpu", "cpu")], ForkingTokens)
    assert not issubclass(entries["cpu"], ForkingTokens)
    assert not issubclass(EngineRegistry.get_engine_cls("value_model", "fsdp2"), ForkingTokens)


def test_verls_worker_takes_gradient_steps_through_the_method_that_we_extend() -> None:
    """Fails if verl changes it: then read what verl does now."""
    source = inspect.getsource(engine_workers.TrainingWorker.train_batch)
    assert "self.engine.train_batch(data, loss_function=self.loss_fn)" in source
