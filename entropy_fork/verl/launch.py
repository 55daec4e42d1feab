"""The guard at the launch: before a config that asks for a mask goes to another process, it gets its guard.

Hook: none. A user's program may have its own task runner. It starts it with verl's ``run_ppo(config,
task_runner_class)``, or in another way. So two functions are wrapped:

- ``run_ppo`` runs our checks before Ray starts, if the program has not called verl's ``validate_config``. While it
  trains, the launcher's terminal shows one line per step (``terminal.py``).
- ``DictConfig.__getstate__`` pickles the config, which every launch does at its end. Before that, a root config with a
  node of ours gets its types, so a process without this plugin cannot unpickle it. It also gets the guarded loss, which
  refuses a batch without token weights, whatever the trainer is. OmegaConf has no hook for that. A config without a
  node of ours does not change.

One case cannot be noticed: a program without Hydra, in an environment whose ``VERL_USE_EXTERNAL_PLUGINS`` leaves this
plugin out. It runs none of our code in any process.
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
    @wraps(run_ppo)  # a function, not wrapt's proxy, because programs pickle it
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
    """Wrap the method that pickles an ``OmegaConf`` mapping."""
    # mypy forbids to assign a method of a class. OmegaConf has no hook for pickling, so there is no other way.
    DictConfig.__getstate__ = _with_guard(DictConfig.__getstate__)  # type: ignore[method-assign]
