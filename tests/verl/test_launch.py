"""A config that asks for a mask keeps its guard, whatever program starts the run."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from omegaconf import DictConfig, OmegaConf

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.verl.config import EntropyForkConfig, guarded_name

Python = Callable[..., "CompletedProcess[str]"]

ROOT = {"actor_rollout_ref": {"actor": {"policy_loss": {"loss_mode": "vanilla"}}}}


def root(**node: object) -> DictConfig:
    return OmegaConf.create({**ROOT, "entropy_fork": node} if node else ROOT)


def loss_mode(config: DictConfig) -> str:
    return config.actor_rollout_ref.actor.policy_loss.loss_mode


def test_a_pickled_config_is_typed_and_asks_for_the_guarded_loss() -> None:
    arrived = pickle.loads(pickle.dumps(root(top_ratio=0.1)))
    assert OmegaConf.get_type(arrived.entropy_fork) is EntropyForkConfig
    assert arrived.entropy_fork.top_ratio == 0.1
    assert loss_mode(arrived) == guarded_name("vanilla")
    assert loss_mode(pickle.loads(pickle.dumps(arrived))) == guarded_name("vanilla")


def test_a_read_only_config_takes_its_guard_along() -> None:
    config = root(top_ratio=0.1)
    OmegaConf.set_readonly(config, True)
    arrived = pickle.loads(pickle.dumps(config))
    assert OmegaConf.get_type(arrived.entropy_fork) is EntropyForkConfig
    assert loss_mode(arrived) == guarded_name("vanilla")
    assert OmegaConf.is_readonly(config)


def test_a_config_without_a_loss_gets_the_guarded_default() -> None:
    config = OmegaConf.create({"actor_rollout_ref": {"actor": {"strategy": "fsdp2"}}, "entropy_fork": {}})
    assert loss_mode(pickle.loads(pickle.dumps(config))) == guarded_name("vanilla")


def test_what_does_not_ask_is_pickled_as_it_is() -> None:
    off = pickle.loads(pickle.dumps(root(enabled=False)))
    assert loss_mode(off) == "vanilla"
    others = [root(), OmegaConf.create({"entropy_fork": {"mine": 1}}), OmegaConf.create(None), OmegaConf.create("???")]
    for config in [*others, root(top_ratio=0.1).entropy_fork, OmegaConf.structured(EntropyForkConfig)]:
        before = OmegaConf.to_yaml(config) if not config._is_none() and not config._is_missing() else None
        arrived = pickle.loads(pickle.dumps(config))
        assert arrived == config
        assert before is None or OmegaConf.to_yaml(arrived) == before


def test_a_bad_node_does_not_leave_its_process() -> None:
    with pytest.raises(EntropyForkError, match="top_ration"):
        pickle.dumps(root(top_ration=0.1))


#: a program with its own task runner, which calls none of verl's functions that check a config
OWN_PROGRAM = """
import pickle
import hydra, ray
{first}
class Runner:
    class run:
        remote = staticmethod(lambda config: pickle.dumps(config) and print("LAUNCHED"))
    remote = classmethod(lambda cls: cls)

ray.init = lambda **_: print("RAY")
ray.get = lambda result: result

@hydra.main(config_path="pkg://verl.trainer.config", config_name="ppo_trainer", version_base=None)
def main(config):
    {later}
    {launch}

main()
"""
IMPORT = "from verl.trainer.main_ppo import run_ppo"
RUN_PPO = "run_ppo(config, Runner)"

#: what the program imports before Hydra starts, and after; and how it starts its task runner
PROGRAMS = {
    "run_ppo": (IMPORT, "", RUN_PPO),
    "run_ppo, imported late": ("", IMPORT, RUN_PPO),
    "its own launch": ("import verl", "", "Runner.run.remote(config)"),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_of_ones_own(python: Python, tmp_path: Path, program: str) -> None:
    """The mask is in a config file of the user; the command line has nothing of ours."""
    first, later, launch = PROGRAMS[program]
    script = tmp_path / "own.py"
    script.write_text(OWN_PROGRAM.format(first=first, later=later, launch=launch))
    (tmp_path / "conf" / "mine").mkdir(parents=True)
    (tmp_path / "conf" / "mine" / "masked.yaml").write_text("# @package _global_\nentropy_fork: {top_ratio: 0.2}\n")
    command = [str(script), "--config-dir", str(tmp_path / "conf")]

    left_out = python(*command, "+mine=masked", VERL_USE_EXTERNAL_PLUGINS="another", VERL_PLATFORM="")
    assert left_out.returncode != 0
    assert "not active, so nothing would be masked: verl did not load it" in left_out.stderr, left_out.stderr[-3000:]
    assert "LAUNCHED" not in left_out.stdout
    # a program that asks for nothing runs as before
    stock = python(*command, VERL_USE_EXTERNAL_PLUGINS="another", VERL_PLATFORM="")
    assert stock.returncode == 0, stock.stderr[-3000:]
    assert "LAUNCHED" in stock.stdout
    if launch == RUN_PPO:  # with the plugin, our checks run before Ray starts
        masked = python(*command, "+mine=masked", "algorithm.rollout_correction.bypass_mode=true", VERL_PLATFORM="")
        assert masked.returncode != 0
        assert "bypass_mode=True skips the log-prob pass" in masked.stderr, masked.stderr[-3000:]
        assert "RAY" not in masked.stdout
    if first == IMPORT:  # Hydra gives a preset's node its type, before any check
        preset = python(*command, "+entropy_fork=global", "algorithm.rollout_correction.bypass_mode=true")
        assert "bypass_mode=True skips the log-prob pass" in preset.stderr, preset.stderr[-3000:]
        assert "RAY" not in preset.stdout
