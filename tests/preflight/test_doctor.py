"""entropy-fork doctor: what it says of processes that are not as they should be. A real Ray: e2e/test_doctor_run.py."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest

from entropy_fork.common.installing import install_command
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
        "verl is 0.8.1, but must be >=0.9,<0.10. pip install 'verl>=0.9,<0.10'",
        "no rollout engine is installed",
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
    assert install_command("cpu") in found.problems[0]
    assert found.problems[1].startswith("verl differs between processes: 0.9.0, 0.9.1")


def test_the_needs_are_read_from_what_is_installed() -> None:
    needs = doctor._needs_of_verl()
    assert {"ray", "transformers", "tensordict", "verl", "math-verify", "TransferQueue"} <= set(needs)
    assert needs["verl"] == ">=0.9,<0.10"
    assert "vllm" not in needs  # an extra


def test_a_sentence_per_key() -> None:
    said = dict(sentences(EntropyForkConfig(top_ratio=0.1)))
    assert said["top_ratio=0.1"] == "Trains on 10% of the response tokens: the other 90% weigh 0."
    assert list(said) == [
        "top_ratio=0.1", "select=top", "entropy=old", "pool=mini_batch", "ties=exact", "denominator=kept",
        "weight=hard",
    ]  # fmt: skip
    changed = EntropyForkConfig(
        select="band", band_from=0.1, entropy="current", pool="micro_batch", ties="threshold", denominator="all",
        weight="soft", schedule="linear", schedule_steps=50, final_ratio=0.5,
    )  # fmt: skip
    text = " ".join(sentence for _, sentence in sentences(changed))
    for part in ("between the top 10% and the top 20%", "current policy", "packing", "or beyond",
                 "five times smaller", "in proportion to", "from 20% at step 1 to 50% at step 50"):  # fmt: skip
        assert part in text
    assert sentences(None) == [("no mask", "All response tokens are trained on: verl as it is.")]
    assert "bit for bit" in sentences(EntropyForkConfig(top_ratio=1.0))[0][1]
    assert "denominator=kept" not in dict(sentences(EntropyForkConfig(), "token-sum")), "verl divides by no number"


def test_what_hydra_finds() -> None:
    found = Diagnosis()
    doctor._search_path(found)
    assert found.problems == []
    assert {"global", "official", "off"} <= set(found.groups["entropy_fork"])
    assert "demo_cpu" in found.groups["recipe"]


def test_no_ray_is_left_behind() -> None:
    import ray

    assert not ray.is_initialized()
    assert os.environ.get("VERL_PLATFORM") == "cpu"
