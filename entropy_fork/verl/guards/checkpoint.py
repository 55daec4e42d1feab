"""Refuses to resume a checkpoint of another selection, or one that was not written to its end.

Hook: the trainers of ``trainer.py``, around verl's ``_save_checkpoint`` and before its ``_load_checkpoint``. Nothing of
verl's is saved or loaded here. In runs whose config has the mask's node, also with ``entropy_fork=off``, a file says
what each checkpoint was trained on (``resume.py``); a run without the node removes such a file where it saves over it,
since it is no longer true. The rest is the guard ``checkpoints``.

verl writes the files of a checkpoint one after another, then its step into ``latest_checkpointed_iteration.txt``, and
resumes from the step that is in there. So a run that is killed while it saves goes on from the checkpoint before. Not
so in these cases (verl 0.9.1, ``trainer_base.py``), each of which stops here with one error before anything is loaded:

- A step is saved again, after a resume from an earlier one or a start in a used folder: verl already points to it, and
  a kill leaves old and new files side by side, all of them readable. Hence the file ``unfinished`` while one is saved.
- A folder that lacks ``data.pt`` begins the data anew, and one that is not there the training, with no more than a
  line in the log. A file that was cut short or written by another number of ranks ends in a traceback of a worker's.
- ``latest_checkpointed_iteration.txt`` is emptied before it is written.
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

#: the names of a rank's files by what ``checkpoint.load_contents`` asks for (verl's ``FSDPCheckpointManager``)
SHARDS = {"model": "model", "optimizer": "optim", "extra": "extra_state"}


class WholeCheckpoints(Base):
    """Mixin below verl's V1 trainers; see ``trainer.py: install``."""

    __slots__ = ()

    def _save_checkpoint(self) -> None:
        fork_config, guarded = read_node(self.config), read_guards(self.config).checkpoints
        # An asynchronous save is not over when verl returns; Megatron then points to it when it is.
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
            # first, so that verl never points to a checkpoint that says something else, or nothing
            if fork_config is not None:
                selection = fork_config.selection()
                write_selection(folder, selection if is_new or says(folder, selection) else MIXED)
            else:  # what a run with the node has left in a folder that is used again
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
                f"{_room_in(folder)}). It is marked as unfinished; the same command goes on from the last whole one."
            ) from error

    def _load_checkpoint(self) -> None:
        if line := check_resumable(self.config):
            print(f"entropy_fork: {line}", flush=True)
        if read_guards(self.config).checkpoints:
            _check_whole(self)
        super()._load_checkpoint()


def _check_whole(trainer: StockTrainer) -> None:
    """Raise for a checkpoint that verl would resume from and that is not whole."""
    folder = checkpoint_to_resume(trainer.config.trainer)
    if folder is None:
        return
    step = folder.name.removeprefix("global_step_")
    named = trainer.config.trainer.resume_mode != "auto" or step.isdecimal()
    wrong = _wrong_with(trainer, folder) if named else [f"{folder.parent / LATEST} names no step but {step!r}"]
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
        f"the checkpoint to go on from is not whole: {'; '.join(wrong[:3])}{more}. {way_on} "
        f"trainer.resume_mode=disable to begin again."
    )


def _wrong_with(trainer: StockTrainer, folder: Path) -> list[str]:
    """What keeps a folder from being a whole checkpoint of this run's; every rank looks for its own files."""
    if not folder.is_dir():
        return [f"{folder} is not there"]
    if (folder / UNFINISHED).exists():
        return [f"{folder} was not written to its end (the file '{UNFINISHED}' is in it)"]
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
    """Run in each training worker: what is wrong with its own files, on the disk that it sees.

    Args:
        folder: of one role in a checkpoint.
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
    """``torch.save`` writes a zip file, whose directory comes last: one that was cut short has none.

    Only that directory is read, however large the file is.
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
    """The last line, which names the error: Ray puts whole tracebacks into its messages."""
    line = "".join(str(error).strip().splitlines()[-1:])
    return line if isinstance(error, RayTaskError) else f"{type(error).__name__}: {line}"


def _room_in(folder: Path) -> str:
    """Of a full disk torch says nothing but "unexpected pos 704 vs 598"."""
    try:
        return f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB are free there"
    except OSError as error:
        return str(error)
