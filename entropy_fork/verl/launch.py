"""The guard at the launch: a config that asks for a mask takes its guard along into the next process.

Hook: none. A program with a task runner of its own starts it by verl's ``run_ppo(config, task_runner_class)``, or
without it. So two things are wrapped:

- ``run_ppo``, where a program that does not call verl's ``validate_config`` comes by: our checks, before Ray starts.
  Around it, the launcher's terminal shows a line per step (``terminal.py``).
- Pickling the config, which every launch ends with. A root config with a node of ours leaves its process typed: a
  process without this plugin cannot unpickle it. And it asks for the guarded loss, which refuses a batch without token
  weights, whatever the trainer is. OmegaConf has no hook for that, so ``DictConfig.__getstate__`` is wrapped. A config
  without a node of ours is not touched.

A program without Hydra, in an environment whose ``VERL_USE_EXTERNAL_PLUGINS`` leaves us out, runs no line of ours in
any process. Nothing can be noticed there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import wrapt
from omegaconf import DictConfig

from entropy_fork.common.asked_for import in_config
from entropy_fork.verl import checks
from entropy_fork.verl.config import guard_loss, is_guarded, make_typed, read_config, read_node


def _checking_first(run_ppo: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(run_ppo)  # a function, not wrapt's proxy: programs pickle it with what refers to it
    def checking(config: Any, *args: Any, **kwargs: Any) -> Any:
        if in_config(config) and not checks.was_checked(config):  # validate_config has not been called on it
            checks.check_before_training(config)
        if in_config(config) and (fork_config := read_node(config)) is not None and fork_config.short_output:
            from entropy_fork.verl.terminal import short_output  # the launcher's; every process imports this module

            with short_output(config):
                return run_ppo(config, *args, **kwargs)
        return run_ppo(config, *args, **kwargs)

    return checking


def extend_run_ppo(module: Any) -> None:
    """Wrap ``run_ppo`` of verl's module ``main_ppo``, before a program imports it from there."""
    module.run_ppo = _checking_first(module.run_ppo)


def extend_program() -> None:
    """Wrap ``run_ppo`` where verl's ``main_ppo`` is the program itself: no import hook sees ``__main__``.

    Called by verl's ``validate_config``, which comes before ``run_ppo`` there.
    """
    program = sys.modules["__main__"]
    run_ppo = getattr(program, "run_ppo", None)
    code = getattr(run_ppo, "__code__", None)
    if (
        code is not None
        and run_ppo.__module__ == "__main__"
        and Path(code.co_filename).match("verl/trainer/main_ppo.py")
    ):
        extend_run_ppo(program)


@wrapt.decorator
def _with_guard(wrapped: Callable[..., Any], instance: DictConfig, args: Any, kwargs: Any) -> Any:
    if in_config(instance) and not is_guarded(instance):
        make_typed(instance)
        if read_config(instance) is not None:
            guard_loss(instance)
    return wrapped(*args, **kwargs)


def guard_pickling() -> None:
    """Wrap what pickles an ``OmegaConf`` mapping."""
    # mypy: a method of a class may not be assigned. OmegaConf has no hook for pickling, so it is.
    DictConfig.__getstate__ = _with_guard(DictConfig.__getstate__)  # type: ignore[method-assign]
