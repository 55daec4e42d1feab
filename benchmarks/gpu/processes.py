"""Find and end all processes of a run, also those that have left its process group, as Ray's do."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path


def processes_with(variable: str, value: str) -> list[int]:
    """The pids of the running processes that were started with this variable in their environment."""
    wanted = f"{variable}={value}".encode()
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                pids.append(int(folder.name))
        except OSError:  # it has ended, or is not ours
            continue
    return pids


def end_all(variable: str, value: str, patience_s: float = 20.0) -> None:
    """Kill these processes, until none is left or the patience is at its end."""
    end = time.monotonic() + patience_s
    while (left := [pid for pid in processes_with(variable, value) if pid != os.getpid()]) and time.monotonic() < end:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
