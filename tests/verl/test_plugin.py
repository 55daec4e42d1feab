"""The plugin in separate processes: it is active in every process with verl, or there is an error."""

from __future__ import annotations

import importlib.metadata
import os
import pickle
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.places import TESTS
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

import entropy_fork
from entropy_fork.cli import app
from entropy_fork.common.supported import SUPPORTED, TESTED, why_unsupported
from entropy_fork.verl.config import EntropyForkConfig

Python = Callable[..., "subprocess.CompletedProcess[str]"]

PACKAGE = Path(entropy_fork.__file__).parent
MODULES = sorted(
    "entropy_fork." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)


def test_whichever_module_comes_first_the_plugin_is_active(python: Python) -> None:
    """A Ray actor may unpickle one of our classes before it imports verl. A half imported module would not register."""
    script = """
import importlib, os, sys
# what takes long and is not in question, once for all of them
import accelerate, datasets, hydra, peft, ray, tensordict, torch, torch.distributed.fsdp, transfer_queue, transformers
assert "verl" not in sys.modules
for module in sys.argv[1:]:
    if os.fork():
        _, status = os.wait()
        assert status == 0, module
        continue
    importlib.import_module(module)
    import verl
    assert "entropy_fork.verl.plugin" in sys.modules, module
    from verl.plugin.platform import get_platform
    assert get_platform().device_name == "cpu"
    from verl.trainer.ppo.v1 import get_trainer_cls
    from entropy_fork.verl.trainer import TokenWeights
    assert issubclass(get_trainer_cls("sync"), TokenWeights)
    os._exit(0)
"""
    touching_verl = [name for name in MODULES if name.startswith("entropy_fork.verl.") and not name.endswith("plugin")]
    text = "".join(file.read_text(encoding="utf-8") for file in (PACKAGE / "verl").rglob("*.py"))
    needed_there = sorted(set(re.findall(r"from (entropy_fork\.(?!verl\b)[a-z_.]+) import", text)) & set(MODULES))
    assert "entropy_fork.common.output_folder" in needed_there
    result = python("-c", script, *touching_verl, *needed_there)
    assert result.returncode == 0, result.stderr[-2000:]


def test_core_needs_no_verl(python: Python) -> None:
    script = (
        "import sys, entropy_fork.core.selection, entropy_fork.core.weighting, entropy_fork.core.tally\n"
        "assert not {'verl', 'ray', 'hydra', 'transformers', 'vllm'} & set(sys.modules)"
    )
    assert python("-c", script).returncode == 0


def test_without_verl_platform_nothing_of_the_cpu_is_registered(python: Python) -> None:
    script = (
        "import torch, verl\n"
        "from verl.plugin.platform.platform_manager import PlatformRegistry\n"
        "assert 'cpu' not in PlatformRegistry.registered_names()\n"
        "assert not hasattr(torch.cpu, 'empty_cache')"
    )
    result = python("-c", script, VERL_PLATFORM="")
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("version", ["0.8.0", "0.9.0.dev0", "0.9.0rc1", "0.10.0.dev0", "0.10.0rc1", "1.0", "main"])
def test_another_verl_is_refused(version: str) -> None:
    problem = why_unsupported(version)
    assert problem is not None
    assert f"works with verl >=0.9,<0.10 (tested with 0.9.0 and 0.9.1), and this is verl {version}" in problem
    assert "pip install 'verl>=0.9,<0.10'" in problem


@pytest.mark.parametrize("version", [*TESTED, "0.9.1+local", "0.9.2.dev0", "0.9.2rc1", "0.9.7.post1"])
def test_supported_versions(version: str) -> None:
    assert why_unsupported(version) is None


def test_the_range_is_the_one_that_a_new_environment_gets() -> None:
    """An existing environment does not change: a requirement with a range would make pip replace a verl outside it."""
    requirements = [Requirement(line) for line in importlib.metadata.requires("entropy-fork") or []]
    ranges = {str(r.marker): r.specifier for r in requirements if r.name == "verl"}
    assert ranges.pop("None") == SpecifierSet()
    assert ranges == {f'extra == "{extra}"': SpecifierSet(SUPPORTED) for extra in ("cpu", "cpu-vllm")}


def pretended(version: str) -> dict[str, str]:
    """The environment variables with which verl has another version number in every process."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return {"VERL_USE_EXTERNAL_MODULES": "helpers.pretend_verl", "PRETENDED_VERL": version, "PYTHONPATH": path}


def test_a_masked_run_in_another_verl_stops_before_ray(python: Python) -> None:
    """verl swallows our refusal, and would train on all tokens."""
    command = ("-m", "verl.trainer.main_ppo", "+entropy_fork=global")
    result = python(*command, **pretended("0.10.0rc1"), VERL_PLATFORM="")
    assert result.returncode != 0
    assert "not active, so nothing would be masked: its import fails with EntropyForkError" in result.stderr
    assert "works with verl >=0.9,<0.10 (tested with 0.9.0 and 0.9.1), and this is verl 0.10.0rc1" in result.stderr
    assert "ray init kwargs" not in result.stdout


def test_a_mask_asked_for_in_a_file_stops_the_run_as_well(python: Python, tmp_path: Path) -> None:
    """The command line does not show it, so the composed config is checked. (verl's own checks need a model.)"""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.yaml").write_text("# @package _global_\nentropy_fork: {top_ratio: 0.2}\n")
    script = f"""
import runpy, sys, verl.utils.config
verl.utils.config.validate_config = lambda **_: None
sys.argv = ["main_ppo", "--config-dir", {str(tmp_path)!r}, "+mine=run"]
runpy.run_module("verl.trainer.main_ppo", run_name="__main__", alter_sys=True)
"""
    result = python("-c", script, **pretended("0.9.0.dev0"), VERL_PLATFORM="")
    assert result.returncode != 0
    assert "not active, so nothing would be masked" in result.stderr, result.stderr[-3000:]
    assert "this is verl 0.9.0.dev0" in result.stderr
    assert "ray init kwargs" not in result.stdout


def test_a_worker_with_another_verl_cannot_read_the_config(python: Python) -> None:
    """On a node of the cluster that was not upgraded, nothing of ours can be unpickled."""
    script = f"import pickle; pickle.loads({pickle.dumps(EntropyForkConfig())!r})"
    result = python("-c", script, **pretended("0.8.0"), VERL_PLATFORM="")
    assert result.returncode != 0
    assert "EntropyForkError: entropy_fork works with verl >=0.9,<0.10" in result.stderr
    on_a_cpu = python("-c", "import verl; print('went on')", **pretended("0.8.0"))
    assert on_a_cpu.returncode != 0
    assert on_a_cpu.stderr.strip().splitlines()[-1].startswith("entropy_fork works with verl >=0.9,<0.10")


def test_the_commands_in_another_verl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.8.0")
    result = CliRunner().invoke(app, ["plan"])
    assert result.exit_code == 1
    assert "error: entropy_fork works with verl >=0.9,<0.10" in result.output


MAIN_PPO = ("-m", "verl.trainer.main_ppo", "--cfg", "job")


@pytest.mark.parametrize(
    "asked",
    ["+entropy_fork=global", "+recipe=demo_cpu", "+entropy_fork.top_ratio=0.2", "+entropy_fork_guards=on"],
)
def test_a_run_that_asks_for_an_inactive_plugin_stops(python: Python, asked: str) -> None:
    result = python(*MAIN_PPO, asked, VERL_USE_EXTERNAL_PLUGINS="none", VERL_PLATFORM="")
    assert result.returncode != 0
    assert "is not active, so nothing would be masked" in result.stderr
    assert "VERL_USE_EXTERNAL_PLUGINS must be unset" in result.stderr


@pytest.mark.parametrize("application", ["one_step_off_policy.main_ppo", "fully_async_policy.fully_async_main"])
def test_verls_other_trainers_are_refused(python: Python, application: str) -> None:
    """They have no token weights: they would accept the preset and train on all tokens."""
    command = ("-m", f"verl.experimental.{application}", "--cfg", "job")
    result = python(*command, "+entropy_fork=global", VERL_PLATFORM="")
    assert result.returncode != 0
    assert "has a trainer of its own, which would train on all tokens" in result.stderr, result.stderr[-2000:]


def test_a_run_that_does_not_ask_is_left_alone(python: Python) -> None:
    assert python(*MAIN_PPO, VERL_USE_EXTERNAL_PLUGINS="none", VERL_PLATFORM="").returncode == 0


def test_a_plugin_whose_import_fails_is_not_swallowed(python: Python, tmp_path: Path) -> None:
    """verl catches the exception, and Hydra would then take +recipe=x for a plain key."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "wrapt.py").write_text("raise ImportError('this wrapt is broken')")
    result = python(*MAIN_PPO, "+recipe=demo_cpu", PYTHONPATH=str(tmp_path / "broken"), VERL_PLATFORM="")
    assert result.returncode != 0
    assert "its import fails with ImportError: this wrapt is broken" in result.stderr


def test_a_bad_ratio_stops_the_launcher_before_ray(python: Python) -> None:
    result = python("-m", "verl.trainer.main_ppo", "+recipe=demo_cpu", "entropy_fork.top_ratio=1.2")
    assert result.returncode != 0
    assert "top_ratio must be in (0, 1], got 1.2" in result.stderr
    assert "ray init kwargs" not in result.stdout


@pytest.mark.parametrize("word", ["entropy_fork.patience_s=9", "+entropy_fork.patience_s=9"])
def test_a_key_that_has_moved_says_where_to(python: Python, word: str) -> None:
    result = python("-m", "verl.trainer.main_ppo", "+recipe=demo_cpu", word)
    assert result.returncode != 0
    assert "'entropy_fork.patience_s' is now 'entropy_fork_guards.patience_s'. Write +entropy_fork_g" in result.stderr
    assert "ray init kwargs" not in result.stdout


def test_the_cpu_recipe_without_the_opt_in_says_how(python: Python) -> None:
    result = python("-m", "verl.trainer.main_ppo", "+recipe=demo_cpu", VERL_PLATFORM="")
    assert result.returncode != 0
    assert "set the environment variable: VERL_PLATFORM=cpu python -m" in result.stderr
    assert "ray init kwargs" not in result.stdout
