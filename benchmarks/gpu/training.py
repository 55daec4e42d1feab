"""Stage c: the real main_ppo on one GPU, with the light rollout: the demo, and a recipe of the paper, shrunken.

    python -m benchmarks.gpu.training --device cuda
    python -m benchmarks.gpu.training --device cpu          the same recipes on the demo's tiny model

The recipe is qwen3_8b_20k on a model of Qwen3-0.6B's shape with random weights, for three steps under each of three
presets. Its reward is a checksum, because such a model knows nothing. Beside the measured peak of the trainer's memory
stands what ``entropy-fork plan`` says of the same command line. Needs verl with its V1 trainer.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import typer

from benchmarks.gpu.cases import REPOSITORY, Case, Measured, Stage, command, environment, is_installed

DEMO, RECIPE = "The demo, light rollout", "qwen3_8b_20k, shrunken"
PRESETS = ("global", "official", "off")
PEAK, PREDICTED = "peak of the trainer's memory, GiB", "predicted by plan, GiB"

#: verl's metrics, and the columns that they become
METRICS = {
    "timing_s/step": "step, s",
    "timing_s/gen": "generation, s",
    "timing_s/old_log_prob": "old log-probs, s",
    "timing_s/update_actor": "update, s",
    "timing_s/update_weights": "weight sync, s",
    "entropy_fork/kept_ratio": "kept share",
    "training/rollout_probs_diff_max": "rollout against trainer, largest difference of probabilities",
}

#: a recipe of the paper, shrunken to minutes on one GPU
SHRUNKEN = (
    "data.max_prompt_length=64",
    "data.max_response_length=256",
    "data.train_batch_size=16",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192",
    "reward.reward_kwargs.overlong_buffer_cfg.len=64",
    f"reward.custom_reward_function.path={REPOSITORY / 'benchmarks/gpu/reward.py'}",
    "trainer.logger=[console]",
    "trainer.total_training_steps=3",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
    "trainer.resume_mode=disable",
)

#: the demo for three steps, without files that nobody reads
SHORT = (
    "trainer.logger=[console]",
    "trainer.total_training_steps=3",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
)


def overrides(device: str, preset: str | None, folder: Path) -> list[str]:
    """The words after ``python -m verl.trainer.main_ppo``.

    Args:
        device: ``cpu`` or ``cuda``.
        preset: of the recipe of the paper; None for the demo.
        folder: where the demo's world and the model are, or will be.
    """
    world, on_gpu = folder / "world", device == "cuda"
    if preset is None:
        cluster = ["cluster=gpu_light"] if on_gpu else []
        return ["+recipe=demo_cpu", *cluster, f"demo.dir={world}", *SHORT]
    words = ["+recipe=qwen3_8b_20k", f"+cluster={'gpu_light' if on_gpu else 'cpu_smoke'}", f"entropy_fork={preset}"]
    if not on_gpu:
        return [*words, f"demo.dir={world}"]
    files = [f"data.train_files={world}/train.parquet", f"data.val_files={world}/test.parquet"]
    return [*words, *files, f"actor_rollout_ref.model.path={folder / 'model'}", *SHRUNKEN]


def cases(device: str, folder: Path) -> list[Case]:
    """The cases of the stage."""
    lacks = "" if is_installed("verl") else "verl is not installed"
    found = [Case("demo", DEMO, partial(train, device, "demo", None, folder), lacks, 240)]
    for preset in PRESETS:
        found.append(Case(preset, RECIPE, partial(train, device, preset, preset, folder), lacks, 200))
    return found


def train(device: str, name: str, preset: str | None, folder: Path) -> Iterable[Measured]:
    """Build what the run needs, run it, and read its metrics; on a GPU also what ``plan`` says of its memory."""
    build_world(folder)
    if device == "cuda" and preset is not None:
        build_model(folder)
    words = overrides(device, preset, folder)
    found = list(measure(name, run(device, words, folder / f"run-{name}")))
    if device == "cuda" and preset is not None:
        from benchmarks.gpu.predict import predicted_gib

        found.append(Measured(name, PREDICTED, predicted_gib(words, is_installed("flash_attn"))))
    return found


def build_world(folder: Path) -> None:
    """Build the demo's data, tokenizer and model, with almost no warm-up."""
    if (folder / "world").exists():
        return
    few = ["--steps", "30", "--train-problems", "128", "--test-problems", "8", "--warmup-problems", "500"]
    build = [sys.executable, "-m", "examples.cpu_demo.build", "--output", str(folder / "world"), *few]
    subprocess.run(build, cwd=REPOSITORY, env=environment("cpu"), check=True)


def build_model(folder: Path, weights: bool = True) -> None:
    """Save a model of Qwen3-0.6B's shape with random weights, and the demo's tokenizer.

    Args:
        folder: gets the folder ``model``; has the folder ``world``.
        weights: False writes the config alone.
    """
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    target = folder / "model"
    if (target / "config.json").exists():
        return
    config = Qwen3Config(
        vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    if not weights:
        config.save_pretrained(target)
        return
    tokenizer = AutoTokenizer.from_pretrained(folder / "world" / "model", trust_remote_code=False)
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    tokenizer.save_pretrained(target)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(target)


def run(device: str, words: list[str], output: Path) -> list[dict[str, float]]:
    """Run main_ppo, and return the metrics of its training steps.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    from entropy_fork.watch.follow import steps_of

    output.mkdir(parents=True)
    ray_folder = tempfile.mkdtemp(prefix="ef")  # short: Ray puts sockets there
    places = [f"trainer.default_local_dir={output / 'checkpoints'}", f"hydra.run.dir={output / 'hydra'}"]
    printed = output / "printed.txt"
    try:
        with printed.open("wb") as out:
            status = subprocess.run(
                [sys.executable, "-m", "verl.trainer.main_ppo", *words, *places],
                cwd=REPOSITORY, env=environment(device) | {"RAY_TMPDIR": ray_folder}, stdout=out,
                stderr=subprocess.STDOUT, check=False,
            ).returncode  # fmt: skip
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
    logs = [log for log in (output / "checkpoints" / "verl.log", printed) if log.is_file()]
    if status != 0:
        said = "\n".join(log.read_text(errors="replace")[-3000:] for log in reversed(logs))
        print(said, flush=True)
        errors = [line for line in said.splitlines() if "Error" in line]
        raise RuntimeError(f"main_ppo ended with {status}: {' | '.join(errors[-3:])[-900:] or said[-900:]}")
    return [step.metrics for step in steps_of(logs[0]) if step.number > 0]


def measure(name: str, steps: list[dict[str, float]]) -> Iterator[Measured]:
    """The columns of a run: of the steps after the first, which does one-time work; the memory of all steps."""
    if not steps:
        raise RuntimeError("main_ppo printed no step")
    yield Measured(name, "steps", len(steps))
    for metric, column in METRICS.items():
        for values in steps[1:] or steps:
            if metric in values:
                yield Measured(name, column, values[metric])
    for metric, column in (("perf/max_memory_allocated_gb", PEAK), ("perf/max_memory_reserved_gb", "reserved, GiB")):
        found = [values[metric] for values in steps if values.get(metric)]
        if found:  # a CPU has none
            yield Measured(name, column, max(found))


STAGE = Stage("c", "the real main_ppo", "benchmarks.gpu.training", cases)

if __name__ == "__main__":
    typer.run(command(STAGE))
