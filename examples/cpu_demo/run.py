"""Run the CPU demo: build the tiny model once, train it with verl, show the results as a table.

Stock verl does the training. This script starts ``python -m verl.trainer.main_ppo +recipe=demo_cpu`` as a process,
reads the metrics that verl prints, and draws a progress bar. ``--print-command`` prints the command and ends.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from entropy_fork.common.cores import waiting_passively
from entropy_fork.common.progress import task

REPOSITORY = Path(__file__).resolve().parents[2]
STEP = re.compile(r"step:(\d+) - (.*)")
NUMBER = re.compile(r"(\S+?):(?:np\.\w+\()?(-?[\d.]+(?:e[-+]?\d+)?|nan|inf)\)?(?: - |\s*$)")
ACCURACY = "val-core/cpu_demo/acc/mean@"  # and the number of answers to each question
PHASES = {
    "generation and reward": "timing_s/gen",
    "old log-probs, entropies": "timing_s/old_log_prob",
    "advantages, selection": "timing_s/adv",
    "update": "timing_s/update_actor",
    "weight sync": "timing_s/update_weights",
}


@dataclass
class Run:
    """The metrics that a training run printed.

    Attributes:
        metrics: verl's metrics by step; step 0 is the validation before training.
        seconds_to_first_step: from the start of the process to the end of the first training step.
        seconds: of the whole script, including the build of the world.
    """

    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    seconds_to_first_step: float = float("nan")
    seconds: float = float("nan")

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


def command(world: Path, output: Path, preset: str, steps: int, seed: int, rollout: str, extra: list[str]) -> list[str]:
    """The training command."""
    return [
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        "+recipe=demo_cpu",
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


def lines_of(arguments: list[str], output: Path, more_environment: Mapping[str, str]) -> Iterator[str]:
    """Run a command, write its output to ``output/train.log``, and yield each line.

    Raises:
        typer.Exit: the command failed; its exit code, after printing the end of the log.
    """
    environment = {
        **os.environ,
        **waiting_passively(os.environ),
        "VERL_PLATFORM": "cpu",
        "TENSORBOARD_DIR": str(output.resolve() / "tensorboard"),
        "PYTHONWARNINGS": "ignore",
        "PYTHONUNBUFFERED": "1",
        **more_environment,
    }
    log = output / "train.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            arguments,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                yield line
            process.wait()
        finally:
            if process.poll() is None:
                # After Ctrl-C, interrupt main_ppo as well: it then shuts its Ray cluster down.
                os.killpg(process.pid, signal.SIGINT)
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        tail = log.read_text().splitlines()[-25:]
        Console(stderr=True).print("\n".join(tail), markup=False, highlight=False)
        Console(stderr=True).print(f"[red]training failed (exit code {process.returncode}); the whole log: {log}")
        raise typer.Exit(process.returncode)


def build_world(world: Path, console: Console) -> None:
    """Build the demo's world if it is missing."""
    console.print("looking at the demo's world", highlight=False)  # build.py imports torch before it can say anything
    builder = [sys.executable, "-m", "examples.cpu_demo.build"]
    subprocess.run([*builder, "--output", str(world.absolute())], cwd=REPOSITORY, check=True)


def train(
    arguments: list[str],
    output: Path,
    steps: int,
    console: Console,
    more_environment: Mapping[str, str] | None = None,
) -> Run:
    """Train, and print a line of metrics for each step."""
    run, began = Run(), time.monotonic()
    with task("training", steps, note="starting Ray and the workers", console=console) as shown:
        for line in lines_of(arguments, output, more_environment or {}):
            if not (found := STEP.search(line)):
                continue
            step = int(found[1])
            values = {name: float(value) for name, value in NUMBER.findall(found[2])}
            run.metrics.setdefault(step, {}).update(values)
            if step == 1:
                run.seconds_to_first_step = time.monotonic() - began
            console.print(f"step {step:3d}  {one_line(values)}", highlight=False, soft_wrap=True)
            shown.update(step, note="")
    return run


def accuracy_of(values: dict[str, float]) -> float | None:
    """The held-out accuracy in a step's metrics; None if the step had no validation."""
    return next((value for name, value in values.items() if name.startswith(ACCURACY)), None)


def one_line(values: dict[str, float]) -> str:
    shown = {
        "reward": "critic/score/mean",
        "kept": "entropy_fork/kept_ratio",
        "τ": "entropy_fork/threshold",
        "entropy": "actor/entropy",
        "tokens": "response_length/mean",
        "seconds": "timing_s/step",
    }
    numbers = {"accuracy": accuracy_of(values)} | {label: values.get(name) for label, name in shown.items()}
    return "  ".join(f"{label} {number:.3f}" for label, number in numbers.items() if number is not None)


def show(run: Run, output: Path, preset: str, console: Console) -> None:
    """Print the table, the folders of the run, and the commands to type next."""
    table = Table("measure", "value", title=f"CPU demo, entropy_fork={preset}")
    for step, accuracy in run.accuracies:
        table.add_row("accuracy before training" if step == 0 else f"accuracy after step {step}", f"{accuracy:.1%}")
    table.add_section()
    if preset != "off":
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
    table.add_row("seconds to the end of step 1", f"{run.seconds_to_first_step:.0f}")
    table.add_row("seconds per step, later", f"{run.mean('timing_s/step', skip_first=True):.1f}")
    for label, name in PHASES.items():
        table.add_row(f"  {label}", f"{run.mean(name, skip_first=True):.2f}")
    table.add_row("seconds in all", f"{run.seconds:.0f}")
    console.print(table)
    for what, place in (("checkpoints:", "checkpoints"), ("answers of each step:", "rollouts"),
                        ("some of them token by token:", "tokens"), ("verl's whole log:", "train.log")):  # fmt: skip
        console.print(f"{what} {output / place}", soft_wrap=True, highlight=False)
    console.print("look at it:")
    for words in next_commands(output, preset):
        console.print(f"  {shlex.join(words)}", soft_wrap=True, highlight=False)


def next_commands(output: Path, preset: str) -> list[list[str]]:
    """The commands to type next: a page of tokens, analyses and curves; and the curves alone."""
    programs = Path(sys.executable).parent
    if programs.is_relative_to(Path.cwd()):
        programs = programs.relative_to(Path.cwd())
    curves, tokens = str(output / "tensorboard"), str(output / "tokens")
    page = [str(output / "report.html"), "--tokens", tokens, "--run", f"{preset}={curves}"]
    return [
        [str(programs / "entropy-fork"), "report", *page, "--min-count", "20", "--answers", "240"],
        [str(programs / "tensorboard"), "--logdir", curves],
    ]


def largest_difference(run: Run) -> str:
    name = "training/rollout_probs_diff_max"
    return f"{max(values.get(name, 0.0) for values in run.metrics.values()):.1e}"


def main(
    preset: Annotated[str, typer.Option(help="entropy_fork preset: global (top 20%), off (all tokens).")] = "global",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of the data order and of the answers.")] = 1,
    rollout: Annotated[str, typer.Option(help="transformers, or vllm (extra cpu-vllm).")] = "transformers",
    directory: Annotated[Path, typer.Option(help="Where the world and the runs are kept.")] = Path(".demo"),
    override: Annotated[list[str] | None, typer.Option(help="A further Hydra override; may be repeated.")] = None,
    print_command: Annotated[bool, typer.Option("--print-command", help="Print the training command only.")] = False,
) -> None:
    """Build the demo's world if it is missing, train, and show a table."""
    console = Console()
    output = directory / f"{preset}-seed{seed}-{rollout}"
    arguments = command(directory / "world", output, preset, steps, seed, rollout, override or [])
    if print_command:
        console.print("VERL_PLATFORM=cpu " + shlex.join(["python", *arguments[1:]]), soft_wrap=True, highlight=False)
        return
    began = time.monotonic()
    build_world(directory / "world", console)
    finished = output / "metrics.json"
    if finished.exists():
        console.print(f"{output} is a finished run; 'make clean-demo' removes it, another seed starts another.")
        show(Run.load(finished), output, preset, console)
        return
    output.mkdir(parents=True, exist_ok=True)
    run = train(arguments, output, steps, console)
    run.seconds = time.monotonic() - began
    run.save(finished)
    show(run, output, preset, console)


if __name__ == "__main__":
    typer.run(main)
