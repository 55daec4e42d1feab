"""Write what ``entropy-fork compare-evaluations`` found: tables, ``difference.json``, ``difference.md``, a figure."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.foreign_text import figure_label, markdown_cell
from entropy_fork.common.installing import why_missing
from entropy_fork.common.output_folder import write_whole
from entropy_fork.evaluation.compare import PairedEvaluation
from entropy_fork.evaluation.paired import Difference, PairedSummary
from entropy_fork.evaluation.results import MODEL_COLUMNS, TextTable, model_cells, write_figure
from entropy_fork.evaluation.statistics import CONFIDENCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

JSON, TABLES, PLOTS = "difference.json", "difference.md", ("difference.png", "difference.svg")

INK, GREY, BETTER, WORSE = "#2b3036", "#8a9199", "#1f6fb2", "#c2571a"
#: at most this many characters of a benchmark's name stand in the figure
LONGEST = 28


def check_installed() -> None:
    """Raise an error where matplotlib, which draws the figure, is missing.

    Raises:
        EntropyForkError: it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise EntropyForkError(
            f"the figure cannot be drawn: {why_missing(['matplotlib'], 'analysis')}. Without --output only tables are "
            f"printed"
        )


def tables(paired: PairedEvaluation) -> list[TextTable]:
    """The two models, accuracy, questions won and lost, length, and pass@k if there are several answers."""
    rows = paired.rows
    k = rows[0][1].answers_per_question
    models = TextTable(["evaluation", "folder", *MODEL_COLUMNS], [])
    for name, one in (("before", paired.before), ("after", paired.after)):
        cells = ["not recorded"] * len(MODEL_COLUMNS) if one.model is None else model_cells(one.model)
        models.rows.append([name, str(one.folder), *cells])
    columns = ["before", "after", "difference", f"{CONFIDENCE:.0%} interval"]
    accuracy = TextTable([f"Acc@{k}", *columns, "± same questions"], [])
    questions = TextTable(["questions", "better", "worse", "same", "all"], [])
    length = TextTable(["tokens of an answer", *columns], [])
    passes = TextTable(["benchmark", "pass@", *columns], [])
    for name, summary in rows:
        same = summary.standard_error_same_questions
        accuracy.rows.append([name, *_cells(summary.accuracy, 100, 2), "–" if same is None else f"{100 * same:.2f}"])
        questions.rows.append(
            [name, *map(str, (summary.better, summary.worse, summary.same, summary.questions))],
        )
        length.rows.append([name, *_cells(summary.tokens, 1, 1)])
        passes.rows.extend([name, str(i), *_cells(one, 100, 2)] for i, one in summary.pass_at.items() if i > 1)
    return [models, accuracy, questions, length, *([passes] if passes.rows else [])]


def write(paired: PairedEvaluation, folder: Path) -> None:
    """Write ``difference.json`` (everything, unrounded), ``difference.md`` (the tables) and the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        **{
            name: {
                "folder": str(one.folder.resolve()),
                "model": None if one.model is None else one.model.as_dict(),
                "identity": one.identity,
            }
            for name, one in (("before", paired.before), ("after", paired.after))
        },
        "notes": list(paired.notes),
        "confidence": CONFIDENCE,
        "benchmarks": {name: summary.as_dict() for name, summary in paired.benchmarks.items()},
        "average": paired.rows[-1][1].as_dict(),
    }
    write_whole(folder / JSON, json.dumps(content, indent=2) + "\n")
    parts = [table.markdown() for table in tables(paired)]
    if paired.notes:
        parts.insert(1, "".join(f"- {markdown_cell(note)}.\n" for note in paired.notes))
    write_whole(folder / TABLES, "\n".join(parts))
    write_figure(figure(paired), [folder / name for name in PLOTS])


def figure(paired: PairedEvaluation) -> Figure:
    """The difference of the accuracy of each benchmark, with its interval."""
    from matplotlib.figure import Figure

    rows = paired.rows
    made = Figure(figsize=(7.6, 1.5 + 0.46 * len(rows)), layout="constrained")
    axes = made.add_subplot()
    axes.axvline(0, color=INK, linewidth=1)
    for place, (_, summary) in enumerate(rows):
        _draw(axes, place, summary.accuracy, is_average=len(rows) > 1 and place == len(rows) - 1)
    if len(rows) > 1:
        axes.axhline(len(rows) - 1.5, color=GREY, linewidth=0.6, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(rows)), [_name(name, summary) for name, summary in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    low, high = _reach([summary for _, summary in rows])
    axes.set_xlim(low, high)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(rows)), [_values(summary.accuracy) for _, summary in rows])
    for side in (axes, right):
        side.tick_params(axis="y", length=0, colors=INK)
    for name in ("top", "left", "right"):
        axes.spines[name].set_visible(False)
    right.spines["right"].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(axis="x", colors=INK)
    axes.grid(axis="x", color=GREY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    label = f"difference of Acc@{rows[0][1].answers_per_question} in points, with its {CONFIDENCE:.0%} interval"
    if not all(summary.accuracy.is_clear for _, summary in rows):
        label += " (grey: zero is in it)"
    axes.set_xlabel(label, color=INK)
    names = [figure_label(_short(str(one.folder))) for one in (paired.before, paired.after)]
    axes.set_title(f"{names[1]} minus {names[0]}", color=INK, fontsize="medium", loc="left")
    return made


def _draw(axes: Axes, place: int, difference: Difference, is_average: bool) -> None:
    color = GREY if not difference.is_clear else BETTER if difference.difference > 0 else WORSE
    if difference.interval is not None:
        low, high = (100 * end for end in difference.interval)
        axes.plot(
            [low, high], [place, place], color=color, linewidth=2.2, marker="|", markersize=9, markeredgewidth=1.6
        )
    axes.plot(
        100 * difference.difference, place, marker="D" if is_average else "o", markersize=6, color=color,
        markeredgecolor="white", markeredgewidth=1,
    )  # fmt: skip


def _reach(summaries: list[PairedSummary]) -> tuple[float, float]:
    """Where the axis begins and ends, in points: all intervals, zero, and some room."""
    ends = [0.0]
    for summary in summaries:
        ends += [100 * end for end in summary.accuracy.interval or (summary.accuracy.difference,) * 2]
    room = max(1.0, 0.08 * (max(ends) - min(ends)))
    return min(ends) - room, max(ends) + room


def _name(name: str, summary: PairedSummary) -> str:
    return f"{figure_label(_short(name))} ({summary.questions})"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else "…" + name[1 - LONGEST :]


def _values(difference: Difference) -> str:
    return f"{100 * difference.before:.1f} → {100 * difference.after:.1f}"


def _cells(difference: Difference, scale: float, digits: int) -> list[str]:
    """Before, after, difference and interval."""
    return [
        f"{scale * difference.before:.{digits}f}",
        f"{scale * difference.after:.{digits}f}",
        f"{scale * difference.difference:+.{digits}f}",
        _interval(difference, scale),
    ]


def _interval(difference: Difference, scale: float) -> str:
    if difference.interval is None:
        return "–"
    low, high = (scale * end for end in difference.interval)
    return f"{low:+.1f} to {high:+.1f}"
