"""Where the engines of masked runs stand in verl's registry, and what a worker says before the first rollout."""

from __future__ import annotations

import inspect

import pytest
from verl.workers import engine_workers
from verl.workers.engine.base import EngineRegistry

from entropy_fork.verl.config import guarded_name
from entropy_fork.verl.engine import ForkingTokens, check_worker
from entropy_fork.verl.errors import EntropyForkError


def test_a_worker_with_the_plugin_is_ready() -> None:
    check_worker(None, guarded_name("vanilla"), None)
    check_worker(None, guarded_name("vanilla", in_worker=True), "fsdp2")


def test_a_worker_that_does_not_know_the_loss_stops() -> None:
    with pytest.raises(ValueError, match="entropy_fork/mine"):
        check_worker(None, guarded_name("mine"), None)


def test_a_worker_that_would_build_another_engine_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with an engine of somebody else's for the same device, or one chosen by environment variables."""
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "somebody")
    with pytest.raises(EntropyForkError, match=r"the engine of .* pid \d+.*VERL_ENGINE_VENDOR, or write .*entropy=old"):
        check_worker(None, guarded_name("vanilla", in_worker=True), "fsdp2")
    check_worker(None, guarded_name("vanilla"), None)  # what the driver selects needs no engine of ours


def test_verls_own_entry_stays_in_the_registry() -> None:
    entries = EngineRegistry._engines["language_model"]["fsdp2"]
    assert issubclass(entries[("cpu", "cpu")], ForkingTokens)
    assert not issubclass(entries["cpu"], ForkingTokens)
    assert not issubclass(EngineRegistry.get_engine_cls("value_model", "fsdp2"), ForkingTokens)


def test_verls_worker_takes_gradient_steps_through_the_method_that_we_extend() -> None:
    """Fails when verl changes it: read what it does now."""
    source = inspect.getsource(engine_workers.TrainingWorker.train_batch)
    assert "self.engine.train_batch(data, loss_function=self.loss_fn)" in source
