"""Real ranks for tests: processes with a gloo group, started once and asked many times. And who belongs to a run."""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

#: for one answer. A collective that hangs is a failure here, not a test that never ends.
TIMEOUT_SECONDS = 120


#: what Python's audit hooks are told when ranks are started
PROCESSES = "entropy_fork.processes"


def _serve(connection: Connection, rank: int, size: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    state: dict[str, Any] = {}
    while (request := connection.recv()) is not None:
        function, arguments = request
        try:
            connection.send((True, function(state, *arguments)))
        except Exception:
            connection.send((False, f"rank {rank} of {size}:\n{traceback.format_exc()}"))
    dist.destroy_process_group()


class Processes:
    """``size`` ranks. Each keeps a dict of its own between calls, the first argument of what it is asked to run."""

    def __init__(self, size: int):
        # A server that has imported torch and is forked for each rank. It does not see our sys.path (Python 3.11), so
        # a module of ours would not be found here, and left out without a word.
        sys.audit(PROCESSES)
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch"])
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        self._members = []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (there, rank, size, os.path.join(self._folder.name, "store"))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._members.append((process, here))

    def __call__(self, function: Callable[..., Any], per_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run a module-level function on all ranks at once, each with its own arguments."""
        for (_, connection), arguments in zip(self._members, per_rank, strict=True):
            connection.send((function, arguments))
        answers = []
        for process, connection in self._members:
            if not connection.poll(TIMEOUT_SECONDS):
                raise TimeoutError(f"{function} hangs in pid {process.pid}")
            answers.append(connection.recv())
        if failures := [answer for is_good, answer in answers if not is_good]:
            raise RuntimeError("\n".join(failures))
        return [answer for _, answer in answers]

    def close(self) -> None:
        """End the processes, also those that hang."""
        for process, connection in self._members:
            if process.is_alive():
                connection.send(None)
        for process, _ in self._members:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def processes_with(variable: str, value: str) -> list[int]:
    """The processes that were started with this in their environment and have not ended."""
    wanted = f"{variable}={value}".encode()
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                pids.append(int(folder.name))
        except OSError:  # it has ended, or is not ours
            continue
    return pids
