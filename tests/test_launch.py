"""A config that asks for a mask takes its guard along, whoever starts the run and however."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from omegaconf import DictConfig, OmegaConf

from entropy_fork.verl.config import EntropyForkConfig, guarded_name, is_typed
from entropy_fork.verl.errors import EntropyForkError

Python = Callable[..., "CompletedProcess[str]"]

ROOT = {"actor_rollout_ref": {"actor": {"policy_loss": {"loss_mode": "vanilla"}}}}


def root(**node: object) -> DictConfig:
    return OmegaConf.create({**ROOT, "entropy_fork": node} if node else ROOT)


def loss_mode(config: DictConfig) -> str:
    return config.actor_rollout_ref.actor.policy_loss.loss_mode


def test_a_pickled_config_is_typed_and_asks_for_the_guarded_loss() -> None:
    arrived = pickle.loads(pickle.dumps(root(top_ratio=0.1)))
    assert is_typed(arrived)
    assert OmegaConf.get_type(arrived.entropy_fork) is EntropyForkConfig
    assert arrived.entropy_fork.top_ratio == 0.1
    assert loss_mode(arrived) == guarded_name("vanilla")
    assert loss_mode(pickle.loads(pickle.dumps(arrived))) == guarded_name("vanilla")


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


#: a program with a task runner of its own, which calls nothing of verl's that checks a config
OWN_PROGRAM = """
import sys
import hydra, ray
{first}
class Runner:
    class run:
        remote = staticmethod(lambda config: print("LAUNCHED"))
    remote = classmethod(lambda cls: cls)

ray.init = lambda **_: print("RAY")
ray.get = lambda result: result

@hydra.main(config_path=None, config_name="run", version_base=None)
def main(config):
    {later}
    run_ppo(config, Runner)

main()
"""
IMPORT = "from verl.trainer.main_ppo import run_ppo"


def own_program(folder: Path, import_late: bool, node: str) -> list[str]:
    (folder / "conf").mkdir()
    (folder / "conf" / "run.yaml").write_text(f"defaults: [ppo_trainer, _self_]\n{node}\n")
    script = folder / "own.py"
    script.write_text(OWN_PROGRAM.format(first="" if import_late else IMPORT, later=IMPORT if import_late else ""))
    return [str(script), "--config-dir", str(folder / "conf")]


@pytest.mark.parametrize("import_late", [False, True])
def test_a_program_of_ones_own_that_leaves_the_plugin_out_is_stopped(
    python: Python, tmp_path: Path, import_late: bool
) -> None:
    import verl.trainer.main_ppo as main_ppo

    searchpath = f"hydra.searchpath=[file://{Path(main_ppo.__file__).parent}/config]"
    masked = own_program(tmp_path, import_late, "entropy_fork: {top_ratio: 0.2}")
    result = python(*masked, searchpath, VERL_USE_EXTERNAL_PLUGINS="another", VERL_PLATFORM="")
    assert result.returncode != 0
    assert "not active, so nothing would be masked: verl did not load it" in result.stderr, result.stderr[-3000:]
    assert "RAY" not in result.stdout
    # with the plugin, the checks run before Ray starts
    result = python(*masked, searchpath, VERL_PLATFORM="")
    assert result.returncode != 0
    assert "EntropyForkError" in result.stderr, result.stderr[-3000:]
    assert "RAY" not in result.stdout
    # and a program that does not ask is left alone
    (tmp_path / "conf" / "run.yaml").write_text("defaults: [ppo_trainer, _self_]\n")
    for plugins in ("another", "auto"):
        result = python(*masked, searchpath, VERL_USE_EXTERNAL_PLUGINS=plugins, VERL_PLATFORM="")
        assert result.returncode == 0, result.stderr[-3000:]
        assert "RAY" in result.stdout
        assert "LAUNCHED" in result.stdout
