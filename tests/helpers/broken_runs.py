"""Real runs of main_ppo that ``fault.py`` breaks: start them, and look at what they leave behind."""

from __future__ import annotations

import time
from pathlib import Path

from helpers.main_ppo import MainPPO, Running
from helpers.places import PYTHONPATH

#: the file in which verl notes its last checkpoint
LATEST = "latest_checkpointed_iteration.txt"


def fault_environment(place: str, stopped: Path) -> dict[str, str]:
    """The environment variables with which ``fault.py`` breaks a run at this place."""
    return {
        "VERL_USE_EXTERNAL_MODULES": "helpers.fault",
        "PYTHONPATH": PYTHONPATH,
        "ENTROPY_FORK_FAULT": place,
        "ENTROPY_FORK_STOPPED": str(stopped),
    }


def pid_of_stopped(run: Running, stopped: Path) -> int:
    """Wait until a process of the run has stopped at the place. Returns its pid."""
    deadline = time.monotonic() + 300
    while not stopped.exists():
        assert run.process.poll() is None, run.output[-6000:]
        assert time.monotonic() < deadline, run.output[-6000:]
        time.sleep(0.1)
    return int(stopped.read_text())


RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


def wait_until_gone(main_ppo: MainPPO) -> None:
    """Wait until an ended run has left no process: no worker, no daemon of Ray's.

    But an agent of Ray's may try for a minute more to tell a head node that was killed along with the run that its
    raylet has died (ray/_private/process_watcher.py). It holds nothing of the run.
    """
    deadline = time.monotonic() + 60
    while left := [name for name in map(name_of, main_ppo.processes()) if name and not name.startswith(RAY_AGENTS)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def name_of(pid: int) -> str:
    """A process's command line; empty if it has just ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""
