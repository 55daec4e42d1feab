"""Write ``results.json`` and the tables of an evaluation, with the paper's numbers beside ours."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from entropy_fork.common.foreign_text import markdown_cell, visible
from entropy_fork.common.output_folder import write_whole
from entropy_fork.evaluation.checkpoint import ModelRecord
from entropy_fork.evaluation.evaluate import Evaluation
from entropy_fork.evaluation.statistics import CONFIDENCE, BenchmarkSummary, average

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS, TABLES = "results.json", "results.md"
MODEL_COLUMNS = ["model", "step", "trained on"]


@dataclass(frozen=True)
class TextTable:
    """Rows of text under a header, for the terminal and for Markdown."""

    header: list[str]
    rows: list[list[str]]

    def rich(self) -> Table:
        """The table for a terminal."""
        table = Table()
        for number, name in enumerate(self.header):
            table.add_column(Text(visible(name)), justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(visible(cell)) for cell in row))  # a model may have written markup
        return table

    def markdown(self) -> str:
        """The table as Markdown, for a file."""
        header, *rows = ([markdown_cell(cell) for cell in line] for line in [self.header, *self.rows])
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@cache
def paper() -> dict[str, Any]:
    """The paper's numbers: ``results[model][benchmark][column]`` is (Acc@16 in percent, mean length in tokens)."""
    return json.loads((files("entropy_fork.evaluation") / "paper.json").read_text())


def paper_benchmark(data_source: str) -> str | None:
    """The paper's name of a benchmark. Only the letters and digits of its data source count."""
    plain = re.sub(r"[^a-z0-9]", "", data_source.rsplit("/", 1)[-1].lower())
    return next((name for name, aliases in paper()["benchmarks"].items() if plain in aliases), None)


def paper_cells(model: str, data_sources: Sequence[str]) -> list[tuple[float, float] | None]:
    """The paper's columns as (Acc@16, length), each the mean over these benchmarks; None if it lacks one of them."""
    names = [paper_benchmark(source) for source in data_sources]
    cells: list[tuple[float, float] | None] = []
    for column in paper()["columns"]:
        if None in names:
            cells.append(None)
            continue
        pairs = [paper()["results"][model][name][column] for name in names]
        cells.append((sum(pair[0] for pair in pairs) / len(pairs), sum(pair[1] for pair in pairs) / len(pairs)))
    return cells


def tables(evaluation: Evaluation, compare: str | None) -> list[TextTable]:
    """Three tables: the model, accuracy and length (beside the paper's, of the model ``compare``), and pass@k."""
    rows = _rows(evaluation)
    k = rows[0][1].answers_per_question
    header = ["benchmark", "questions", f"Acc@{k}", f"{CONFIDENCE:.0%} interval", "± same questions"]
    header += ["tokens", "truncated", "boxed"]
    if compare is not None:
        header += [f"{name} ({compare})" for name in paper()["columns"].values()]
    accuracy = TextTable(header, [])
    passes = TextTable(["benchmark", *(f"pass@{i}" for i in rows[0][1].pass_at)], [])
    for name, summary, sources in rows:
        low, high = summary.interval
        same = summary.standard_error_same_questions
        cells = [name, str(summary.questions), f"{100 * summary.accuracy:.2f}", f"{100 * low:.1f} to {100 * high:.1f}"]
        cells += ["–" if same is None else f"{100 * same:.2f}", f"{summary.mean_tokens:.0f}"]
        cells += [f"{summary.truncated:.1%}", f"{summary.boxed:.1%}"]
        if compare is not None:
            cells += [
                "–" if cell is None else f"{cell[0]:.2f} / {cell[1]:.0f}" for cell in paper_cells(compare, sources)
            ]
        accuracy.rows.append(cells)
        passes.rows.append([name, *(f"{100 * share:.2f}" for share in summary.pass_at.values())])
    return [TextTable(MODEL_COLUMNS, [model_cells(evaluation.model)]), accuracy, passes]


def model_cells(model: ModelRecord) -> list[str]:
    """The cells of :data:`MODEL_COLUMNS`."""
    return [model.path, model.step_in_words(), model.trained_on_in_words()]


def write(evaluation: Evaluation, folder: Path, compare: str | None) -> None:
    """Write ``results.json`` (everything, unrounded) and ``results.md`` (the tables)."""
    rows = _rows(evaluation)
    results: dict[str, Any] = {
        "model": evaluation.model.as_dict(),
        "identity": evaluation.identity,
        "confidence": CONFIDENCE,
        "benchmarks": {name: summary.as_dict() for name, summary in evaluation.benchmarks.items()},
        "average": average(list(evaluation.benchmarks.values())).as_dict(),
    }
    if compare is not None:
        results["paper"] = {
            "source": paper()["source"],
            "model": compare,
            **{
                name: {
                    column: None if cell is None else {"accuracy": cell[0] / 100, "mean_tokens": cell[1]}
                    for column, cell in zip(paper()["columns"], paper_cells(compare, sources), strict=True)
                }
                for name, _, sources in rows
            },
        }
    write_whole(folder / RESULTS, json.dumps(results, indent=2) + "\n")
    write_whole(folder / TABLES, "\n".join(table.markdown() for table in tables(evaluation, compare)))


def _rows(evaluation: Evaluation) -> list[tuple[str, BenchmarkSummary, list[str]]]:
    """Name, summary and data sources of each benchmark, and of their average if there are several."""
    benchmarks = evaluation.benchmarks
    rows = [(name, summary, [name]) for name, summary in benchmarks.items()]
    return rows if len(rows) == 1 else [*rows, ("average", average(list(benchmarks.values())), list(benchmarks))]


def write_figure(figure: Figure, files: Sequence[Path]) -> None:
    """Write a figure as PNG or SVG. Each file is whole, and the same figure gives the same bytes."""
    from matplotlib import rc_context

    for file in files:
        unfinished = file.with_name(f".{file.name}")
        metadata = {"Date": None} if file.suffix == ".svg" else {}
        with rc_context({"svg.hashsalt": "entropy-fork"}):
            figure.savefig(unfinished, format=file.suffix[1:], dpi=150, metadata=metadata)
        os.replace(unfinished, file)
