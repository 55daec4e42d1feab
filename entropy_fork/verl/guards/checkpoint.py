"""Refuse to resume a checkpoint of another selection, or an unfinished one.

Hook: a mixin below verl's trainer (``trainer.py: install``), around verl's ``_save_checkpoint`` and before its
``_load_checkpoint``. verl itself saves and loads; this module only checks.

If the config has the mask's node, also as ``entropy_fork=off``, a file records what each checkpoint was trained on
(``resume.py``). A run without the node removes that file when it overwrites the checkpoint, because the file is no
longer true. Everything else here belongs to the guard ``checkpoints``.

verl writes the files of a checkpoint one after another. Then it writes the step into
``latest_checkpointed_iteration.txt``, and later resumes from that step. So a run that is killed while it saves resumes
from the checkpoint before. That fails in three cases (verl 0.9.1, ``trainer_base.py``). The guard stops each of them
with one error, before anything is loaded:

- verl saves the same step a second time, after a resume from an earlier step or a start in a used folder. verl already
  points to this step, so a kill leaves old and new files side by side, all of them readable. Therefore the file
  ``unfinished`` is there during every save.
- A file is missing or damaged. Without ``data.pt`` verl starts the data from the beginning, and without the folder the
  whole training, and says so in one line of the log. If a file is cut short, or was written by another number of ranks,
  a worker ends with a traceback.
- A kill leaves ``latest_checkpointed_iteration.txt`` empty, because verl empties the file before it writes.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch.distributed as dist
from ray.exceptions import RayTaskError

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.output_folder import LATEST, UNFINISHED
from entropy_fork.common.verl_types import StockTrainer
from entropy_fork.verl.config import MASKED_STRATEGIES, read_guards, read_node
from entropy_fork.verl.guards.resume import (
    FILE,
    MIXED,
    check_resumable,
    checkpoint_to_resume,
    says,
    write_selection,
)

if TYPE_CHECKING:
    Base = StockTrainer
else:
    Base = object  # trainer.py puts the mixin in front of verl's own methods

#: the first word in the name of a rank's file, for each value of ``checkpoint.load_contents`` (FSDPCheckpointManager)
SHARDS = {"model": "model", "optimizer": "optim", "extra": "extra_state"}


class WholeCheckpoints(Base):
    """Mixin below verl's V1 trainers; see ``trainer.py: install``."""

    __slots__ = ()

    def _save_checkpoint(self) -> None:
        fork_config, guarded = read_node(self.config), read_guards(self.config).checkpoints
        # An asynchronous save is not finished when verl returns. Megatron points to the checkpoint once it is finished.
        guarded = guarded and not self.config.actor_rollout_ref.actor.checkpoint.get("async_save", False)
        folder = Path(self.config.trainer.default_local_dir).absolute() / f"global_step_{self.global_steps}"
        is_new = not folder.exists()
        try:
            if fork_config is not None or guarded:
                folder.mkdir(parents=True, exist_ok=True)
            if guarded:
                (folder / UNFINISHED).write_text(
                    "entropy_fork: this checkpoint is being written, or its run ended there\n"
                )
            # Write our file first, so that verl never points to a checkpoint with a wrong file or without one.
            if fork_config is not None:
                selection = fork_config.selection()
                write_selection(folder, selection if is_new or says(folder, selection) else MIXED)
            else:  # a run with the node may have left its file in this folder
                (folder / FILE).unlink(missing_ok=True)
            super()._save_checkpoint()
            if fork_config is not None and not is_new:
                write_selection(folder, fork_config.selection())
            if guarded:
                (folder / UNFINISHED).unlink()
        except Exception as error:
            if not guarded:
                raise
            raise EntropyForkError(
                f"the checkpoint of step {self.global_steps} could not be written to {folder} ({_in_short(error)}; "
                f"{_room_in(folder)}). It is marked as unfinished. The same command resumes from the last whole one."
            ) from error

    def _load_checkpoint(self) -> None:
        if line := check_resumable(self.config):
            print(f"entropy_fork: {line}", flush=True)
        if read_guards(self.config).checkpoints:
            _check_whole(self)
        super()._load_checkpoint()


def _check_whole(trainer: StockTrainer) -> None:
    """Raise an EntropyForkError if the checkpoint that verl would resume from is not whole."""
    folder = checkpoint_to_resume(trainer.config.trainer)
    if folder is None:
        return
    step = folder.name.removeprefix("global_step_")
    named = trainer.config.trainer.resume_mode != "auto" or step.isdecimal()
    wrong = _wrong_with(trainer, folder) if named else [f"{folder.parent / LATEST} contains no step but {step!r}"]
    if not wrong:
        return
    whole = next((other for other in _newest_first(folder.parent) if not _wrong_with(trainer, other)), None)
    way_on = (
        f"No other checkpoint in {folder.parent} is whole. Write"
        if whole is None
        else f"{whole} is whole: write trainer.resume_mode=resume_path trainer.resume_from_path={whole}, or"
    )
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise EntropyForkError(
        f"the checkpoint to resume from is not whole: {'; '.join(wrong[:3])}{more}. {way_on} "
        f"trainer.resume_mode=disable to start again."
    )


def _wrong_with(trainer: StockTrainer, folder: Path) -> list[str]:
    """What is wrong with a folder as a whole checkpoint of this run. Each rank looks for its own files."""
    if not folder.is_dir():
        return [f"{folder} is not there"]
    if (folder / UNFINISHED).exists():
        return [f"{folder} is unfinished (the file '{UNFINISHED}' is in it)"]
    config = trainer.config
    groups = [("actor", config.actor_rollout_ref.actor, trainer.actor_rollout_wg)]
    if trainer.use_critic:
        groups.append(("critic", config.critic, trainer.critic_wg))
    looks = []
    for role, of_role, group in groups:
        if of_role.strategy in MASKED_STRATEGIES:
            contents = list(of_role.checkpoint.load_contents)
            looks += [w.__ray_call__.remote(wrong_shards, str(folder / role), contents) for w in group.workers]
    wrong = [wrong for of_rank in ray.get(looks) for wrong in of_rank]
    return wrong + _wrong_with_file(folder / "data.pt")


def wrong_shards(_: Any, folder: str, contents: list[str]) -> list[str]:
    """What is wrong with this rank's own files. Runs in each training worker, because it may see another disk.

    Args:
        folder: the folder of one role in a checkpoint.
        contents: verl's ``checkpoint.load_contents``.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    names = [f"{SHARDS[part]}_world_size_{size}_rank_{rank}.pt" for part in contents if part in SHARDS]
    sizes = {
        int(found[1]) for path in Path(folder).glob("*.pt") if (found := re.search(r"world_size_(\d+)", path.name))
    }
    if names and sizes and size not in sizes:
        by = " or ".join(map(str, sorted(sizes)))
        return [f"{folder} was written by {by} ranks, and this run has {size}"] if rank == 0 else []
    return [wrong for name in names for wrong in _wrong_with_file(Path(folder) / name)]


def _wrong_with_file(path: Path) -> list[str]:
    """What is wrong with a file of ``torch.save``: a zip file, whose directory is at its end.

    A file that was cut short has no directory. Only the directory is read, however large the file is.
    """
    try:
        with zipfile.ZipFile(path):
            return []
    except FileNotFoundError:
        return [f"{path} is missing"]
    except (OSError, zipfile.BadZipFile) as error:
        return [f"{path} cannot be read ({error})"]


def _newest_first(folder: Path) -> list[Path]:
    steps = {
        int(found[1]): path for path in folder.glob("global_step_*") if (found := re.search(r"_(\d+)$", path.name))
    }
    return [steps[step] for step in sorted(steps, reverse=True)]


def _in_short(error: BaseException) -> str:
    """The last line of a message, which names the error. Ray puts whole tracebacks into its messages."""
    line = "".join(str(error).strip().splitlines()[-1:])
    return line if isinstance(error, RayTaskError) else f"{type(error).__name__}: {line}"


def _room_in(folder: Path) -> str:
    """The free space on a disk, in words. On a full disk torch says only "unexpected pos 704 vs 598"."""
    try:
        return f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB are free there"
    except OSError as error:
        return str(error)
