"""``make faults``: ``helpers/fault.py`` breaks a real run of main_ppo in each way that a long run can break."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from helpers.broken_runs import LATEST, fault_environment, name_of, pid_of_stopped, wait_until_gone
from helpers.main_ppo import MainPPO

from entropy_fork.common.output_folder import UNFINISHED

pytestmark = pytest.mark.fault


@pytest.mark.parametrize(
    ("place", "victim", "overrides", "message"),
    [
        ("answer:2", "TransformersServer", (), "EntropyForkError: rollout server 0 has died"),
        (
            "answer:2",
            "TransformersServer",
            ("trainer.v1.trainer_mode=colocate_async",),
            # in this mode weights may be on the way at that moment, and then their sender notices first
            "EntropyForkError: rollout server 0 has died|ActorDiedError: The actor died",
        ),
        ("answer:2", None, (), "EntropyForkError: agent-loop worker 0 has died"),
        ("answer:2", "TransferQueueController", (), "EntropyForkError: the TransferQueue's controller has died"),
        ("update:3", None, ("trainer.n_gpus_per_node=2",), "ActorDiedError: The actor"),
    ],
    ids=["rollout_server", "rollout_server_asynchronous", "agent_loop_worker", "transfer_queue", "training_worker"],
)
def test_a_process_that_dies_ends_the_run(
    main_ppo: MainPPO, tmp_path: Path, place: str, victim: str | None, overrides: tuple[str, ...], message: str
) -> None:
    """It dies in step 2, after a whole checkpoint. The two ranks are in a collective when one of them dies."""
    stopped = tmp_path / "stopped"
    run = main_ppo.start("trainer.total_training_steps=3", *overrides, **fault_environment(place, stopped))
    pid = pid_of_stopped(run, stopped)
    if victim is not None:
        (pid,) = [pid for pid in main_ppo.processes() if name_of(pid).startswith(f"ray::{victim}")]
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    output = run.wait(expect=1, timeout=90).output
    print(f"{place} {victim or ''} {overrides}: ended {time.monotonic() - killed:.0f} s after the kill")
    assert re.search(message, output), output[-6000:]
    step = (run.folder / "checkpoints" / LATEST).read_text()
    assert step == "1" or (step == "2" and "ActorDiedError: The actor" in message), (
        "step 2 may end where it may not wait"
    )
    assert not (run.folder / "checkpoints" / f"global_step_{step}" / UNFINISHED).exists()
    wait_until_gone(main_ppo)


def test_a_reward_that_hangs_ends_the_run(main_ppo: MainPPO, tmp_path: Path) -> None:
    environment = fault_environment("reward:33", tmp_path / "stopped")
    output = main_ppo(
        "trainer.total_training_steps=3", "entropy_fork_guards.patience_s=10", expect=1, **environment
    ).output
    assert "EntropyForkError: no answer has come for 10 s: 1 prompts are not finished, 1 of them begun" in output
    wait_until_gone(main_ppo)


def test_a_full_disk_ends_the_run_and_what_was_written_is_not_taken(main_ppo: MainPPO, tmp_path: Path) -> None:
    """The disk is full in step 2, and the unfinished checkpoint is refused. With room again, step 1 is resumed."""
    settings = ["trainer.total_training_steps=2"]
    full = main_ppo(*settings, expect=1, **fault_environment("disk:2", tmp_path / "stopped"))
    checkpoints = full.folder / "checkpoints"
    half = checkpoints / "global_step_2"
    assert f"EntropyForkError: the checkpoint of step 2 could not be written to {half} (" in full.output
    wait_until_gone(main_ppo)

    refused = main_ppo(*settings, "trainer.resume_mode=resume_path", f"trainer.resume_from_path={half}", expect=1)
    assert f"{half} is unfinished" in refused.output
    assert f"{checkpoints}/global_step_1 is whole: write trainer.resume_mode=resume_path" in refused.output
    wait_until_gone(main_ppo)

    resumed = main_ppo(*settings)
    assert "setting global step to 1" in resumed.output
    assert resumed.parameters(2)
