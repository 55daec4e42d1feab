"""Composes the config of a command line as ``python -m verl.trainer.main_ppo`` does."""

from __future__ import annotations

import copy
import warnings
from dataclasses import fields

import verl  # noqa: F401 - before Hydra looks for its plugins: verl loads ours
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.verl.config import MOVED, NODE, EntropyForkConfig, moved


def compose(overrides: list[str], config_name: str = "ppo_trainer") -> DictConfig:
    """The config that ``python -m verl.trainer.main_ppo OVERRIDES`` would have.

    Raises:
        EntropyForkError: Hydra's reason, in one line.
    """
    if any(override in ("-m", "--multirun") for override in overrides):
        raise EntropyForkError("plan looks at one job of a sweep: leave -m out, and give each key one value")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("verl.trainer.config", version_base=None), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = hydra_compose(config_name, overrides=overrides, return_hydra_config=True)
        # for checks that look at the command line
        HydraConfig.instance().set_config(copy.deepcopy(config))
        with open_dict(config):
            del config["hydra"]
        return config
    except (HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split("\nSee https")[0].split())
        if found := [key for key in MOVED if f"'{key}'" in reason]:
            reason = moved(found[0])
        elif f"'{NODE}." in reason:  # Hydra would tell the user to append the mistyped key
            known = ", ".join(field.name for field in fields(EntropyForkConfig))
            reason = f"{reason.split('To append')[0]}Keys of {NODE}: {known}"
        raise EntropyForkError(f"the config cannot be composed: {reason}") from None


def resolve(config: DictConfig) -> None:
    """Resolve all interpolations, in place.

    Keys that a run must be given and that the launcher's checks found missing get a value first, so that the rest of
    the config can be looked at too.

    Raises:
        EntropyForkError: a value cannot be resolved.
    """
    for group, key, value in (
        (config.actor_rollout_ref.rollout, "name", "vllm"),
        (config.actor_rollout_ref.model, "path", None),
        (config.data, "train_files", None),
        (config.data, "val_files", None),
    ):
        if OmegaConf.is_missing(group, key):
            group[key] = value
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise EntropyForkError(f"a value cannot be resolved: {str(error).splitlines()[0]}") from None
