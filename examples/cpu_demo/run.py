"""Run the CPU demo: build its world once, train the model with verl, show the results as a table.

``--model smollm2`` does the same with a real language model of 135M parameters (``examples/smollm2``).

Stock verl does the training. This script starts ``python -m verl.trainer.main_ppo +recipe=demo_cpu`` as a process. Its
terminal shows one line per step; the metrics are read from the run's file. ``--print-command`` prints the command.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from entropy_fork.common.cores import waiting_passively
from entropy_fork.watch.follow import OUTPUT, steps_of

REPOSITORY = Path(__file__).resolve().parents[2]
ACCURACY = re.compile(r"val-core/.+/acc/mean@\d+")  # of a data source, with the number of answers to each question
PHASES = {
    "generation and reward": "timing_s/gen",
    "old log-probs, entropies": "timing_s/old_log_prob",
    "advantages, selection": "timing_s/adv",
    "update": "timing_s/update_actor",
    "weight sync": "timing_s/update_weights",
}


class Model(str, Enum):
    """What is trained."""

    TINY = "tiny"
    SMOLLM2 = "smollm2"


@dataclass(frozen=True)
class Demo:
    """The demo of a model.

    Attributes:
        title: above the table.
        recipe: of recipes/recipe.
        task: ``examples.TASK.build`` builds the world.
        folder: where its world and runs are, in the demo's folder.
        steps: unless another number is asked for.
    """

    title: str
    recipe: str
    task: str
    folder: str
    steps: int


DEMOS = {
    Model.TINY: Demo("CPU demo", "demo_cpu", "cpu_demo", "", 30),
    Model.SMOLLM2: Demo("SmolLM2 on two cores", "smollm2_cpu", "smollm2", "smollm2", 16),
}


@dataclass
class Run:
    """The metrics that a training run printed.

    Attributes:
        metrics: verl's metrics by step; step 0 is the validation before training.
        seconds: of the whole script, including the build of the world; of all its parts, if it continued a run.
        commit: of the code that made the run, see :func:`commit`.
    """

    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    seconds: float = float("nan")
    commit: str = "unknown"

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, file: Path) -> Run:
        run = cls(**json.loads(file.read_text()))
        run.metrics = {int(step): values for step, values in run.metrics.items()}
        return run

    @property
    def accuracies(self) -> list[tuple[int, float]]:
        """Step and accuracy of each validation."""
        found = ((step, accuracy_of(values)) for step, values in sorted(self.metrics.items()))
        return [(step, accuracy) for step, accuracy in found if accuracy is not None]

    def mean(self, metric: str, skip_first: bool = False) -> float:
        """The mean of a metric over the training steps; ``skip_first`` leaves out step 1, which does one-time work."""
        first = 2 if skip_first and len(self.metrics) > 2 else 1
        values = [values[metric] for step, values in self.metrics.items() if step >= first and metric in values]
        return sum(values) / len(values) if values else float("nan")


def command(
    recipe: str, world: Path, output: Path, preset: str, steps: int, seed: int, rollout: str, extra: list[str]
) -> list[str]:
    """The training command."""
    return [
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        f"+recipe={recipe}",
        f"entropy_fork={preset}",
        f"demo.dir={world.resolve()}",
        f"data.seed={seed}",
        f"actor_rollout_ref.rollout.seed={seed}",
        f"actor_rollout_ref.rollout.name={rollout}",
        f"trainer.total_training_steps={steps}",
        f"trainer.test_freq={max(1, steps // 2)}",
        f"trainer.save_freq={max(1, steps // 2)}",  # an interrupted run continues from its last checkpoint
        f"trainer.default_local_dir={output.resolve() / 'checkpoints'}",
        f"trainer.rollout_data_dir={output.resolve() / 'rollouts'}",
        "entropy_fork.dump_every=1",
        f"entropy_fork.dump_dir={output.resolve() / 'tokens'}",
        "hydra.run.dir=" + str(output.resolve() / "hydra"),
        *extra,
    ]


def commit(repository: Path = REPOSITORY) -> str:
    """The commit of the code, with ``-dirty`` if a file of it has changed since; ``unknown`` without git."""
    try:
        asked = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
        return subprocess.run(asked, cwd=repository, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def build_world(world: Path, console: Console, *settings: str, task: str = "cpu_demo") -> None:
    """Build the world of a task if it is missing; ``settings`` are further options of ``examples.TASK.build``."""
    words = {"cpu_demo": "the demo"}.get(task, task)
    console.print(f"looking at the world of {words}", highlight=False)  # build.py imports torch before it says anything
    builder = [sys.executable, "-m", f"examples.{task}.build"]
    subprocess.run([*builder, "--output", str(world.absolute()), *settings], cwd=REPOSITORY, check=True)


def train(
    arguments: list[str],
    output: Path,
    more_environment: Mapping[str, str] | None = None,
) -> Run:
    """Train, with one line of metrics per step on this terminal, and read what came of it from the run's file.

    Raises:
        typer.Exit: with the command's exit code where it failed; its last line names the first error.
    """
    environment = {
        **os.environ,
        **waiting_passively(os.environ),
        "VERL_PLATFORM": "cpu",
        "TENSORBOARD_DIR": str(output.resolve() / "tensorboard"),
        "PYTHONWARNINGS": "ignore",
        "PYTHONUNBUFFERED": "1",
        **(more_environment or {}),
    }
    made_at = commit()
    with subprocess.Popen(arguments, env=environment) as process:
        try:
            process.wait()
        except KeyboardInterrupt:  # main_ppo has got it too, and shuts Ray down: Popen waits for that
            raise typer.Exit(130) from None
    if process.returncode != 0:
        raise typer.Exit(process.returncode)
    return Run({step.number: step.metrics for step in steps_of(output / "checkpoints")}, commit=made_at)


def accuracy_of(values: dict[str, float]) -> float | None:
    """The held-out accuracy in a step's metrics; None if the step had no validation."""
    return next((value for name, value in values.items() if ACCURACY.fullmatch(name)), None)


def show(run: Run, output: Path, title: str, console: Console) -> None:
    """Print the table and the folders of the run."""
    table = Table("measure", "value", title=title)
    for step, accuracy in run.accuracies:
        table.add_row("accuracy before training" if step == 0 else f"accuracy after step {step}", f"{accuracy:.1%}")
    table.add_section()
    if any("entropy_fork/kept_ratio" in values for values in run.metrics.values()):
        for label, name in (
            ("kept share of tokens", "kept_ratio"),
            ("threshold τ (nats)", "threshold"),
            ("entropy of kept tokens", "entropy_kept"),
            ("entropy of dropped tokens", "entropy_dropped"),
        ):
            table.add_row(label, f"{run.mean(f'entropy_fork/{name}'):.4f}")
    table.add_row("response length (tokens)", f"{run.mean('response_length/mean'):.1f}")
    table.add_row("rollout against trainer, largest probability difference", largest_difference(run))
    table.add_section()
    table.add_row("seconds per step, later", f"{run.mean('timing_s/step', skip_first=True):.1f}")
    for label, name in PHASES.items():
        table.add_row(f"  {label}", f"{run.mean(name, skip_first=True):.2f}")
    table.add_row("seconds in all", f"{run.seconds:.0f}")
    console.print(table)
    for what, place in {
        "checkpoints": "checkpoints",
        "answers of each step": "rollouts",
        "some of them token by token": "tokens",
        "all that verl printed": f"checkpoints/{OUTPUT}",
    }.items():
        console.print(f"{what}: {output / place}", soft_wrap=True, highlight=False)


def largest_difference(run: Run) -> str:
    name = "training/rollout_probs_diff_max"
    return f"{max(values.get(name, 0.0) for values in run.metrics.values()):.1e}"


def main(
    model: Annotated[Model, typer.Option(help="tiny: 1.4M parameters; smollm2: 135M, a real one.")] = Model.TINY,
    preset: Annotated[str, typer.Option(help="entropy_fork preset: global (top 20%), off (all tokens).")] = "global",
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps. Default: 30; smollm2: 16.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the data order and of the answers.")] = 1,
    rollout: Annotated[str, typer.Option(help="transformers, or vllm (extra cpu-vllm).")] = "transformers",
    directory: Annotated[Path, typer.Option(help="Where the world and the runs are kept.")] = Path(".demo"),
    override: Annotated[list[str] | None, typer.Option(help="A further Hydra override; may be repeated.")] = None,
    print_command: Annotated[bool, typer.Option("--print-command", help="Print the training command only.")] = False,
) -> None:
    """Build the demo's world if it is missing, train, and show a table."""
    console = Console()
    demo = DEMOS[model]
    world = directory / demo.folder / "world"
    output = directory / demo.folder / f"{preset}-seed{seed}-{rollout}"
    title = f"{demo.title}, entropy_fork={preset}"
    steps = steps or demo.steps
    arguments = command(demo.recipe, world, output, preset, steps, seed, rollout, override or [])
    if print_command:
        console.print("VERL_PLATFORM=cpu " + shlex.join(["python", *arguments[1:]]), soft_wrap=True, highlight=False)
        return
    began = time.monotonic()
    build_world(world, console, task=demo.task)
    finished = output / "metrics.json"
    before = Run.load(finished) if finished.exists() else Run(seconds=0.0)
    if before.metrics and (done := max(before.metrics)) >= steps:
        console.print(
            f"{output} is a finished run of {done} steps: more steps continue it, another seed starts another, "
            "'make clean-demo' removes it.",
            highlight=False,
            soft_wrap=True,
        )
        show(before, output, title, console)
        return
    output.mkdir(parents=True, exist_ok=True)
    run = train(arguments, output)
    run.seconds = before.seconds + time.monotonic() - began
    run.save(finished)
    show(run, output, title, console)


if __name__ == "__main__":
    typer.run(main)
