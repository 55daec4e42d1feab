"""A checkpoint says what it was trained on, and no run of another selection goes on from it unasked.

Hook: none here. ``checkpoint.py`` writes the file with each checkpoint and asks before one is loaded; ``checks.py``
asks in the launcher, which usually sees the same folder and has not started Ray yet.

verl resumes from whatever lies in ``trainer.default_local_dir``, which follows from the names of project and
experiment. The same command line with ``+entropy_fork=off`` would find the masked run's checkpoint there, take no step
more and end well: the "baseline" would be the masked model.
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

#: beside ``actor`` in the folder of a checkpoint
FILE = SELECTION_FILE

#: what a folder says while a checkpoint of another selection in it is written over, and after a kill in that time
MIXED = "tokens of two selections (a run was stopped while it wrote over the checkpoint of another one)"

#: what a key means that an earlier version of this package did not write down
DEFAULTS = {name: KEY_OF[name].default for name in RULE_KEYS}


def write_selection(folder: Path, selection: TrainedOn) -> None:
    """Write what a run trains on into the folder of its checkpoint."""
    write_whole(folder / FILE, json.dumps({"trained_on": selection}, indent=1) + "\n")


def says(folder: Path, selection: TrainedOn) -> bool:
    """Whether the file in a checkpoint's folder says that it was trained on this selection."""
    try:
        return read_selection(folder) == selection
    except EntropyForkError:
        return False


def read_selection(folder: Path) -> TrainedOn | None:
    """What a checkpoint was trained on last; None where no file says so, as in stock verl's checkpoints.

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
        f"{folder / FILE} cannot be read ({reason}). Write trainer.resume_mode=disable to begin again, or remove that "
        f"file to go on from the checkpoint whatever it was trained on."
    )


def checkpoint_to_resume(trainer: DictConfig) -> Path | None:
    """The folder that verl would resume from, there or not; None where it would begin anew.

    Args:
        trainer: the node of that name.
    """
    if trainer.resume_mode == "resume_path" and trainer.resume_from_path:
        return Path(trainer.resume_from_path).absolute()
    latest = Path(trainer.default_local_dir).absolute() / LATEST
    if trainer.resume_mode == "auto" and latest.is_file():
        return latest.parent / f"global_step_{latest.read_text().strip()}"
    return None


def check_resumable(config: DictConfig) -> str | None:
    """Refuse to go on from a checkpoint of another selection, in a run whose config has the node.

    Args:
        config: the root.

    Returns:
        A line for the log where the checkpoint does not say what it was trained on; None where it does, or where there
        is no checkpoint.

    Raises:
        EntropyForkError: with both selections and the ways out.
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
        f"{folder} was trained on {_in_words(then, now)}, and this run on {_in_words(now, then)}: "
        f"it would continue the other run's model. Write trainer.experiment_name=NAME for a run of its own"
        f"{_folder_too(trainer)}, trainer.resume_mode=disable to begin again in this folder, or "
        f"{NODE}.resume_other_selection=true to go on from that checkpoint on purpose."
    )


def _in_words(selection: TrainedOn, other: TrainedOn) -> str:
    """The selection in words: top_ratio, select, and each key that is not its default or differs from the other's."""
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
    """Checkpoints lie where the name says, unless the user has written a path."""
    if trainer.resume_mode == "resume_path":
        return " and trainer.resume_mode=auto"
    follows = str(trainer.experiment_name) in Path(trainer.default_local_dir).parts
    return "" if follows else " and trainer.default_local_dir=FOLDER"
