"""Train with several choices of tokens and several seeds each, in stock verl's main_ppo: CSV, table, plot.

Every run has the same model, questions, learning rate and number of steps. Only the seed and the tokens in the policy
gradient differ. Finished runs are not repeated, so an interrupted experiment continues with the next missing run.
docs/lab/evidence.md says what the results show and what they do not show.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from entropy_fork.common.progress import paused, task
from entropy_fork.watch.follow import OUTPUT
from examples.cpu_demo.run import Run, build_world, train

#: answers to each of the held-out problems at a validation
ANSWERS = 2
CURVES = {
    "reward": "critic/score/mean",
    "entropy": "actor/entropy",
    "response_length": "response_length/mean",
    "kept_ratio": "entropy_fork/kept_ratio",
}
TITLES = {
    "accuracy": "accuracy on held-out problems, sampled at T = 1",
    "reward": "mean reward of the step's answers",
    "entropy": "mean entropy of the step's tokens (nats)",
    "response_length": "mean response length (tokens)",
    "kept_ratio": "share of tokens in the policy gradient",
}


@dataclass(frozen=True)
class Arm:
    """A choice of tokens, and its words on the command line."""

    name: str
    tokens: str
    overrides: tuple[str, ...]
    colour: str


def by_score(name: str, words: str, colour: str) -> Arm:
    """The 20% of the tokens that another score than the entropy ranks highest."""
    return Arm(name, f"highest 20% by {words}", ("entropy_fork=global", f"entropy_fork.score={name}"), colour)


ALL = Arm("all", "all tokens", ("entropy_fork=off",), "black")
TOP20 = Arm("top20", "highest 20% by entropy", ("entropy_fork=global",), "C3")
BOTTOM80 = Arm("bottom80", "lowest 80% by entropy", ("entropy_fork=bottom80",), "C0")
RANDOM20 = Arm("random20", "20% drawn by lot", ("entropy_fork=random20",), "C2")
MATCHED = Arm("matched", "as many per answer as top20, by lot", ("entropy_fork=matched_random",), "C7")
SURPRISAL = by_score("surprisal", "surprisal", "C1")
GRADIENT = by_score("gradient", "gradient magnitude", "C4")
#: what is compared: how many tokens by entropy, which fifth by other scores, or a fifth against its controls
QUESTIONS = {
    "ratios": [
        ALL,
        Arm("top50", "highest 50% by entropy", ("entropy_fork=global", "entropy_fork.top_ratio=0.5"), "C1"),
        TOP20,
        Arm("top10", "highest 10% by entropy", ("entropy_fork=global", "entropy_fork.top_ratio=0.1"), "C4"),
        BOTTOM80,
        RANDOM20,
    ],
    "scores": [
        ALL,
        TOP20,
        SURPRISAL,
        by_score("covariance", "covariance", "C2"),
        GRADIENT,
        by_score("rsi", "relative surprisal", "C5"),
        by_score("omega", "change of entropy", "C6"),
        MATCHED,
    ],
    "controls": [ALL, TOP20, MATCHED, RANDOM20, BOTTOM80, SURPRISAL, GRADIENT],
}


@dataclass
class Trained:
    """A finished run."""

    arm: Arm
    seed: int
    run: Run

    def curve(self, name: str) -> dict[int, float]:
        """A curve's values by step. A run without a mask logs no kept ratio; it is 1.0 there."""
        if name == "accuracy":
            return dict(self.run.accuracies)
        found = {
            step: values[CURVES[name]] for step, values in sorted(self.run.metrics.items()) if CURVES[name] in values
        }
        if name == "kept_ratio" and not found:
            found = dict.fromkeys(self.curve("reward"), 1.0)
        return found

    @property
    def final_accuracy(self) -> float:
        return list(self.curve("accuracy").values())[-1]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds; no spread of a single seed."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def train_once(
    arm: Arm, seed: int, world: Path, folder: Path, steps: int, test_every: int, extra: list[str]
) -> Trained:
    """Make one run. ``metrics.json`` is written only if the log has the metrics of every step."""
    output = folder / f"{arm.name}-seed{seed}"
    output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    run = train(
        [
            *(sys.executable, "-m", "verl.trainer.main_ppo", "+recipe=demo_cpu", *arm.overrides),
            f"demo.dir={world.resolve()}",
            f"data.seed={seed}",
            f"actor_rollout_ref.rollout.seed={seed}",
            f"actor_rollout_ref.rollout.val_kwargs.n={ANSWERS}",
            # the random choices draw with this seed too
            *([] if arm.name == "all" else [f"entropy_fork.seed={seed}"]),
            f"trainer.total_training_steps={steps}",
            f"trainer.test_freq={test_every}",
            "trainer.save_freq=-1",
            "trainer.resume_mode=disable",
            f"trainer.default_local_dir={output.resolve() / 'checkpoints'}",
            f"hydra.run.dir={output.resolve() / 'hydra'}",
            *extra,
        ],
        output,
    )
    run.seconds = time.monotonic() - began
    missing = set(range(1, steps + 1)) - set(run.metrics)
    if missing:
        raise SystemExit(f"{output / 'checkpoints' / OUTPUT} lacks the metrics of the steps {sorted(missing)}")
    run.save(output / "metrics.json")
    return Trained(arm, seed, run)


def keep_to(folder: Path, override: list[str]) -> None:
    """Refuse overrides that differ from those of the folder's runs: they would not be comparable."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "overrides.json"
    if not file.exists():
        file.write_text(json.dumps(override))
    elif (before := json.loads(file.read_text())) != override:
        raise typer.BadParameter(
            f"{folder} holds runs with {before or 'none'}; give the same, or another --directory",
            param_hint="--override",
        )


def summary(trained: Iterable[Trained]) -> list[dict[str, Any]]:
    """A row per arm: its last validation, the means of its last quarter of steps, and their spreads over the seeds."""
    by_arm: dict[str, list[Trained]] = {}
    for one in trained:
        by_arm.setdefault(one.arm.name, []).append(one)
    reference = {one.seed: one.final_accuracy for one in by_arm.get("all", [])}
    rows = []
    for name, runs in by_arm.items():
        row: dict[str, Any] = {"arm": name, "seeds": len(runs)}
        row["accuracy_before"] = statistics.fmean(next(iter(one.curve("accuracy").values())) for one in runs)
        row["accuracy"], row["accuracy_sd"] = mean_and_spread([one.final_accuracy for one in runs])
        differences = [one.final_accuracy - reference[one.seed] for one in runs if one.seed in reference]
        row["minus_all"], row["minus_all_sd"] = mean_and_spread(differences) if differences else (np.nan, np.nan)
        for curve in ("reward", "entropy", "response_length", "kept_ratio"):
            late = []
            for one in runs:
                values = list(one.curve(curve).values())
                late.append(statistics.fmean(values[-max(1, len(values) // 4) :]))
            row[curve], row[f"{curve}_sd"] = mean_and_spread(late)
        row["seconds"] = statistics.fmean(one.run.seconds for one in runs)
        rows.append(row)
    return rows


def with_spread(mean: float, spread: float, digits: int, sign: str = "") -> str:
    """``mean ± spread``; a single seed has no spread."""
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def table(rows: list[dict[str, Any]], steps: int) -> Table:
    before = statistics.fmean(row["accuracy_before"] for row in rows)
    shown = Table(
        title=f"Accuracy (%) after {steps} steps, from {100 * before:.1f}: mean ± standard deviation over the seeds",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    shown.add_column("tokens", no_wrap=True)
    for head in ("seeds", "accuracy", "minus all's", "entropy", "length", "kept"):
        shown.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            *(row["arm"], str(row["seeds"]), with_spread(100 * row["accuracy"], 100 * row["accuracy_sd"], 1)),
            "" if row["arm"] == "all" else with_spread(100 * row["minus_all"], 100 * row["minus_all_sd"], 1, "+"),
            with_spread(row["entropy"], row["entropy_sd"], 3),
            with_spread(row["response_length"], row["response_length_sd"], 1),
            f"{row['kept_ratio']:.3f}",
        )
    return shown


def write_csv(rows: list[dict[str, Any]], file: Path) -> None:
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def curves(trained: Iterable[Trained]) -> list[dict[str, Any]]:
    """A row per run and step. A cell is empty if the curve has no value, as accuracy between two validations."""
    return [
        {"arm": one.arm.name, "seed": one.seed, "step": step} | {name: one.curve(name).get(step, "") for name in TITLES}
        for one in trained
        for step in sorted(one.run.metrics)
    ]


def draw(trained: list[Trained], file: Path) -> None:
    """A panel per curve: a line for the mean over the seeds, a band from the lowest to the highest seed."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    panels = dict(zip(TITLES, axes.flat, strict=False))
    axes.flat[-1].set_axis_off()
    for arm in dict.fromkeys(one.arm for one in trained):
        runs = [one for one in trained if one.arm == arm]
        for name, panel in panels.items() if runs else ():
            seeds = [one.curve(name) for one in runs]
            steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
            values = np.array([[seed[step] for step in steps] for seed in seeds])
            marker = "o" if name == "accuracy" else ""
            panel.plot(steps, values.mean(0), color=arm.colour, marker=marker, label=f"{arm.name}: {arm.tokens}")
            panel.fill_between(steps, values.min(0), values.max(0), color=arm.colour, alpha=0.12, linewidth=0)
    for name, panel in panels.items():
        panel.set(title=TITLES[name], xlabel="step")
    handles, labels = panels["accuracy"].get_legend_handles_labels()
    axes.flat[-1].legend(handles, labels, loc="center", frameon=False, fontsize=12)
    for suffix in ("png", "svg"):
        figure.savefig(file.with_suffix(f".{suffix}"), dpi=110)
    plt.close(figure)


def main(
    question: Annotated[str, typer.Option(help=f"What to compare: {', '.join(QUESTIONS)}.")] = "ratios",
    steps: Annotated[int, typer.Option(min=4, help="Training steps of each run.")] = 12,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm, with the seeds 1, 2, ….")] = 3,
    test_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between two validations. Default: a third of the steps.")
    ] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm; may be repeated.")] = None,
    at_most: Annotated[
        int | None, typer.Option(min=0, help="Make at most so many runs now, then show what is there.")
    ] = None,
    directory: Annotated[Path, typer.Option(help="Where the world and the runs are kept.")] = Path(".demo"),
    override: Annotated[
        list[str] | None, typer.Option(help="A further Hydra override of every run; may be repeated.")
    ] = None,
) -> None:
    """Build the demo's world if it is missing, make the missing runs, and show a table."""
    console = Console()
    if question not in QUESTIONS:
        raise typer.BadParameter(f"{question}: write {' or '.join(QUESTIONS)}", param_hint="--question")
    arms = QUESTIONS[question]
    names = [one.name for one in arms]
    if unknown := set(arm or ()) - set(names):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: the arms are {', '.join(names)}", param_hint="--arm")
    world = directory / "world"
    build_world(world, console)
    folder = directory / f"experiment-{steps}steps"
    every = test_every or max(1, steps // 3)
    keep_to(folder, override or [])
    # All arms of one seed before the next seed: an interrupted experiment has seeds that can be compared.
    wanted = [(one, seed) for seed in range(1, seeds + 1) for one in arms if not arm or one.name in arm]
    trained, made = [], 0
    with task("runs", len(wanted), console=console) as everything:
        for one, seed in wanted:
            if (finished := folder / f"{one.name}-seed{seed}" / "metrics.json").exists():
                trained.append(Trained(one, seed, Run.load(finished)))
            elif at_most is None or made < at_most:
                console.rule(f"{one.name} ({one.tokens}), seed {seed}: {' '.join(one.overrides)}")
                with paused():  # the run shows itself
                    trained.append(train_once(one, seed, world, folder, steps, every, override or []))
                made += 1
            everything.update(len(trained))
    if not trained:
        console.print("no run is there yet")
        return
    trained.sort(key=lambda one: names.index(one.arm.name))
    rows = summary(trained)
    console.print(table(rows, steps))
    write_csv(rows, folder / f"{question}-summary.csv")
    write_csv(curves(trained), folder / f"{question}-curves.csv")
    draw(trained, folder / question)
    files = ", ".join(f"{question}{end}" for end in ("-curves.csv", "-summary.csv", ".png", ".svg"))
    console.print(f"{folder}: {files}", highlight=False, soft_wrap=True)
    if len(trained) < len(wanted):
        console.print(f"{len(wanted) - len(trained)} of {len(wanted)} runs are missing: the same command makes them.")


if __name__ == "__main__":
    typer.run(main)
