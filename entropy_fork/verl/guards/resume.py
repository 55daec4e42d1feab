"""Record in a checkpoint which tokens it was trained on, and refuse to resume it with another selection.

Hook: none here. ``checkpoint.py`` writes the file with each checkpoint, and checks it before a checkpoint is loaded.
``checks.py`` checks it in the launcher too, which usually sees the same folder, before Ray starts.

verl resumes from any checkpoint in ``trainer.default_local_dir``, a folder named after project and experiment. So the
same command line with ``+entropy_fork=off`` would find the checkpoint of the finished masked run there, take no more
steps, and end without an error: the "baseline" would be the masked model.
"""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig

from entropy_fork.common.asked_for import NODE
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.output_folder import LATEST, SELECTION_FILE, write_whole
from entropy_fork.core.rule import KEY_OF
from entropy_fork.verl.config import RULE_KEYS, TrainedOn, read_node

#: our file, beside ``actor`` in the folder of a checkpoint
FILE = SELECTION_FILE

#: what our file says while a checkpoint of another selection is being overwritten. A kill meanwhile leaves it so.
MIXED = "tokens of two selections (a run was stopped while it wrote over the checkpoint of another one)"

#: the value of a key that an earlier version of this package did not write
DEFAULTS = {name: KEY_OF[name].default for name in RULE_KEYS}


def write_selection(folder: Path, selection: TrainedOn) -> None:
    """Write what a run trains on into the folder of its checkpoint."""
    write_whole(folder / FILE, json.dumps({"trained_on": selection}, indent=1) + "\n")


def says(folder: Path, selection: TrainedOn) -> bool:
    """Whether the file in a checkpoint's folder names exactly this selection."""
    try:
        return read_selection(folder) == selection
    except EntropyForkError:
        return False


def read_selection(folder: Path) -> TrainedOn | None:
    """What a checkpoint was trained on last; None if no file says so, as in checkpoints of stock verl.

    Raises:
        EntropyForkError: the file cannot be read.
    """
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(selection := content.get("trained_on"), (dict, str)):
            return selection
        reason = "it does not say what the checkpoint was trained on"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = str(error)
    raise EntropyForkError(
        f"{folder / FILE} cannot be read ({reason}). Write trainer.resume_mode=disable to start again, or remove that "
        f"file to resume from the checkpoint without this check."
    )


def checkpoint_to_resume(trainer: DictConfig) -> Path | None:
    """The folder that verl would resume from, which may not exist; None if verl would start from the beginning.

    Args:
        trainer: the node ``trainer`` of the config.
    """
    if trainer.resume_mode == "resume_path" and trainer.resume_from_path:
        return Path(trainer.resume_from_path).absolute()
    latest = Path(trainer.default_local_dir).absolute() / LATEST
    if trainer.resume_mode == "auto" and latest.is_file():
        return latest.parent / f"global_step_{latest.read_text().strip()}"
    return None


def check_resumable(config: DictConfig) -> str | None:
    """Refuse to resume from a checkpoint of another selection, if the config has the node.

    Args:
        config: the root of verl's config.

    Returns:
        A line for the log if the checkpoint does not say what it was trained on; else None.

    Raises:
        EntropyForkError: with both selections, and what to write instead.
    """
    fork_config = read_node(config)
    if fork_config is None or fork_config.resume_other_selection:
        return None
    trainer, now = config.trainer, fork_config.selection()
    folder = checkpoint_to_resume(trainer)
    if folder is None or not folder.is_dir():
        return None
    then = read_selection(folder)
    if then is None:
        return (
            f"{folder} does not say which tokens it was trained on (stock verl's checkpoints never do); this run "
            f"continues from it"
        )
    if isinstance(then, dict):
        then = {**DEFAULTS, **then}
    if then == now:
        return None
    raise EntropyForkError(
        f"{folder} was trained on {_in_words(then, now)}, but this run trains on {_in_words(now, then)}: "
        f"it would continue the other run's model. Write trainer.experiment_name=NAME for a separate run"
        f"{_folder_too(trainer)}, trainer.resume_mode=disable to start again in this folder, or "
        f"{NODE}.resume_other_selection=true to resume from that checkpoint on purpose."
    )


def _in_words(selection: TrainedOn, other: TrainedOn) -> str:
    """The selection in words: top_ratio, select, and each key that has not its default or differs from ``other``."""
    if isinstance(selection, str):
        return selection
    beside = other if isinstance(other, dict) else {}
    said = [
        f"{key}={value}"
        for key, value in selection.items()
        if key in ("top_ratio", "select") or value != DEFAULTS.get(key) or value != beside.get(key, value)
    ]
    return f"the tokens of {' '.join(said)}"


def _folder_too(trainer: DictConfig) -> str:
    """What else to write, if the user has written a path, so that the name does not decide the folder."""
    if trainer.resume_mode == "resume_path":
        return " and trainer.resume_mode=auto"
    follows = str(trainer.experiment_name) in Path(trainer.default_local_dir).parts
    return "" if follows else " and trainer.default_local_dir=FOLDER"
