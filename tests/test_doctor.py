"""entropy-fork doctor: a real Ray, and what it says of processes that are not as they should be."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from entropy_fork.preflight import doctor
from entropy_fork.preflight.doctor import Diagnosis, sentences
from entropy_fork.preflight.probe import PACKAGES, probe
from entropy_fork.verl.config import EntropyForkConfig


@pytest.fixture(scope="module")
def healthy() -> dict[str, Any]:
    return probe()


def lines(answer: dict[str, Any], **needs: str) -> str:
    return "\n".join(doctor._of_process(answer, {"verl": ">=0.9,<0.10", "ray": ">=2.41", **needs}))


def test_this_process_is_healthy(healthy: dict[str, Any]) -> None:
    assert healthy["plugin"] == {"inactive": None, "trainers": [], "losses": [], "engine": "masked"}
    assert set(healthy["packages"]) == set(PACKAGES)
    assert lines(healthy) == ""


def test_what_is_said_of_a_process_that_is_not(healthy: dict[str, Any]) -> None:
    sick = copy.deepcopy(healthy)
    sick["plugin"] = {"inactive": "it is not there", "trainers": ["sync"], "losses": ["gspo"], "engine": "verl's"}
    sick["packages"] |= {"ray": None, "verl": "0.8.1", "vllm": None}
    sick["platform"] = None
    said = lines(sick)
    for part in (
        "the plugin is not active: it is not there. Install the same entropy-fork there",
        "trainer(s) sync would train on all tokens",
        "loss(es) gspo have no guard",
        "the FSDP engine is not entropy_fork's",
        "ray is not installed. pip install 'ray>=2.41'",
        "verl 0.8.1, and it must be >=0.9,<0.10. pip install 'verl>=0.9,<0.10'",
        "no rollout engine",
    ):
        assert part in said


def test_processes_that_differ(healthy: dict[str, Any]) -> None:
    other = copy.deepcopy(healthy) | {"platform": None}
    found = Diagnosis(processes={"this process": healthy, "a worker": other})
    doctor._accelerators(found)
    assert "VERL_PLATFORM=cpu here, but not in a worker" in found.problems[0]

    here, there = copy.deepcopy(other), copy.deepcopy(other)
    there["packages"]["verl"] = "0.9.0"
    found = Diagnosis(processes={"this process": here, "a worker": there})
    doctor._accelerators(found)
    assert "no accelerator in this process or a worker" in found.problems[0]
    assert "'entropy-fork[cpu]'" in found.problems[0]
    assert found.problems[1].startswith("verl differs between processes: 0.9.0, 0.9.1")


def test_the_needs_are_read_from_what_is_installed() -> None:
    needs = doctor._needs_of_verl()
    assert {"ray", "transformers", "tensordict", "verl", "math-verify", "TransferQueue"} <= set(needs)
    assert needs["verl"] == ">=0.9,<0.10"
    assert "vllm" not in needs  # an extra


def test_a_sentence_per_key() -> None:
    said = dict(sentences(EntropyForkConfig(top_ratio=0.1)))
    assert said["top_ratio=0.1"] == "10% of the response tokens are trained on, 90% are not."
    assert list(said) == [
        "top_ratio=0.1", "select=top", "entropy=old", "pool=mini_batch", "ties=exact", "denominator=kept",
        "weight=hard",
    ]  # fmt: skip
    changed = EntropyForkConfig(
        select="band", band_from=0.1, entropy="current", pool="micro_batch", ties="threshold", denominator="all",
        weight="soft", schedule="linear", schedule_steps=50, final_ratio=0.5,
    )  # fmt: skip
    text = " ".join(sentence for _, sentence in sentences(changed))
    for part in ("between the top 10% and the top 20%", "current policy's", "packing", "or beyond",
                 "about 5 times smaller", "in proportion to", "from 20% at step 1 to 50% at 50"):  # fmt: skip
        assert part in text
    assert sentences(None) == [("no mask", "All response tokens are trained on: verl as it is.")]
    assert "bit for bit" in sentences(EntropyForkConfig(top_ratio=1.0))[0][1]


def test_what_hydra_finds() -> None:
    found = Diagnosis()
    doctor._search_path(found)
    assert found.problems == []
    assert {"global", "official", "off"} <= set(found.groups["entropy_fork"])
    assert "demo_cpu" in found.groups["recipe"]


@pytest.mark.e2e
def test_with_a_real_ray_whose_workers_lack_the_plugin(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Here the plugin is active, in the workers it is switched off: just what no log would show."""
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
    assert found["mask"][0] == ["top_ratio=0.1", "10% of the response tokens are trained on, 90% are not."]


@pytest.mark.e2e
def test_with_a_real_ray_and_all_is_well(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    run = python("-m", "entropy_fork.cli", "doctor", timeout=180, COLUMNS="200")
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert "All is well." in run.stdout
    assert "a Ray worker" in run.stdout
    assert run.stdout.count("masked") >= 3


@pytest.mark.e2e
def test_a_cluster_that_is_not_there(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    run = python("-m", "entropy_fork.cli", "doctor", "--address", "auto", timeout=180, RAY_ADDRESS="", COLUMNS="300")
    assert run.returncode == 1
    assert "--address auto: ConnectionError" in run.stdout
    assert "Traceback" not in run.stdout + run.stderr


def test_no_ray_is_left_behind() -> None:
    import ray

    assert not ray.is_initialized()
    assert os.environ.get("VERL_PLATFORM") == "cpu"
