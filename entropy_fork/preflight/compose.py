"""Composes the config of a command line as ``python -m verl.trainer.main_ppo`` does."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import verl  # noqa: F401 - before Hydra looks for its plugins: verl loads ours
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from entropy_fork.common.close_names import did_you_mean
from entropy_fork.common.errors import EntropyForkError, all_at_once
from entropy_fork.verl.config.words import check_words


@dataclass
class Composed:
    """A config, and what is wrong with the line that it was made of.

    Attributes:
        config: of the words that Hydra could use.
        problems: a message for each word that it could not use.
    """

    config: DictConfig
    problems: list[str]


def compose(overrides: list[str], config_name: str = "ppo_trainer", config_dir: str | None = None) -> DictConfig:
    """The config that ``python -m verl.trainer.main_ppo OVERRIDES`` would have. Arguments as :func:`compose_most`.

    Raises:
        EntropyForkError: what is wrong with the line, all of it.
    """
    composed = compose_most(overrides, config_name, config_dir)
    if composed.problems:
        raise EntropyForkError(*all_at_once(composed.problems))
    return composed.config


def compose_most(overrides: list[str], config_name: str = "ppo_trainer", config_dir: str | None = None) -> Composed:
    """The config of a line without the words that are wrong, so that the others can be looked at too.

    Args:
        overrides: what follows ``python -m verl.trainer.main_ppo``.
        config_name: main_ppo's ``--config-name``.
        config_dir: main_ppo's ``--config-dir``: a folder with configs of the user's.

    Raises:
        EntropyForkError: no config can be composed, whatever is left out.
    """
    if any(override in ("-m", "--multirun") for override in overrides):
        raise EntropyForkError("plan looks at one job of a sweep: leave -m out, and give each key one value")
    if config_dir is not None and not Path(config_dir).is_dir():
        raise EntropyForkError(f"--config-dir={config_dir}: there is no such folder")
    problems = [f"'{word}' is not an override, which has the form key=value." for word in overrides if word[:1] == "-"]
    words = [word for word in overrides if word[:1] != "-"]
    folder = Path(config_dir or "")

    def has_option(group: str, option: str) -> bool:
        return config_dir is not None and (folder / group / f"{option}.yaml").is_file()

    own_file = config_dir is not None and (folder / f"{config_name.removesuffix('.yaml')}.yaml").is_file()
    unreadable = {word: reason for word in words if (reason := _why_unreadable(word))}
    problems += unreadable.values()
    words = [word for word in words if word not in unreadable]
    checked = check_words(words, has_option, plain=not own_file)
    problems += checked.problems
    words = checked.repaired
    while True:
        try:
            return Composed(_compose(words, config_name, config_dir), problems)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            wrong = _culprit(words, error)
            problem = f"the config cannot be composed: {_reason(error)}"
            if wrong is None:
                raise EntropyForkError(*all_at_once([*problems, problem])) from None
            problems.append(problem if wrong in problem else f"{problem} ({wrong})")
            words = [word for word in words if word != wrong]


def _why_unreadable(word: str) -> str | None:
    """Why Hydra cannot read a word; None where it can."""
    try:
        OverridesParser.create().parse_override(word)
    except HydraException as error:
        reason = " ".join(str(error).split("\nSee https")[0].split())
        if "=" not in word:
            return f"'{word}' is not an override, which has the form key=value."
        key, _, value = word.partition("=")
        return f"{word} cannot be read: {reason}. Text with signs of Hydra's needs quotes: '{key}=\"{value}\"'."
    return None


def _compose(words: list[str], config_name: str, config_dir: str | None) -> DictConfig:
    GlobalHydra.instance().clear()
    arguments = sys.argv
    # our search path plugin puts the folder before ours, as in main_ppo, and finds it here
    sys.argv = [arguments[0] if arguments else "", *([f"--config-dir={config_dir}"] if config_dir else [])]
    try:
        with initialize_config_module("verl.trainer.config", version_base=None), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = hydra_compose(config_name, overrides=words, return_hydra_config=True)
    finally:
        sys.argv = arguments
    # for checks that look at the command line
    HydraConfig.instance().set_config(copy.deepcopy(config))
    with open_dict(config):
        del config["hydra"]
    return config


def _reason(error: Exception) -> str:
    """Hydra's reason in one line, with the closest name where it does not find an option."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    text = str(error).split("\nSee https")[0].split("Config search path:")[0]
    reason = " ".join(text.replace(" schema\n", " ").replace("\tschema\n", "").split())
    if cause is not None and reason.startswith("Error merging override"):
        reason += f": {str(cause).splitlines()[0]}"
    if option := re.search(r"Could not find '[\w/]+/([^'/]*)'.*Available options in '[^']*':(.*)", reason):
        reason += "." + did_you_mean(option[1], option[2].split())
    return reason


def _culprit(words: list[str], error: Exception) -> str | None:
    """The word that Hydra complains about; None where it does not say."""
    text = str(error)
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        named = (f"'{word}'", f"override {word}", f"'{key}'", f"'{key}/{value}'", f"argument '{word}'", f"{word}\n")
        if any(name in text for name in named):
            return word
    for word in words:  # a value that is no text for a group, which Hydra does not name
        key, _, value = word.lstrip("+").partition("=")
        if "." not in key and "override must be a string" in text and not re.search(r"[A-Za-z_]{2}", value[:-1] or "x"):
            return word
        if "." not in key and "override must be a string" in text and value.lower() in ("true", "false", "null"):
            return word
    return None


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
