"""What ``entropy-fork temperatures`` does: vary one temperature of Eq. 5 and keep the other one (2506.01939, §3).

Every pair of temperatures is an evaluation of its own, in its own folder under the output, with the same questions and
the same seeds. The model is loaded once. Beside the folders are the table (``temperatures.csv`` with every benchmark,
``temperatures.json`` unrounded) and the two curves (``temperatures.png``, ``temperatures.svg``).
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.foreign_text import spreadsheet_cell
from entropy_fork.common.installing import why_missing
from entropy_fork.common.output_folder import write_whole
from entropy_fork.common.progress import task
from entropy_fork.evaluation import results
from entropy_fork.evaluation.evaluate import Evaluation, EvaluationSettings, Opened, evaluate, open_engine
from entropy_fork.evaluation.statistics import CONFIDENCE, BenchmarkSummary, average
from entropy_fork.sampling.two_temperatures import PAPER_THRESHOLD, TwoTemperatures
from entropy_fork.tokens.store import read_manifest

#: a smaller share of the tokens makes no difference that one could see
HARDLY_USED = 0.01
CSV, JSON, PLOTS = "temperatures.csv", "temperatures.json", ("temperatures.png", "temperatures.svg")


@dataclass(frozen=True)
class TemperatureSweep:
    """The temperatures to try.

    Attributes:
        high: values of T_high while T_low is ``fixed_low``; may be empty.
        low: values of T_low while T_high is ``fixed_high``; may be empty.
        fixed_high, fixed_low: the temperature that stays while the other one is varied.
        threshold: τ in nats.
    """

    high: tuple[float, ...]
    low: tuple[float, ...]
    fixed_high: float = 1.0
    fixed_low: float = 1.0
    threshold: float = PAPER_THRESHOLD

    def points(self) -> list[tuple[str, TwoTemperatures]]:
        """Each point: which temperature is varied, and the pair. A pair on both curves is there twice.

        Raises:
            EntropyForkError: there is no point, or a value has no meaning.
        """
        if not self.high and not self.low:
            raise EntropyForkError("neither T_high nor T_low has a value to try: write some with --high or --low")
        try:
            return [
                *(("high", TwoTemperatures(value, self.fixed_low, self.threshold)) for value in self.high),
                *(("low", TwoTemperatures(self.fixed_high, value, self.threshold)) for value in self.low),
            ]
        except ValueError as error:
            raise EntropyForkError(str(error)) from error


@dataclass(frozen=True)
class Point:
    """The result at one pair of temperatures; ``varied`` names its curve."""

    varied: str
    pair: TwoTemperatures
    evaluation: Evaluation

    @property
    def value(self) -> float:
        """The value of the temperature that is varied."""
        return self.pair.high if self.varied == "high" else self.pair.low

    @property
    def average(self) -> BenchmarkSummary:
        """The summary of the only benchmark, or the unweighted mean over several."""
        summaries = list(self.evaluation.benchmarks.values())
        return summaries[0] if len(summaries) == 1 else average(summaries)


def parse_values(text: str, option: str) -> tuple[float, ...]:
    """``"0, 0.05,1"`` as numbers, each once.

    Raises:
        EntropyForkError: one of them is not a number.
    """
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError as error:
        raise EntropyForkError(f"{option} {text} must be temperatures with commas between, such as 0,0.3,1") from error


def threshold_of(folder: Path) -> float:
    """The threshold (nats) in the manifest of a folder of tokens, as 'entropy-fork analyze' writes it.

    Raises:
        EntropyForkError: there is no manifest, or no threshold in it.
    """
    threshold = read_manifest(folder).get("threshold")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold):
        raise EntropyForkError(f"--like {folder}: its manifest has no threshold: write --threshold NATS instead")
    return float(threshold)


def choose_threshold(threshold: float | None, like: Path | None) -> float:
    """τ in nats: the given threshold, that of a folder of tokens, or the paper's.

    Raises:
        EntropyForkError: both are given, or the folder has no threshold.
    """
    if threshold is not None and like is not None:
        raise EntropyForkError("--threshold and --like both set τ: write one of them")
    if like is not None:
        return threshold_of(like)
    return PAPER_THRESHOLD if threshold is None else threshold


def run_sweep(settings: EvaluationSettings, sweep: TemperatureSweep, console: Console) -> list[Point]:
    """Evaluate what has not been evaluated yet, and write the results.

    Args:
        settings: the settings of all evaluations, whose two temperatures are replaced. Their folders are made in its
            ``output``.
        sweep: the temperatures.
        console: where progress is shown.

    Raises:
        EntropyForkError: something that was asked for cannot be done; raised before any answer is drawn.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise EntropyForkError(f"the curves cannot be drawn: {why_missing(['matplotlib'], 'analysis')}")
    points = sweep.points()
    pairs = list(dict.fromkeys(pair for _, pair in points))
    merged = settings.merged or settings.output / "merged"
    jobs = [
        replace(
            settings,
            output=settings.output / f"high{pair.high:g}_low{pair.low:g}",
            sampling=replace(settings.sampling, two_temperatures=pair),
            merged=merged,
        )
        for pair in pairs
    ]
    opened: Opened | None = None

    def open_once(job: EvaluationSettings, *arguments: Any) -> Opened:
        nonlocal opened
        opened = opened or open_engine(job, *arguments)
        opened[0].sampling = job.sampling
        return opened

    evaluations = {}
    with task("temperatures", len(pairs), console=console) as shown:
        for pair, job in zip(pairs, jobs, strict=True):
            shown.update(note=f"T_high {pair.high:g}, T_low {pair.low:g}")
            evaluations[pair] = evaluate(job, console, open_once)
            results.write(evaluations[pair], job.output, None)
            shown.advance()
    if settings.merged is None:
        shutil.rmtree(merged, ignore_errors=True)
    curves = [Point(varied, pair, evaluations[pair]) for varied, pair in points]
    write_whole(settings.output / CSV, _csv(curves))
    write_whole(settings.output / JSON, json.dumps(_as_dict(curves, sweep), indent=2) + "\n")
    _plot(curves, sweep, settings.output)
    return curves


def table(points: Sequence[Point]) -> results.TextTable:
    """A row for each point, with the average if there are several benchmarks."""
    k = points[0].average.answers_per_question
    header = ["varied", "T_high", "T_low", f"Acc@{k}", f"{CONFIDENCE:.0%} interval", "tokens", "truncated", "above τ"]
    rows = []
    for point in points:
        summary = point.average
        low, high = summary.interval
        cells = [f"T_{point.varied}", f"{point.pair.high:g}", f"{point.pair.low:g}", f"{100 * summary.accuracy:.2f}"]
        cells += [f"{100 * low:.1f}–{100 * high:.1f}", f"{summary.mean_tokens:.0f}", f"{summary.truncated:.1%}"]
        rows.append([*cells, f"{summary.above:.1%}"])
    return results.TextTable(header, rows)


def notes(points: Sequence[Point]) -> list[str]:
    """A sentence for each pair with nearly all tokens on one side of τ: it measures one temperature alone."""
    said = []
    for pair, point in {point.pair: point for point in points}.items():
        above = point.average.above
        assert above is not None  # every point has two temperatures
        if pair.high != pair.low and min(above, 1 - above) < HARDLY_USED:
            used = pair.low if above < HARDLY_USED else pair.high
            said.append(
                f"with T_high {pair.high:g} and T_low {pair.low:g}, {above:.1%} of the tokens were above τ = "
                f"{pair.threshold:.4g} nats, so this is T = {used:g} alone. To get a τ of such answers, run "
                "'entropy-fork analyze' with the same data and chat template, and name its folder with --like"
            )
    return said


def _csv(points: Sequence[Point]) -> str:
    """A row for each point and benchmark, and for the average if there are several benchmarks."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["accuracy", "interval_low", "interval_high", "standard_error", "mean_tokens", "truncated", "above"]
    writer.writerow(
        ["varied", "temperature_high", "temperature_low", "threshold", "benchmark", "questions", "answers", *columns]
    )
    for point in points:
        benchmarks = point.evaluation.benchmarks
        for name, summary in [*benchmarks.items(), *([("average", point.average)] if len(benchmarks) > 1 else [])]:
            pair = point.pair
            row = [point.varied, pair.high, pair.low, pair.threshold, spreadsheet_cell(name), summary.questions]
            row += [summary.answers_per_question, summary.accuracy, *summary.interval, summary.standard_error]
            writer.writerow([*row, summary.mean_tokens, summary.truncated, summary.above])
    return text.getvalue()


def _as_dict(points: Sequence[Point], sweep: TemperatureSweep) -> dict[str, Any]:
    common = dict(points[0].evaluation.identity)
    common["sampling"] = {key: value for key, value in common["sampling"].items() if key != "two_temperatures"}
    return {
        "model": points[0].evaluation.model.as_dict(),
        "identity": common,
        "threshold": sweep.threshold,
        "confidence": CONFIDENCE,
        "points": [
            {
                "varied": point.varied,
                "temperature_high": point.pair.high,
                "temperature_low": point.pair.low,
                "benchmarks": {name: summary.as_dict() for name, summary in point.evaluation.benchmarks.items()},
                "average": point.average.as_dict(),
            }
            for point in points
        ],
    }


def _plot(points: Sequence[Point], sweep: TemperatureSweep, folder: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    # Two values can be 0.05 or 3 apart: each one gets the same room.
    values = sorted({point.value for point in points})
    places = {value: place for place, value in enumerate(values)}
    fixed = {"high": f"T_low = {sweep.fixed_low:g}", "low": f"T_high = {sweep.fixed_high:g}"}
    for varied, marker in (("high", "o"), ("low", "s")):
        curve = sorted((point for point in points if point.varied == varied), key=lambda point: point.value)
        if not curve:
            continue
        accuracy = [100 * point.average.accuracy for point in curve]
        low, high = zip(*(point.average.interval for point in curve), strict=True)
        below = [mean - 100 * end for mean, end in zip(accuracy, low, strict=True)]
        above = [100 * end - mean for mean, end in zip(accuracy, high, strict=True)]
        axes.errorbar(
            [places[point.value] for point in curve],
            accuracy,
            yerr=[below, above],
            marker=marker,
            capsize=3,
            label=f"T_{varied}, with {fixed[varied]}",
        )
    axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    axes.set_xlabel("temperature")
    axes.set_ylabel(f"Acc@{points[0].average.answers_per_question} (%)")
    axes.set_title(f"Entropies above and below {sweep.threshold:g} nats", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    results.write_figure(figure, [folder / name for name in PLOTS])
