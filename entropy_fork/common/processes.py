"""Find and end all processes of a run, also those that have left its process group, as Ray's do.

Whoever starts the run gives it an environment variable with a value of its own. Every process of the run inherits it.
"""

from __future__ import annotations

import math
import os
import signal
import time
from contextlib import suppress
from pathlib import Path


def processes_with(variable: str, value: str) -> list[int]:
    """The pids of the processes that were started with this variable in their environment, without this process.

    On a system without ``/proc`` there are none.
    """
    wanted = f"{variable}={value}".encode()
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                pids.append(int(folder.name))
        except OSError:  # it has ended meanwhile, or is another user's
            continue
    return [pid for pid in pids if pid != os.getpid()]


def end_processes(variable: str, value: str, grace_s: float = 0.0, patience_s: float = math.inf) -> None:
    """Wait until these processes have ended, and kill those that do not end in time.

    Ray's daemons and workers live a moment longer than the process that started them, or much longer if it crashed. A
    worker keeps its GPU's memory until it ends.

    Args:
        variable: the name of the environment variable.
        value: its value in these processes.
        grace_s: seconds that they have to end by themselves.
        patience_s: seconds after which this function returns even if a killed process is still there.
    """
    began = time.monotonic()
    while (left := processes_with(variable, value)) and (waited := time.monotonic() - began) < grace_s + patience_s:
        if waited >= grace_s:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
