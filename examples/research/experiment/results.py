"""The curves of finished runs: from ``metrics.json`` to one CSV per task, with a row per run and step."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.output_folder import write_whole
from examples.research.experiment.arms import ARMS
from examples.research.experiment.statistics import Floats
from examples.research.experiment.tasks import Task

#: curves that are one of verl's metrics
METRICS = {
    "reward": "critic/score/mean",
    "entropy": "actor/entropy",
    "response_length": "response_length/mean",
    "grad_norm": "actor/grad_norm",
}
#: verl's counts of the groups that dynamic sampling leaves out in a step; one that is 0 is not logged
DROPPED = ("training/filter_groups/evicted_samples", "training/filter_groups/discarded_surplus_samples")
CURVES = ("accuracy", *METRICS, "dropped_groups", "kept_ratio", "response_tokens", "trained_tokens", "seconds")
COLUMNS = ("task", "arm", "seed", "steps", "settings", "step", *CURVES, "commit")
IDENTITY = ("task", "steps", "settings", "seed", "arm")


@dataclass(frozen=True)
class Result:
    """A finished run, which its task, steps, settings, seed and arm identify.

    Attributes:
        settings: see :func:`settings_of`.
        commit: that made it; with ``-dirty`` if its files had changes.
        curves: by name, of shape (steps + 1,), NaN where there is no value. Entropy in nats. ``grad_norm`` is the
            mean over the step's updates, before clipping. ``dropped_groups`` are the groups of answers that were
            generated and not trained on. ``trained_tokens`` are the step's response tokens with a weight above 0,
            ``seconds`` those of the step and its validation.
    """

    task: str
    steps: int
    settings: str
    seed: int
    arm: str
    commit: str
    curves: Mapping[str, Floats] = field(repr=False, compare=False)

    @property
    def identity(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in IDENTITY)

    @property
    def validated(self) -> Floats:
        """The steps that had a validation; 0 is the one before training."""
        return np.flatnonzero(~np.isnan(self.curves["accuracy"])).astype(float)

    @property
    def accuracy(self) -> Floats:
        """The accuracies at these steps."""
        return self.curves["accuracy"][self.validated.astype(int)]

    @property
    def tokens(self) -> Floats:
        """How many tokens had been trained on at these steps; NaN where the CSV does not know it."""
        return np.cumsum([0.0, *self.curves["trained_tokens"][1:]])[self.validated.astype(int)]

    def rows(self) -> list[dict[str, str]]:
        """A row per step. A cell is empty if the curve has no value, as accuracy between two validations."""
        head = {name: str(getattr(self, name)) for name in (*IDENTITY, "commit")}
        return [
            head | {"step": str(step)} | {name: cell(self.curves[name][step]) for name in CURVES}
            for step in range(self.steps + 1)
        ]


def cell(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.7g}"


def curves_of(metrics: Mapping[int, Mapping[str, float]], accuracy: str) -> dict[str, Floats]:
    """The curves of verl's metrics by step. Without a mask, all response tokens are trained on."""
    curves = {name: np.full(max(metrics) + 1, np.nan) for name in CURVES}
    masked = any("entropy_fork/kept_tokens" in values for values in metrics.values())
    for step, values in metrics.items():
        here = {name: values.get(metric, np.nan) for name, metric in METRICS.items()}
        here["accuracy"] = next((value for name, value in values.items() if name.startswith(accuracy)), np.nan)
        if "perf/total_num_tokens" in values:  # a training step; the total counts prompts too
            response, prompt = values["response_length/mean"], values["prompt_length/mean"]
            tokens = round(values["perf/total_num_tokens"] * response / (response + prompt))
            here["response_tokens"] = tokens
            here["trained_tokens"] = values.get("entropy_fork/kept_tokens", np.nan) if masked else tokens
            here["kept_ratio"] = values.get("entropy_fork/kept_ratio", np.nan) if masked else 1.0
            here["dropped_groups"] = sum(values.get(name, 0.0) for name in DROPPED)
            here["seconds"] = values["timing_s/step"] + values.get("timing_s/testing", 0.0)
        for name, value in here.items():
            curves[name][step] = value
    return curves


def settings_of(answers: int, test_every: int, overrides: Iterable[str]) -> str:
    """What else a run's numbers depend on: its validations, and further overrides."""
    return " ".join([f"val_kwargs.n={answers}", f"test_freq={test_every}", *overrides])


def result_of(file: Path, task: Task, made_at: str | None) -> Result:
    """Read a run's ``metrics.json``. Its folder is named ARM-seedSEED, and lies beside ``overrides.json``.

    Raises:
        EntropyForkError: the arm is unknown, there is no accuracy, the run does not say which commit made it, or
            ``overrides.json`` is missing.
    """
    arm, _, seed = file.parent.name.rpartition("-seed")
    if arm not in ARMS:
        raise EntropyForkError(f"{file.parent}: there is no arm {arm!r}; the arms are {', '.join(ARMS)}")
    saved: dict[str, Any] = json.loads(file.read_text())
    metrics = {int(step): values for step, values in saved["metrics"].items()}
    curves = curves_of(metrics, task.accuracy)
    answers = {int(name.removeprefix(task.accuracy)) for values in metrics.values() for name in values
               if name.startswith(task.accuracy)}  # fmt: skip
    if not answers:
        raise EntropyForkError(f"{file} has no {task.accuracy}…: it is no run of the task {task.name}")
    if not (commit := saved.get("commit") or made_at):
        raise EntropyForkError(f"{file} does not say which commit made it: add --made-at COMMIT")
    if not (beside := file.parents[1] / "overrides.json").exists():
        raise EntropyForkError(f"{beside} is not there: copy it with the runs, it says what they have in common")
    overrides = json.loads(beside.read_text())
    every = int(np.flatnonzero(~np.isnan(curves["accuracy"][1:]))[0]) + 1
    settings = settings_of(max(answers), every, overrides)
    return Result(task.name, max(metrics), settings, int(seed), arm, commit, curves)


def finished(folder: Path, task: Task, made_at: str | None = None) -> list[Result]:
    """The finished runs of a folder.

    Raises:
        EntropyForkError: see :func:`result_of`.
    """
    return [result_of(file, task, made_at) for file in sorted(folder.glob("*-seed*/metrics.json"))]


def read_csv(file: Path) -> list[Result]:
    """The runs of a CSV; none if it is not there. A curve that an older CSV lacks is all NaN."""
    if not file.exists():
        return []
    with file.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    results = []
    for (task, steps, settings, seed, arm), group in groupby(rows, lambda row: tuple(row[name] for name in IDENTITY)):
        of_run = list(group)
        curves = {name: np.array([float(row.get(name) or "nan") for row in of_run]) for name in CURVES}
        results.append(Result(task, int(steps), settings, int(seed), arm, of_run[0]["commit"], curves))
    return results


def write_csv(results: Iterable[Result], file: Path) -> None:
    """Write the runs, ordered by what identifies them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for result in sorted(results, key=lambda result: result.identity):
        writer.writerows(result.rows())
    write_whole(file, text.getvalue())


def merged(there: Iterable[Result], new: Iterable[Result]) -> list[Result]:
    """Both lists of runs. A run that is in both stays as it was first; curves that its CSV lacked are added.

    Raises:
        EntropyForkError: the same run has other numbers there (other seconds do not count), or two runs of a seed did
            not start alike.
    """
    runs = {result.identity: result for result in there}
    for result in new:
        before = runs.setdefault(result.identity, result)
        unlogged = {name for name in CURVES if np.isnan(before.curves[name]).all()}
        for old, now in zip(before.rows(), result.rows(), strict=True):
            compared = (name for name in CURVES if name != "seconds" and name not in unlogged)
            other = [name for name in compared if old[name] != now[name]]
            if other:
                then, here = (one[other[0]] or "empty" for one in (old, now))
                raise EntropyForkError(
                    f"a run is there with other numbers: task {result.task}, arm {result.arm}, seed {result.seed}, "
                    f"{result.steps} steps, {result.settings}. At step {now['step']} its {other[0]} is {then} (made at "
                    f"{before.commit}), and now {here} (made at {result.commit}). Keep one of them: leave out the new "
                    "run, or take the rows of the old one out of the CSV"
                )
        found = {name: result.curves[name] for name in unlogged if not np.isnan(result.curves[name]).all()}
        if found:
            runs[result.identity] = replace(before, curves=before.curves | found)
    check_starts(runs.values())
    return list(runs.values())


def check_starts(results: Iterable[Result]) -> None:
    """Runs are paired by their seed. So those of a seed must start from one model and have the same held-out problems.

    The draws of a validation depend on nothing else but the seed and the step, so before training all runs of a seed
    have the same accuracy.

    Raises:
        EntropyForkError: two of them have another one.
    """
    first: dict[tuple[Any, ...], Result] = {}
    for result in results:
        other = first.setdefault((result.task, result.settings, result.seed), result)
        if cell(other.accuracy[0]) != cell(result.accuracy[0]):
            raise EntropyForkError(
                f"two runs of seed {result.seed} did not start alike: task {result.task}, {result.settings}. Before "
                f"training the accuracy of {other.arm} was {cell(other.accuracy[0])} (made at {other.commit}), and of "
                f"{result.arm} {cell(result.accuracy[0])} (made at {result.commit}). They had another model or other "
                "problems, so their difference is not that of their tokens. Make all runs of a seed in one world"
            )
