"""Stage d: the demo in main_ppo with vLLM as its rollout, where vLLM is installed.

    python -m benchmarks.gpu.vllm_rollout --device cuda

The largest difference of probabilities between rollout and trainer says whether the weights arrive. The demo's model
has a vocabulary of its tokenizer's size, so vLLM masks no token that the trainer counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import typer

from benchmarks.gpu.cases import Case, Measured, Stage, command, is_installed
from benchmarks.gpu.training import build_world, measure, overrides, run

#: what the light rollout's cluster sets otherwise than vLLM wants it
VLLM = {
    "cuda": (
        "actor_rollout_ref.rollout.name=vllm",
        "~actor_rollout_ref.rollout.engine_kwargs.transformers",
        "actor_rollout_ref.rollout.free_cache_engine=true",
        "actor_rollout_ref.rollout.enable_sleep_mode=true",
        "actor_rollout_ref.rollout.gpu_memory_utilization=0.4",
    ),
    "cpu": ("actor_rollout_ref.rollout.name=vllm",),
}


def cases(device: str, folder: Path) -> list[Case]:
    """The cases of the stage."""
    lacks = "" if is_installed("vllm") else "vLLM is not installed"
    return [
        Case(preset, "The demo, vLLM", partial(train, device, preset, folder), lacks, 230)
        for preset in ("global", "official")
    ]


def train(device: str, preset: str, folder: Path) -> Iterable[Measured]:
    """Run the demo with vLLM, and read its metrics."""
    build_world(folder)
    words = [*overrides(device, None, folder), *VLLM[device], f"entropy_fork={preset}"]
    return list(measure(preset, run(device, words, folder / f"run-{preset}")))


STAGE = Stage("d", "main_ppo with vLLM", "benchmarks.gpu.vllm_rollout", cases)

if __name__ == "__main__":
    typer.run(command(STAGE))
