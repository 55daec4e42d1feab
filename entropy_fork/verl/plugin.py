"""The plugin that verl loads in every process. It registers our parts.

Hook: the entry point group ``verl.plugins``. verl imports this module at the end of its own ``__init__``, in the
launcher and in every Ray worker. So this module is cheap: it imports none of verl's heavy modules. Each of our parts
registers only when the module of verl that it extends has been imported.

verl swallows every error that this module raises. So two other places check that the plugin is active: in the launcher
Hydra's search path plugin (``hydra_plugins/entropy_fork``), and in every other process the typed config node, which
cannot be unpickled without the plugin (``config/nodes.py``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

import verl
import wrapt

from entropy_fork.common.errors import EntropyForkError, is_said, problems_of
from entropy_fork.common.supported import why_unsupported

#: whether the environment asks for verl on a CPU; see cpu_platform.py
ON_CPU = os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def _check_verl(version: str) -> None:
    if (problem := why_unsupported(version)) is None:
        return
    if ON_CPU:  # verl would swallow the reason and go on to "Unknown platform 'cpu'"
        raise SystemExit(problem)
    raise EntropyForkError(problem)


# Check first: in another version of verl the imports below would fail, with a message that does not name the reason.
_check_verl(verl.__version__)

from entropy_fork.verl import checks, config, launch  # noqa: E402
from entropy_fork.verl.cpu import cpu_platform, fork_server  # noqa: E402
from entropy_fork.verl.early import look as early  # noqa: E402


def _also_check_entropy_fork(validate_config: Callable[..., Any]) -> Callable[..., Any]:
    """verl's checks, and those of ours that a run asks for: see ``entropy_fork/common/asked_for.py``."""

    @wraps(validate_config)  # a function, not wrapt's proxy, because programs pickle it
    def validate(config: Any, *args: Any, **kwargs: Any) -> Any:
        ours = problems_of([lambda: checks.check_first(config)])
        result, verls = None, None
        if not ours:  # or verl's message would mislead
            try:
                result = validate_config(config, *args, **kwargs)
            except Exception as error:
                verls = error
        try:
            ours += [message for message in problems_of(our_checks(config)) if not is_said(message, ours)]
        except Exception:  # a value of another type than verl's, which complains about it too
            if not ours and verls is None:
                raise
        checks.refuse_all(ours, verls)
        launch.extend_program()
        if ON_CPU:
            fork_server.choose(config)
        else:
            cpu_platform.say_light_rollout(config)
        return result

    return validate


def our_checks(config: Any) -> list[Callable[[], object]]:
    """The checks that the launcher makes after verl's."""
    if ON_CPU:
        platform = [lambda: cpu_platform.check_before_training(config)]
    else:
        platform = [lambda: cpu_platform.check_light_rollout(config), lambda: fork_server.check_opted_in(config)]
    return [*platform, lambda: checks.check_before_training(config), lambda: early.check_in_launcher(config)]


def _extend_validation(module: Any) -> None:
    module.validate_config = _also_check_entropy_fork(module.validate_config)


def register_on_import(extended: str, ours: str) -> None:
    """Import our module, which registers itself, as soon as the module of verl that it extends has been imported.

    Do nothing but import it. If our module is the one that imports verl's, it is itself only half imported at that
    moment. It then registers at its own end.
    """
    wrapt.register_post_import_hook(lambda _: import_module(ours), extended)


def _register() -> None:
    config.register_schema()
    fork_server.register_schema()
    launch.guard_pickling()
    wrapt.register_post_import_hook(_extend_validation, "verl.utils.config")
    wrapt.register_post_import_hook(launch.extend_run_ppo, "verl.trainer.main_ppo")
    register_on_import("verl.trainer.ppo.v1", "entropy_fork.verl.trainer")
    register_on_import("verl.trainer.ppo.v1", "entropy_fork.verl.advantages")
    register_on_import("verl.trainer.ppo.core_algos", "entropy_fork.verl.policy_loss")
    register_on_import("verl.trainer.ppo.ray_trainer", "entropy_fork.verl.legacy_trainer")
    register_on_import("verl.workers.engine", "entropy_fork.verl.engine")
    cpu_platform.register_light_rollout()
    register_on_import("verl.experimental.agent_loop", "entropy_fork.verl.agent_loop")
    if ON_CPU:
        cpu_platform.register()  # before our engines: they derive from the engines that this registers
        register_on_import("verl.checkpoint_engine.base", "entropy_fork.verl.cpu.checkpoint_engine")


# Python runs a module once in a process, so nothing here is registered twice.
_register()
