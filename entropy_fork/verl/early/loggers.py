"""The packages and logins of ``trainer.logger``: verl starts the loggers after Ray is up and the model is loaded."""

from __future__ import annotations

import configparser
import importlib.util
import netrc
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import DictConfig, ListConfig, OmegaConf

from entropy_fork.common.close_names import did_you_mean
from entropy_fork.common.problem import IN_RAY, Problem

KEY = "trainer.logger"

#: the module that a logger imports, and the package that has it (verl/utils/tracking.py)
MODULES = {
    "wandb": ("wandb", "wandb"),
    "tracking": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
    "swanlab": ("swanlab", "swanlab"),
    "vemlp_wandb": ("volcengine_ml_platform", "volcengine-ml-platform"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "clearml": ("clearml", "clearml"),
    "trackio": ("trackio", "trackio"),
    "rl_insight": ("rl_insight", "rl-insight"),
}

#: environment variables without which verl raises
VARIABLES = {"vemlp_wandb": ("VOLC_ACCESS_KEY_ID", "VOLC_SECRET_ACCESS_KEY", "MLP_TRACKING_REGION")}


def check_loggers(config: DictConfig) -> Iterator[Problem]:
    """Each logger is one that verl knows, its package is installed, and where it needs a login there is one."""
    from verl.utils.tracking import Tracking

    given: Any = OmegaConf.select(config, KEY, default=None)
    names = [str(name) for name in given] if isinstance(given, (list, ListConfig)) else [str(given)] * bool(given)
    known = [*Tracking.supported_backend, "tracking"]
    others = [name for name in names if name in known and name not in ("wandb", "tracking")] or ["console"]
    without = f"{KEY}=[{','.join(dict.fromkeys(others))}]"
    for name in names:
        if name not in known:
            yield Problem(
                f"{KEY}: verl has no logger '{name}'.{did_you_mean(name, known)} Known: {', '.join(known[:-1])}.",
                IN_RAY,
            )
            continue
        module, package = MODULES.get(name, ("", ""))
        if module and importlib.util.find_spec(module) is None:
            kept = [other for other in names if other != name and other in known] or ["console"]
            yield Problem(
                f"{KEY} has {name}, and the package {package} is not installed. pip install {package}, or write "
                f"{KEY}=[{','.join(kept)}].",
                IN_RAY,
            )
            continue
        environment = _environment(config)
        if missing := [variable for variable in VARIABLES.get(name, ()) if variable not in environment]:
            yield Problem(f"{KEY} has {name}, which needs {', '.join(missing)} in the environment.", IN_RAY)
        if name in ("wandb", "tracking") and not _on_another_machine(config) and not knows_wandb_login(environment):
            yield Problem(
                f"{KEY} has {name}, and nobody is logged in to Weights & Biases here: the run would stop when it "
                f"starts its loggers. Run 'wandb login', set WANDB_API_KEY, set WANDB_MODE=offline to keep everything "
                f"on this machine, or write {without}.",
                IN_RAY,
            )


def knows_wandb_login(environment: dict[str, str]) -> bool:
    """Whether wandb would start in a process without a terminal: it is logged in, offline or switched off.

    Args:
        environment: the variables that the trainer's process will have.
    """
    if environment.get("WANDB_MODE", "").lower() in ("offline", "disabled", "dryrun", "shared"):
        return True
    if any(environment.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    if environment.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
        return True
    settings = _settings(environment)
    if settings.get("mode", "").lower() in ("offline", "disabled", "dryrun"):
        return True
    if settings.get("disabled", "").lower() == "true" or settings.get("api_key"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL") or settings.get("base_url") or "https://api.wandb.ai").netloc
    home = Path(environment.get("HOME") or "~").expanduser()
    for file in (environment.get("NETRC"), home / ".netrc", home / "_netrc"):
        with suppress(OSError, netrc.NetrcParseError):
            if file and netrc.netrc(str(file)).authenticators(host):
                return True
    return False


def _settings(environment: dict[str, str]) -> dict[str, str]:
    """What 'wandb login' and 'wandb offline' wrote into wandb's files."""
    home = Path(environment.get("HOME") or "~").expanduser()
    folders = (Path(environment.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb"), Path("wandb"), Path(".wandb"))
    found: dict[str, str] = {}
    for folder in folders:
        parser = configparser.ConfigParser(interpolation=None)
        with suppress(OSError, configparser.Error, UnicodeDecodeError):
            parser.read(folder / "settings", encoding="utf-8")
            if parser.has_section("default"):
                found |= dict(parser["default"])
    return found


def _environment(config: DictConfig) -> dict[str, str]:
    """The variables of this process, and those that ``ray_kwargs`` gives to the others."""
    given = OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env.env_vars", default=None) or {}
    return {**os.environ, **{str(name): str(value) for name, value in given.items()}}


def _on_another_machine(config: DictConfig) -> bool:
    """Whether the trainer's process may run elsewhere, where somebody may be logged in."""
    address = OmegaConf.select(config, "ray_kwargs.ray_init.address", default=None) or os.environ.get("RAY_ADDRESS")
    return bool(address) and address != "local"
