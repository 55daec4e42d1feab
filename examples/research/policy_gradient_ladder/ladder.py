"""Train with seven forms of Ψ_t, one run of stock verl's main_ppo each; make a table, a CSV file and a plot.

Every run has the same model, questions, seed and learning rate, one gradient step per batch, and the loss -Ψ_t log π.
Only the words of :data:`RUNGS` differ. ``gradient_variance.py`` measures in each run how noisy the gradient is.
Finished runs are not repeated, so an interrupted ladder continues with the next missing run.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import typer
from rich.console import Console
from rich.table import Table

from entropy_fork.common.progress import paused, task
from examples.cpu_demo.run import Run, accuracy_of, build_world, train

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Rung:
    """A form of Ψ_t, and its words on the command line."""

    number: int
    name: str
    psi: str
    overrides: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.number} {self.name}"


CRITIC = "critic.enable=true"
RUNGS = [
    Rung(1, "total return", "Σ r", ("algorithm.adv_estimator=total_return",)),
    Rung(2, "reward to go", "Σ_{k≥t} r_k", ("algorithm.adv_estimator=reward_to_go",)),
    Rung(3, "minus baseline", "Σ_{k≥t} r_k - b", ("algorithm.adv_estimator=reward_to_go_leave_one_out",)),
    Rung(4, "Q", "r_t + γV(s_{t+1})", ("algorithm.adv_estimator=q_value", CRITIC)),
    Rung(5, "advantage", "GAE(λ)", ("algorithm.adv_estimator=gae",)),
    Rung(6, "TD residual", "r_t + γV(s_{t+1}) - V(s_t)", ("algorithm.adv_estimator=td_residual", CRITIC)),
    Rung(
        7,
        "forks",
        "form 3 · 1[H_t ≥ τ]",
        # Divided by all tokens, so that it is exactly form 3 times the indicator. Adam ignores a constant factor.
        ("algorithm.adv_estimator=reward_to_go_leave_one_out", "entropy_fork=global", "entropy_fork.denominator=all"),
    ),
]


@dataclass
class Climbed:
    """A finished run: verl's metrics, and a line of ``gradient_variance.py`` per step."""

    rung: Rung
    run: Run
    gradients: list[dict[str, float]]

    @property
    def variances(self) -> list[float]:
        """Variance of the gradient, by step."""
        return [line["variance"] for line in self.gradients]


def climb(rung: Rung, world: Path, folder: Path, steps: int, seed: int, extra: list[str]) -> Climbed:
    """Make one run, or load it if it is finished."""
    output = folder / f"{rung.number}"
    finished, gradients = output / "metrics.json", output / "gradients.jsonl"
    if not finished.exists():
        output.mkdir(parents=True, exist_ok=True)
        gradients.unlink(missing_ok=True)
        began = time.monotonic()
        run = train(
            [
                *(sys.executable, "-m", "verl.trainer.main_ppo", "+recipe=ladder_cpu", *rung.overrides),
                f"demo.dir={world.resolve()}",
                f"data.seed={seed}",
                f"actor_rollout_ref.rollout.seed={seed}",
                f"trainer.total_training_steps={steps}",
                f"trainer.default_local_dir={output.resolve() / 'checkpoints'}",
                f"hydra.run.dir={output.resolve() / 'hydra'}",
                *extra,
            ],
            output,
            {
                "VERL_USE_EXTERNAL_MODULES": "gradient_variance",
                "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
                "ENTROPY_FORK_GRADIENTS": str(gradients.resolve()),
            },
        )
        run.seconds = time.monotonic() - began
        run.save(finished)
    return Climbed(rung, Run.load(finished), [json.loads(line) for line in gradients.read_text().splitlines()])


def table(climbed: list[Climbed]) -> Table:
    shown = Table(title="The ladder")
    for head in ("form", "Ψ_t", "accuracy before", "after"):
        shown.add_column(head)
    first_rung = climbed[0]
    for head in ("|E g|², step 1", "Var g, step 1", f"of {first_rung.rung.number}'s", "Var g, mean", "kept", "s"):
        shown.add_column(head, justify="right")
    for one in climbed:
        before, after = one.run.accuracies[0][1], one.run.accuracies[-1][1]
        first, kept = one.gradients[0], one.run.mean("entropy_fork/kept_ratio")
        shown.add_row(
            *(one.rung.label, one.rung.psi, f"{before:.1%}", f"{after:.1%}"),
            *(f"{first['signal']:.2e}", f"{first['variance']:.2e}"),
            f"{first['variance'] / first_rung.variances[0]:.2f}",
            f"{sum(one.variances) / len(one.variances):.2e}",
            *("100%" if kept != kept else f"{kept:.1%}", f"{one.run.seconds:.0f}"),
        )
    return shown


def write_csv(climbed: list[Climbed], file: Path) -> None:
    """A row per form and step."""
    rows: list[dict[str, Any]] = []
    for one in climbed:
        for step, metrics in sorted(one.run.metrics.items()):
            gradient = one.gradients[step - 1] if step else {}
            rows.append(
                {
                    "form": one.rung.number,
                    "name": one.rung.name,
                    "step": step,
                    "accuracy": accuracy_of(metrics),
                    "reward": metrics.get("critic/score/mean", ""),
                    "entropy": metrics.get("actor/entropy", ""),
                    **{key: gradient.get(key, "") for key in ("variance", "signal", "square")},
                }
            )
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def draw(climbed: list[Climbed], folder: Path) -> None:
    """Plot variance and accuracy over steps, a colour per form."""
    figure, (variance, accuracy) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for one in climbed:
        colour = "black" if one.rung.number == 7 else f"C{one.rung.number - 1}"
        variance.plot(range(1, len(one.variances) + 1), one.variances, color=colour)
        accuracy.plot(*zip(*one.run.accuracies, strict=True), color=colour, marker="o", label=one.rung.label)
    variance.set(yscale="log", xlabel="step", title="variance of the batch's gradient (trace)")
    accuracy.set(xlabel="step", title="accuracy on held-out problems, sampled")
    figure.legend(loc="outside right upper")
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"ladder.{suffix}", dpi=130)
    plt.close(figure)


def main(
    steps: Annotated[int, typer.Option(min=2, help="Training steps of each form.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the data order and of the answers.")] = 1,
    form: Annotated[list[int] | None, typer.Option(min=1, max=7, help="Only this form; may be repeated.")] = None,
    directory: Annotated[Path, typer.Option(help="Where the world and the runs are kept.")] = Path(".demo"),
    override: Annotated[list[str] | None, typer.Option(help="A further Hydra override; may be repeated.")] = None,
) -> None:
    """Build the demo's world if it is missing, train with each form, and show a table."""
    console = Console()
    world = directory / "world"
    build_world(world, console)
    folder = directory / f"ladder-seed{seed}-{steps}steps"
    climbed = []
    rungs = [rung for rung in RUNGS if not form or rung.number in form]
    with task("forms", len(rungs), console=console) as shown:
        for rung in rungs:
            console.rule(f"{rung.label}: {' '.join(rung.overrides)}")
            with paused():  # the run shows itself
                climbed.append(climb(rung, world, folder, steps, seed, override or []))
            shown.advance()
    console.print(table(climbed))
    write_csv(climbed, folder / "ladder.csv")
    draw(climbed, folder)
    console.print(f"{folder}/ladder.csv, ladder.png, ladder.svg", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
