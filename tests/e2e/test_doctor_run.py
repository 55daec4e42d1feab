"""entropy-fork doctor with a real Ray."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.e2e


def test_with_a_real_ray_whose_workers_lack_the_plugin(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """The plugin is active in this process and switched off in the workers. No log would show that."""
    code = (
        "import verl, os, sys; os.environ['VERL_USE_EXTERNAL_PLUGINS'] = 'none'; "
        "from entropy_fork.cli import app; app(['doctor', '--json', '+entropy_fork=global', "
        "'entropy_fork.top_ratio=0.1', 'actor_rollout_ref.rollout.name=vllm'])"
    )
    run = python("-c", code, timeout=180)
    assert run.returncode == 1, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert found["healthy"] is False
    assert found["processes"]["this process"]["plugin"]["inactive"] is None
    assert "VERL_USE_EXTERNAL_PLUGINS=none" in found["processes"]["a Ray worker"]["plugin"]["inactive"]
    assert any(p.startswith("a Ray worker (") and "the plugin is not active" in p for p in found["problems"])
    assert any("this command line: " in p and "VERL_PLATFORM=cpu, but trainer.device" in p for p in found["problems"])
    assert found["mask"][0] == ["top_ratio=0.1", "Trains on 10% of the response tokens: the other 90% weigh 0."]


def test_with_a_real_ray_and_all_is_well(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    run = python("-m", "entropy_fork.cli", "doctor", timeout=180, COLUMNS="200")
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert "All is well." in run.stdout
    assert "a Ray worker" in run.stdout
    assert run.stdout.count("masked") >= 3


def test_a_cluster_that_is_not_there(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    run = python("-m", "entropy_fork.cli", "doctor", "--address", "auto", timeout=180, RAY_ADDRESS="", COLUMNS="300")
    assert run.returncode == 1
    assert "--address auto: ConnectionError" in run.stdout
    assert "Traceback" not in run.stdout + run.stderr
