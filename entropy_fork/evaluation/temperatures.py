"""Either temperature of Eq. 5 varied while the other stays (2506.01939, §3): what ``entropy-fork temperatures`` does.

Every pair of temperatures is an evaluation of its own, in a folder of its own under the output, with the same questions
and the same seeds; the model is loaded once. Beside the folders lie the table (``temperatures.csv`` with every
benchmark, ``temperatures.json`` unrounded) and the two curves (``temperatures.png``, ``temperatures.svg``).
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.foreign_text import spreadsheet_cell
from entropy_fork.common.output_folder import write_whole
from entropy_fork.common.progress import task
from entropy_fork.evaluation import report
from entropy_fork.evaluation.run import Evaluation, Opened, Settings, evaluate, open_engine
from entropy_fork.evaluation.statistics import CONFIDENCE, Summary, average
from entropy_fork.sampling.temperature import PAPER_THRESHOLD, TwoTemperatures
from entropy_fork.tokens.store import read_manifest

CSV, JSON, PLOTS = "temperatures.csv", "temperatures.json", ("temperatures.png", "temperatures.svg")


@dataclass(frozen=True)
class Sweep:
    """The temperatures to try.

    Attributes:
        high: T_high's values while T_low is ``fixed_low``; may be empty.
        low: T_low's values while T_high is ``fixed_high``; may be empty.
        threshold: τ in nats.
    """

    high: tuple[float, ...]
    low: tuple[float, ...]
    fixed_high: float = 1.0
    fixed_low: float = 1.0
    threshold: float = PAPER_THRESHOLD

    def points(self) -> list[tuple[str, TwoTemperatures]]:
        """Which temperature is varied, and both; a pair that lies on both curves is there twice.

        Raises:
            EntropyForkError: there is none, or a value has no meaning.
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
    """What came out at one pair of temperatures; ``varied`` names its curve."""

    varied: str
    pair: TwoTemperatures
    evaluation: Evaluation

    @property
    def value(self) -> float:
        """The temperature that is varied, at this point."""
        return self.pair.high if self.varied == "high" else self.pair.low

    @property
    def average(self) -> Summary:
        """Of the only benchmark, or the unweighted mean over several."""
        summaries = list(self.evaluation.benchmarks.values())
        return summaries[0] if len(summaries) == 1 else average(summaries)


def parse_values(text: str, option: str) -> tuple[float, ...]:
    """``"0, 0.05,1"`` as numbers, each once.

    Raises:
        EntropyForkError: one of them is none.
    """
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError as error:
        raise EntropyForkError(f"{option} {text} must be temperatures with commas between, such as 0,0.3,1") from error


def threshold_of(folder: Path) -> float:
    """The threshold (nats) in the manifest of a folder of tokens, such as 'entropy-fork analyze' writes.

    Raises:
        EntropyForkError: there is no manifest, or no threshold in it.
    """
    threshold = read_manifest(folder).get("threshold")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold):
        raise EntropyForkError(f"--like {folder}: its manifest has no threshold: write --threshold NATS instead")
    return float(threshold)


def run_sweep(settings: Settings, sweep: Sweep, console: Console) -> list[Point]:
    """Evaluate what has not been evaluated yet, and write the results.

    Args:
        settings: of all evaluations, but for their two temperatures; their folders are made in ``output``.
        sweep: the temperatures.
        console: where progress is shown.

    Raises:
        EntropyForkError: something that was asked for cannot be done; before any answer is drawn.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise EntropyForkError("the curves are drawn with matplotlib: pip install 'entropy-fork[analysis]'")
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

    def open_once(job: Settings, *arguments: Any) -> Opened:
        nonlocal opened
        opened = opened or open_engine(job, *arguments)
        opened[0].sampling = job.sampling
        return opened

    evaluations = {}
    with task("temperatures", len(pairs), console=console) as shown:
        for pair, job in zip(pairs, jobs, strict=True):
            shown.update(note=f"T_high {pair.high:g}, T_low {pair.low:g}")
            evaluations[pair] = evaluate(job, console, open_once)
            report.write(evaluations[pair], job.output, None)
            shown.advance()
    if settings.merged is None:
        shutil.rmtree(merged, ignore_errors=True)
    results = [Point(varied, pair, evaluations[pair]) for varied, pair in points]
    write_whole(settings.output / CSV, _csv(results))
    write_whole(settings.output / JSON, json.dumps(_as_dict(results, sweep), indent=2) + "\n")
    _plot(results, sweep, settings.output)
    return results


def table(points: Sequence[Point]) -> report.TextTable:
    """A row for each point; where there are several benchmarks, of their average."""
    k = points[0].average.answers_per_question
    header = ["varied", "T_high", "T_low", f"Acc@{k}", f"{CONFIDENCE:.0%} interval", "tokens", "truncated", "above τ"]
    rows = []
    for point in points:
        summary = point.average
        low, high = summary.interval
        cells = [f"T_{point.varied}", f"{point.pair.high:g}", f"{point.pair.low:g}", f"{100 * summary.accuracy:.2f}"]
        cells += [f"{100 * low:.1f}–{100 * high:.1f}", f"{summary.mean_tokens:.0f}", f"{summary.truncated:.1%}"]
        rows.append([*cells, f"{summary.above:.1%}"])
    return report.TextTable(header, rows)


def _csv(points: Sequence[Point]) -> str:
    """A row for each point and benchmark, and where there are several for their average."""
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


def _as_dict(points: Sequence[Point], sweep: Sweep) -> dict[str, Any]:
    common = dict(points[0].evaluation.identity)
    common["sampling"] = {key: value for key, value in common["sampling"].items() if key != "two_temperatures"}
    return {
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


def _plot(points: Sequence[Point], sweep: Sweep, folder: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    # The paper's values are 0.05 and 3 apart: each gets the same room.
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
    for name in PLOTS:
        unfinished = folder / f".{name}"
        with rc_context({"svg.hashsalt": "entropy-fork"}):
            figure.savefig(unfinished, format=Path(name).suffix[1:], dpi=150, metadata=_METADATA[Path(name).suffix])
        os.replace(unfinished, folder / name)


#: without the date, so that the same results give the same files
_METADATA: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}}
