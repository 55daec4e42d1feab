"""The plugin in processes of its own: active wherever verl is, loud where it cannot be."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from entropy_fork.verl.errors import EntropyForkError
from entropy_fork.verl.plugin import check_verl_version

Python = Callable[..., "subprocess.CompletedProcess[str]"]

PACKAGE = Path(__file__).resolve().parents[1] / "entropy_fork"
MODULES = sorted(
    "entropy_fork." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)


def test_whichever_module_comes_first_the_plugin_is_active(python: Python) -> None:
    """cpu.md: a Ray actor unpickles one of our classes before verl; a half-imported module registered nothing."""
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
    result = python("-c", script, *touching_verl)
    assert result.returncode == 0, result.stderr[-2000:]


def test_core_needs_no_verl(python: Python) -> None:
    script = (
        "import sys, entropy_fork.core.selection, entropy_fork.core.weighting, entropy_fork.core.statistics\n"
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


@pytest.mark.parametrize("version", ["0.8.0", "0.10.0", "0.10.0.dev0", "1.0"])
def test_another_verl_is_refused(version: str) -> None:
    with pytest.raises(EntropyForkError, match=rf"verl 0.9.x, and this is verl {version}. Install 'verl==0.9.\*'"):
        check_verl_version(version)


def test_supported_versions() -> None:
    for version in ("0.9.0", "0.9.1", "0.9.7.post1"):
        check_verl_version(version)


MAIN_PPO = ("-m", "verl.trainer.main_ppo", "--cfg", "job")


@pytest.mark.parametrize("asked", ["+entropy_fork=global", "+recipe=demo_cpu", "+entropy_fork.top_ratio=0.2"])
def test_a_run_that_asks_for_an_inactive_plugin_stops(python: Python, asked: str) -> None:
    result = python(*MAIN_PPO, asked, VERL_USE_EXTERNAL_PLUGINS="none", VERL_PLATFORM="")
    assert result.returncode != 0
    assert "is not active, so nothing would be masked" in result.stderr
    assert "VERL_USE_EXTERNAL_PLUGINS must be unset" in result.stderr


@pytest.mark.parametrize("application", ["one_step_off_policy.main_ppo", "fully_async_policy.fully_async_main"])
def test_verls_other_trainers_are_refused(python: Python, application: str) -> None:
    """They have no token weights, and would accept the preset and train on all tokens."""
    command = ("-m", f"verl.experimental.{application}", "--cfg", "job")
    result = python(*command, "+entropy_fork=global", VERL_PLATFORM="")
    assert result.returncode != 0
    assert "has a trainer of its own, which would train on all tokens" in result.stderr, result.stderr[-2000:]


def test_a_run_that_does_not_ask_is_left_alone(python: Python) -> None:
    assert python(*MAIN_PPO, VERL_USE_EXTERNAL_PLUGINS="none", VERL_PLATFORM="").returncode == 0


def test_a_plugin_whose_import_fails_is_not_swallowed(python: Python, tmp_path: Path) -> None:
    """verl catches the exception; Hydra would then take +recipe=x for a plain key."""
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


def test_the_cpu_recipe_without_the_opt_in_says_how(python: Python) -> None:
    result = python("-m", "verl.trainer.main_ppo", "+recipe=demo_cpu", VERL_PLATFORM="")
    assert result.returncode != 0
    assert "opted into by the environment: VERL_PLATFORM=cpu python -m" in result.stderr
    assert "ray init kwargs" not in result.stdout
