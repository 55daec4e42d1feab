"""Training curves of one or several runs, from the tensorboard files that verl writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.foreign_text import figure_label, visible
from entropy_fork.report.figures import PageFigure, axes, file_name, step_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: what is drawn, in this order: the tag that verl or the plugin logs, and its title
METRICS = {
    "entropy_fork/kept_ratio": "kept share of the tokens",
    "entropy_fork/threshold": "threshold τ (nats)",
    "actor/entropy": "entropy of the policy (nats)",
    "entropy_fork/entropy_kept": "entropy of kept tokens (nats)",
    "entropy_fork/entropy_dropped": "entropy of dropped tokens (nats)",
    "actor/grad_norm": "norm of the gradient, before clipping",
    "entropy_fork/pg_clipfrac": "share of the kept tokens that PPO's clip takes out",
    "response_length/mean": "response length (tokens)",
    "critic/score/mean": "reward in training",
}

#: the validation accuracy of a data set, averaged over the answers to a question
_ACCURACY = re.compile(r"val-core/(.+)/acc/(mean@\d+)")


@dataclass(frozen=True)
class Curve:
    """A metric of a run: steps (int64) and values (float64), shape (points,), by step."""

    steps: np.ndarray
    values: np.ndarray


Run = Mapping[str, Curve]


def parse_run(text: str) -> tuple[str, Path]:
    """Name and folder from ``NAME=DIR``, or from ``DIR``, whose last part is then the name."""
    name, equals, folder = text.partition("=")
    path = Path(folder if equals and "/" not in name else text)
    return (name if equals and "/" not in name else path.absolute().name), path


def read_run(folder: Path) -> Run:
    """All scalars of a run. If a step was logged more than once (by a resumed run), the last value counts.

    Raises:
        EntropyForkError: there is no folder, it has no event files or those of several runs, or none of the metrics
            that are drawn here.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        raise EntropyForkError(f"--run: there is no folder {folder}")
    homes = sorted({file.parent for file in folder.rglob("events.out.tfevents.*")})
    if len(homes) != 1:
        found = f"the files of {len(homes)} runs: " + ", ".join(map(str, homes[:5])) if homes else "no such files"
        raise EntropyForkError(
            f"--run {folder} must have the tensorboard files of one run, and has {found}. verl writes them "
            f"with trainer.logger=[console,tensorboard], into TENSORBOARD_DIR or tensorboard_log/PROJECT/EXPERIMENT"
        )
    events = EventAccumulator(str(homes[0]), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    run = {}
    for tag in events.Tags()["scalars"]:
        latest = {event.step: event.value for event in sorted(events.Scalars(tag), key=lambda event: event.wall_time)}
        steps = np.array(sorted(latest), dtype=np.int64)
        run[tag] = Curve(steps, np.array([latest[step] for step in steps.tolist()], dtype=np.float64))
    if not any(title(tag) for tag in run):
        raise EntropyForkError(
            f"--run {folder} has no metric of a verl training run, such as {', '.join(list(METRICS)[2:6])}. It has "
            f"{', '.join(sorted(run)[:8]) or 'no scalars'}"
        )
    return run


def title(tag: str) -> str | None:
    """The title of a tag, for people; None if the tag is not drawn."""
    if found := _ACCURACY.fullmatch(tag):
        return f"accuracy on {visible(found[1])} ({found[2]})"
    return METRICS.get(tag)


def tags(runs: Mapping[str, Run]) -> list[str]:
    """The tags that are drawn because some run has them: first accuracies, then the others in their order."""
    found = {tag for run in runs.values() for tag in run}
    return [*sorted(tag for tag in found if _ACCURACY.fullmatch(tag)), *(tag for tag in METRICS if tag in found)]


def page_figures(runs: Mapping[str, Run]) -> list[PageFigure]:
    """A figure per metric, with a line per run."""
    return [
        PageFigure(file_name("curve", tag), f"{title(tag)}, by training step", partial(_draw, runs, tag))
        for tag in tags(runs)
    ]


def _draw(runs: Mapping[str, Run], tag: str) -> Figure:
    figure, plot = axes(figure_label(title(tag) or tag))
    for name, run in runs.items():
        # A run without this metric gets an empty line, so that each run has the same colour in all figures.
        curve = run.get(tag, Curve(np.array([]), np.array([])))
        marker = "o" if curve.steps.size < 40 else ""
        plot.plot(
            curve.steps, curve.values, marker=marker, markersize=3.5, label=figure_label(name) if tag in run else None
        )
    step_axis(plot)
    _leave_noise_small(plot, _is_share(tag))
    plot.ticklabel_format(axis="y", useOffset=False)
    if len(runs) > 1:
        plot.legend(fontsize=9)
    return figure


def _is_share(tag: str) -> bool:
    return tag == "entropy_fork/kept_ratio" or bool(_ACCURACY.fullmatch(tag))


def _leave_noise_small(plot: Axes, is_share: bool) -> None:
    """Show at least 10% of the value's size, and 0.1 of a share: else the last digits would fill the plot."""
    values = np.concatenate([line.get_ydata() for line in plot.lines] or [np.zeros(0)]).astype(np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return
    low, high = float(values.min()), float(values.max())
    least = 0.1 if is_share else 0.1 * max(abs(low), abs(high))
    if high - low >= least:
        return
    low, high = (low + high - least) / 2, (low + high + least) / 2
    if is_share and high > 1 >= float(values.max()):
        low, high = 1 - least, 1.0
    if low < 0 <= float(values.min()):
        low, high = 0.0, least
    margin = 0.05 * (high - low)  # as matplotlib leaves
    plot.set_ylim(low - margin, high + margin)


def last_values(runs: Mapping[str, Run]) -> tuple[list[str], list[list[str]]]:
    """A table: for each metric and run the first value, the last value, and its step."""
    rows = []
    for tag in tags(runs):
        cells = []
        for run in runs.values():
            if (curve := run.get(tag)) is None or not curve.steps.size:
                cells.append("–")
            else:
                cells.append(f"{curve.values[0]:.4g} → {curve.values[-1]:.4g} (step {curve.steps[-1]})")
        rows.append([title(tag) or tag, *cells])
    return ["metric, first → last", *runs], rows
