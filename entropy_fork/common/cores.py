"""How many cores this process may really use, and threads that leave them to others while they wait."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from math import ceil
from pathlib import Path

#: where a container mounts its cgroup: version 2, and version 1
CGROUP_FOLDER = Path("/sys/fs/cgroup")

#: OpenMP's threads sleep while they wait for each other. By default they spin, and keep a core from other work.
PASSIVE_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def available_cores(cgroup: Path = CGROUP_FOLDER) -> int:
    """The number of cores that this process may use, at least 1.

    It is the smaller of two numbers: the cores that the process may run on (``sched_getaffinity``; set by ``taskset``,
    Slurm or ``docker --cpuset-cpus``), and the processor time that its control group may use, rounded up (``cpu.max``;
    set by ``docker --cpus`` or Kubernetes).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = _cgroup_limit(cgroup)
    return max(1, cores if limit is None else min(cores, ceil(limit)))


def _cgroup_limit(cgroup: Path) -> float | None:
    """Seconds of processor time per second that the control group may use, or None without a limit."""
    with suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text()
        period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


def share_cores(processes: int = 1) -> None:
    """Give torch's work in this process its share of the cores, at least one thread.

    Args:
        processes: how many processes like this one work at the same time.
    """
    import torch

    torch.set_num_threads(max(1, available_cores() // processes))


def waiting_passively(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that make OpenMP wait passively, for the environment of a new process. Empty if the user set one.

    OpenMP reads them when it is loaded: set them before torch is imported.
    """
    return {} if any(name in environment for name in PASSIVE_WAITING) else dict(PASSIVE_WAITING)
