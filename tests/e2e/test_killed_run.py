"""A real run that is killed resumes from the last whole checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.broken_runs import LATEST, fault_environment, pid_of_stopped, wait_until_gone
from helpers.main_ppo import MainPPO, Recorded, load, spy_environment

pytestmark = pytest.mark.e2e


def test_a_killed_run_goes_on_as_if_it_had_not_been(main_ppo: MainPPO, recorded: Recorded, tmp_path: Path) -> None:
    """SIGKILL comes when half of a file of step 4's checkpoint is written. The run resumes from step 2.

    On recorded answers it then selects the same tokens and ends with the same parameters, bit for bit, as a run that
    was not killed. All these runs replay answers: see ``recorded``.
    """
    settings = [*recorded.replay, "trainer.total_training_steps=4", "trainer.save_freq=2"]
    whole = main_ppo(*settings, folder="whole", **spy_environment(tmp_path / "spy-whole"))

    killed = main_ppo.start(*settings, **fault_environment("save:2", tmp_path / "stopped"))
    pid_of_stopped(killed, tmp_path / "stopped")
    killed.process.kill()
    killed.process.wait()
    wait_until_gone(main_ppo)
    checkpoints = killed.folder / "checkpoints"
    assert (checkpoints / "global_step_4" / "actor" / "model_world_size_1_rank_0.pt").stat().st_size > 0
    assert (checkpoints / "global_step_4" / "unfinished").exists()
    assert (checkpoints / LATEST).read_text() == "2"

    resumed = main_ppo(*settings, **spy_environment(tmp_path / "spy-resumed"))
    assert "setting global step to 2" in resumed.output
    assert re.findall(r"(?<!_)step:(\d+) - ", resumed.output) == ["3", "4"]
    assert (checkpoints / LATEST).read_text() == "4"
    assert not (checkpoints / "global_step_4" / "unfinished").exists()

    selections = load(tmp_path / "spy-whole", "selection"), load(tmp_path / "spy-resumed", "selection")
    assert [len(of_run) for of_run in selections] == [4, 2]
    for expected, selection in zip(selections[0][2:], selections[1], strict=True):
        assert expected.keys() == selection.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, selection[name]), name
    expected, parameters = whole.parameters(4), resumed.parameters(4)
    for name, parameter in expected.items():
        assert torch.equal(parameter, parameters[name]), name
    assert any(not torch.equal(parameter, expected[name]) for name, parameter in resumed.parameters(2).items())
