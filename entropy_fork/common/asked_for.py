"""What a run can ask this package for. Each check belongs to one row. A run that asks for nothing is not checked.

| a run asks for | by writing | and then |
|---|---|---|
| the mask | the node ``entropy_fork`` | it is typed and checked; no checkpoint of another selection is resumed |
| the guards | the node ``entropy_fork_guards`` | it is typed; data files, checkpoints and waiting are guarded |
| a recipe, a cluster, a template | a Hydra group, chosen in a line or in a file | it arrived, in order, and whole |
| an estimator or a loss of ours | its name in ``algorithm.adv_estimator`` or ``loss_mode`` | what it needs is there |
| the light rollout | its name in ``rollout.name`` | ``VERL_PLATFORM=cpu`` is set, or the config names the GPU |
| verl on a CPU | ``VERL_PLATFORM=cpu`` | the config can run there |
| any of these but ``off``, in ``main_ppo`` | | what verl would notice late is looked for (``verl/early/``) |
| a mask where it does nothing | our nodes, or a name of ρ, in another place (``check_places``) | it is refused |

``verl/plugin.py`` makes the checks in the launcher. This module imports neither verl nor the plugin, because the search
path plugin (``hydra_plugins/``) needs it also where the plugin is not active.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from entropy_fork.common.recipes import preset_names, recipes_dir

#: the nodes at the root of the config, each also a Hydra group of presets
NODE = "entropy_fork"
GUARDS = "entropy_fork_guards"

#: the Hydra groups that change verl's own keys
GROUPS = ("recipe", "cluster", "template")

#: A word of the command line that asks for us. ``recipe.x=1`` and ``my.recipe=x`` are the user's own keys.
WORD = re.compile(rf"^\+{{0,2}}(({'|'.join(GROUPS)})([=@]|$)|({NODE}|{GUARDS})([=@.]|$))")


def on_command_line(arguments: list[str], users_folder: Path | None) -> bool:
    """Whether a program's arguments ask for anything of ours.

    Args:
        arguments: ``sys.argv[1:]``.
        users_folder: the folder of ``--config-dir``, or None. An option that has a file there is the user's own.
    """
    return any(
        WORD.match(argument) and not (users_folder and _lies_in(users_folder, *argument.lstrip("+").split("=")[:2]))
        for argument in arguments
    )


def _lies_in(folder: Path, group: str, option: str = "") -> bool:
    return (folder / group / f"{option}.yaml").is_file()


def in_config(config: Any) -> bool:
    """Whether this is a whole config of verl's, from its root, with a node of ours."""
    if not isinstance(config, DictConfig) or config._get_parent() is not None:
        return False
    if config._is_none() or config._is_missing() or not (NODE in config or GUARDS in config):
        return False
    return OmegaConf.select(config, "actor_rollout_ref.actor", default=None) is not None


def overrides() -> list[str] | None:
    """The overrides as the user wrote them; None where the config was not composed by a Hydra application."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else None


def chosen(group: str) -> str | None:
    """The option of ours that was chosen in a Hydra group, on the command line or in a defaults list; None if none was.

    A user may have a group of the same name. An option is not ours if this install does not ship it, or if the user's
    folder, which Hydra searches first, has a file for it.
    """
    if not HydraConfig.initialized():
        return None
    runtime = HydraConfig.get().runtime
    option = runtime.choices.get(group)
    if option not in preset_names(group):
        return None
    folders = [Path(source.path) for source in runtime.config_sources if source.schema == "file"]
    return option if next(f for f in folders if _lies_in(f, group, option)) == recipes_dir() else None


def came_as_a_plain_value(group: str, value: Any) -> bool:
    """Whether a string at the root of a config was meant as an option of one of the ``GROUPS``.

    It was if the command line has it: Hydra did not know the group, and took it for a plain new key. Without a command
    line only the name of a recipe tells. Any other value of ``recipe`` is the user's own.
    """
    if not isinstance(value, str):
        return False
    words = overrides()
    if words is None:
        return group == "recipe" and value in preset_names(group)
    return any(word.lstrip("+") == f"{group}={value}" for word in words)
