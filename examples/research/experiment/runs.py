"""Make the runs: their command lines, which are missing, how long they take."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import typer

from entropy_fork.common.output_folder import write_whole
from entropy_fork.watch.follow import OUTPUT
from examples.cpu_demo.run import train
from examples.research.experiment.arms import ALL, Arm, Question
from examples.research.experiment.tasks import Task

METRICS_FILE = "metrics.json"


def command(
    task: Task, arm: Arm, seed: int, steps: int, test_every: int, answers: int, world: Path, output: Path,
    more: Sequence[str],
) -> list[str]:  # fmt: skip
    """The training command of a run. Two commands differ in their tokens and their seed alone."""
    return [
        *(sys.executable, "-m", "verl.trainer.main_ppo", f"+recipe={task.recipe}", *task.overrides, *arm.overrides),
        f"demo.dir={world.resolve()}",
        f"data.seed={seed}",
        f"actor_rollout_ref.rollout.seed={seed}",
        f"actor_rollout_ref.rollout.val_kwargs.n={answers}",
        # the random choices draw with this seed too
        *([] if arm == ALL else [f"entropy_fork.seed={seed}"]),
        f"trainer.total_training_steps={steps}",
        f"trainer.test_freq={test_every}",
        "trainer.save_freq=-1",
        "trainer.resume_mode=disable",
        f"trainer.default_local_dir={output.resolve() / 'checkpoints'}",
        f"hydra.run.dir={output.resolve() / 'hydra'}",
        *more,
    ]


def folder_of(directory: Path, question: Question, steps: int) -> Path:
    """Where the runs of a question are."""
    return directory / f"{question.folder}-{steps}steps"


def world_of(directory: Path, question: Question) -> Path:
    """Where the model and the problems of a question are."""
    return directory / ("world" if question.problems is None else f"world-{question.problems}")


def run_folder(folder: Path, arm: Arm, seed: int) -> Path:
    """Where a run is."""
    return folder / f"{arm.name}-seed{seed}"


def train_once(arguments: list[str], output: Path, steps: int) -> None:
    """Make one run. ``metrics.json`` is written only if the log has the metrics of every step.

    Raises:
        SystemExit: a step is missing there.
    """
    output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    run = train(arguments, output)
    run.seconds = time.monotonic() - began
    missing = set(range(1, steps + 1)) - set(run.metrics)
    if missing:
        raise SystemExit(f"{output / 'checkpoints' / OUTPUT} lacks the metrics of the steps {sorted(missing)}")
    write_whole(output / METRICS_FILE, json.dumps(asdict(run)))


def keep_to(folder: Path, override: list[str]) -> None:
    """Refuse overrides that differ from those of the folder's runs: they would not be comparable.

    Raises:
        BadParameter: they differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "overrides.json"
    if not file.exists():
        file.write_text(json.dumps(override))
    elif (before := json.loads(file.read_text())) != override:
        raise typer.BadParameter(
            f"{folder} holds runs with {before or 'none'}; give the same, or another --directory",
            param_hint="--override",
        )


def wanted(task: Task, question: Question, arms: Sequence[str], seeds: Sequence[int]) -> list[tuple[Arm, int]]:
    """All arms of one seed before the next seed: an interrupted experiment has seeds that can be compared."""
    asked = [arm for arm in question.arms if arm.name in arms] if arms else task.planned(question)
    return [(arm, seed) for seed in seeds for arm in asked]


def estimate(folder: Path, missing: int, runs: int, task: Task, steps: int) -> str:
    """How long the missing ones of so many runs will take, from those that are there."""
    took = [json.loads(file.read_text())["seconds"] for file in sorted(folder.glob(f"*/{METRICS_FILE}"))]
    each = fmean(took) if took else task.run_seconds * steps / 30
    why = f"mean of the {len(took)} that are there" if took else "a default for two cores, because none is there yet"
    return f"{missing} of {runs} runs are missing, about {missing * each / 3600:.1f} h: {each:.0f} s each ({why})"
