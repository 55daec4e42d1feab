"""A process uses as many threads as there are cores for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from entropy_fork.common.cores import PASSIVE_WAITING, available_cores, waiting_passively

ALL = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, ALL),
        ({"cpu.max": "max 100000\n"}, ALL),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu.max": "100100 100000\n"}, min(ALL, 2)),
        ({"cpu.max": "6400000 100000\n"}, ALL),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, ALL),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu.max": "no number\n"}, ALL),
    ],
)
def test_a_control_groups_limit_counts(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cores(tmp_path) == cores


@pytest.mark.process
def test_the_cores_that_a_process_may_run_on_count() -> None:
    program = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    program += "from entropy_fork.common.cores import available_cores; print(available_cores())"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "1\n"


def test_what_the_user_says_about_waiting_stands() -> None:
    assert waiting_passively({"PATH": "/bin"}) == PASSIVE_WAITING
    for name in PASSIVE_WAITING:
        assert waiting_passively({name: "anything"}) == {}
