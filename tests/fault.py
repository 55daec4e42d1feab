"""Loaded into every process of a real run through VERL_USE_EXTERNAL_MODULES: something breaks at a named place.

``ENTROPY_FORK_FAULT=PLACE:N`` is the N-th time (from 1) that a process comes to a place:

- ``save``: half of a checkpoint's first file has been written
- ``disk``: the disk is full as a checkpoint is being written (the process may not write more than 1 MiB to a file)
- ``update``: a training worker is about to take a gradient step
- ``generate``: the rollout server is about to answer a batch
- ``answer``: the agent loop is about to ask for an answer
- ``reward``: an answer is about to be scored

But for ``disk`` the process writes its number into the file ``ENTROPY_FORK_STOPPED`` and stays where it is: it hangs,
until the test kills it or another process of the run.
"""

from __future__ import annotations

import io
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
import wrapt

PLACE, _, NUMBER = os.environ["ENTROPY_FORK_FAULT"].partition(":")
STOPPED = Path(os.environ["ENTROPY_FORK_STOPPED"])
MIB = 1 << 20

visits = 0


def _stop_here() -> None:
    note = STOPPED.with_suffix(f".{os.getpid()}")
    note.write_text(str(os.getpid()))
    note.rename(STOPPED)
    time.sleep(3600)


def _is_it_now() -> bool:
    global visits
    visits += 1
    return visits == int(NUMBER)


@wrapt.decorator
def _stopping(wrapped, instance, args, kwargs):  # type: ignore[no-untyped-def]
    if _is_it_now():
        _stop_here()
    return wrapped(*args, **kwargs)


@wrapt.decorator
def _half_written(wrapped, instance, args, kwargs):  # type: ignore[no-untyped-def]
    if not _is_it_now():
        return wrapped(*args, **kwargs)
    save = torch.save

    def save_half(state: Any, path: str) -> None:
        buffer = io.BytesIO()
        save(state, buffer)
        Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
        _stop_here()

    torch.save = save_half  # type: ignore[assignment]
    return wrapped(*args, **kwargs)


@wrapt.decorator
def _on_a_full_disk(wrapped, instance, args, kwargs):  # type: ignore[no-untyped-def]
    if _is_it_now():
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
    return wrapped(*args, **kwargs)


def _in_place_of(owner: str, name: str, fault: Any) -> Any:
    """The hook that breaks ``name`` (a function, or ``Class.method``) when its module has been imported."""

    def extend(module: Any) -> None:
        *classes, attribute = name.split(".")
        holder = getattr(module, classes[0]) if classes else module
        setattr(holder, attribute, fault(getattr(holder, attribute)))

    return lambda: wrapt.register_post_import_hook(extend, owner)


_SAVE = ("verl.utils.checkpoint.fsdp_checkpoint_manager", "FSDPCheckpointManager.save_checkpoint")
{
    "save": _in_place_of(*_SAVE, _half_written),
    "disk": _in_place_of(*_SAVE, _on_a_full_disk),
    "update": _in_place_of("entropy_fork.verl.engine", "ForkingTokens.train_batch", _stopping),
    "generate": _in_place_of("entropy_fork.verl.rollout_cpu", "generate", _stopping),
    "answer": _in_place_of("entropy_fork.verl.agent_loop", "SeededSingleTurnAgentLoop.run", _stopping),
    "reward": _in_place_of("entropy_fork.reward", "compute_score", _stopping),
}[PLACE]()
