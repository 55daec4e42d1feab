"""Real ranks for tests: processes with a gloo group, started once for many calls."""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

#: seconds that a rank has for one answer. So a collective that hangs is a failure, not a test that never ends.
TIMEOUT_SECONDS = 120


#: the name of the event that Python's audit hooks get when ranks are started
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
    """``size`` ranks. Each keeps its own dict between calls, and passes it as the first argument of each function."""

    def __init__(self, size: int):
        # The fork server imports torch, and is forked for each rank. Preload no module of ours: the server does not see
        # our sys.path (Python 3.11), so it would silently leave that module out.
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
        """End the processes, even if they hang."""
        for process, connection in self._members:
            if process.is_alive():
                connection.send(None)
        for process, _ in self._members:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()
