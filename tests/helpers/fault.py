"""Break a real run at a named place. Every process of the run loads this through VERL_USE_EXTERNAL_MODULES.

``ENTROPY_FORK_FAULT=PLACE:N``:

- ``save``: half of the first file of the N-th checkpoint has been written
- ``disk``: the disk is full when the N-th checkpoint is written (the process may not write more than 1 MiB to a file)
- ``update``: a training worker is about to take its N-th gradient step
- ``answer``: the agent loop is about to ask for an answer of step N
- ``reward``: the N-th answer is about to be scored

Except for ``disk``, the process writes its pid into the file ``ENTROPY_FORK_STOPPED`` and hangs at that place, until
the test kills it or another process of the run.
"""

from __future__ import annotations

import io
import itertools
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import wrapt

PLACE, _, NUMBER = os.environ["ENTROPY_FORK_FAULT"].partition(":")
STOPPED = Path(os.environ["ENTROPY_FORK_STOPPED"])
MIB = 1 << 20

visits = itertools.count(1)  # several threads may count


def _is_it_now() -> bool:
    return next(visits) == int(NUMBER)


def _stop_here() -> None:
    note = STOPPED.with_suffix(f".{os.getpid()}")
    note.write_text(str(os.getpid()))
    note.rename(STOPPED)
    time.sleep(3600)


def _half_a_file() -> None:
    save = torch.save

    def save_half(state: Any, path: str) -> None:
        buffer = io.BytesIO()
        save(state, buffer)
        Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
        _stop_here()

    torch.save = save_half  # type: ignore[assignment]


def _full_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))


def _at_visit(fault: Callable[[], None]) -> Any:
    @wrapt.decorator
    def breaking(wrapped, instance, args, kwargs):  # type: ignore[no-untyped-def]
        if _is_it_now():
            fault()
        return wrapped(*args, **kwargs)

    return breaking


@wrapt.decorator
def _at_step(wrapped, instance, args, kwargs):  # type: ignore[no-untyped-def]
    if kwargs["global_steps"] == int(NUMBER):
        _stop_here()
    return wrapped(*args, **kwargs)


_SAVE = ("verl.utils.checkpoint.fsdp_checkpoint_manager", "FSDPCheckpointManager", "save_checkpoint")
MODULE, HOLDER, NAME, FAULT = {
    "save": (*_SAVE, _at_visit(_half_a_file)),
    "disk": (*_SAVE, _at_visit(_full_disk)),
    "update": ("entropy_fork.verl.engine", "ForkingTokens", "train_batch", _at_visit(_stop_here)),
    "answer": ("entropy_fork.verl.agent_loop", "SeededSingleTurnAgentLoop", "run", _at_step),
    "reward": ("entropy_fork.reward", None, "compute_score", _at_visit(_stop_here)),
}[PLACE]


def _break(module: Any) -> None:
    holder = getattr(module, HOLDER) if HOLDER else module
    setattr(holder, NAME, FAULT(getattr(holder, NAME)))


wrapt.register_post_import_hook(_break, MODULE)
