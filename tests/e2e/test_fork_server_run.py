"""The fork server in real runs of ``main_ppo``: it changes no number, even if it dies in the middle of a run."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers.main_ppo import ONE_POOL, MainPPO, Recorded

pytestmark = pytest.mark.e2e


def running(main_ppo: MainPPO, program: str) -> list[int]:
    """The processes of the runs that execute one of our programs."""
    found = []
    for pid in main_ppo.processes():
        command = Path(f"/proc/{pid}/cmdline")
        if command.exists() and program.encode() in command.read_bytes():
            found.append(pid)
    return found


def test_the_server_changes_no_number_and_may_die(main_ppo: MainPPO, recorded: Recorded) -> None:
    """Three runs give the same numbers, bit for bit: with the server, with a kill after step 1, and without it."""
    settings = (*recorded.replay, *ONE_POOL, "trainer.total_training_steps=4", "trainer.max_actor_ckpt_to_keep=4")
    plain = main_ppo(*settings, "cpu_platform.fork_server=False", folder="plain")
    assert not running(main_ppo, "fork_server_process.py")

    run = main_ppo.start(*settings, folder="killed")
    while "step:1 - " not in run.output:
        assert run.process.poll() is None, run.output[-3000:]
        time.sleep(0.2)
    assert len(running(main_ppo, "worker_shim.py")) >= 5, "the workers are not from the server"
    launched = f"/proc/{run.process.pid}/task/{run.process.pid}/children"
    (server,) = [int(pid) for pid in Path(launched).read_text().split() if int(pid) in running(main_ppo, "_process.py")]
    os.kill(server, signal.SIGKILL)
    killed = run.wait()

    for step in (1, 4):
        found, wanted = killed.parameters(step), plain.parameters(step)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    deadline = time.monotonic() + 60
    while main_ppo.processes() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not running(main_ppo, "worker_shim.py")
    assert not list(Path(main_ppo.ray_folder).glob("ray/fork-server-*"))
