"""How the forks change over the steps of a training run, from the tokens that ``entropy_fork.dump_every`` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from entropy_fork.report.figures import PageFigure, axes, file_name, step_axis
from entropy_fork.tokens.store import parts, read_answer_columns, read_part

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERCENTILES = (50, 80, 90, 95, 99)

#: a token is in the table if it was seen this often in the early half of the steps, and in the late half
SEEN_OFTEN = 10


@dataclass(frozen=True)
class Steps:
    """Statistics of the dumped steps.

    Attributes:
        steps: int64, shape (steps,).
        percentiles: float64, shape (steps, len(PERCENTILES)): percentiles of the entropies of a step, nats.
        kept, dropped: float64, shape (steps,): mean entropy of kept and of dropped tokens, nats; NaN if not known.
        moved: rows of (piece, times early, times late, kept share early, kept share late), the largest changes first.
    """

    steps: np.ndarray
    percentiles: np.ndarray
    kept: np.ndarray
    dropped: np.ndarray
    moved: list[tuple[str, int, int, float, float]]


def read_steps(folder: Path) -> Steps | None:
    """Read the steps of a folder; None if it has fewer than two. Keeps five bytes per token in memory."""
    by_step: dict[int, list[tuple[np.ndarray, np.ndarray | None]]] = {}
    halves, pieces = (_Half(), _Half()), dict[int, str]()
    steps = _steps(folder)
    if len(steps) < 2:
        return None
    for number in parts(folder):
        for answer in read_part(folder, number):
            if answer.step is None or not len(answer.entropy):
                continue
            by_step.setdefault(answer.step, []).append((np.array(answer.entropy), _copied(answer.selected)))
            pieces.update(zip(answer.token_ids.tolist(), answer.pieces, strict=True))
            place = steps.index(answer.step) * 2
            # with an odd number of steps, the middle one is in neither half
            if answer.selected is not None and place != len(steps) - 1:
                halves[place >= len(steps)].add(answer.token_ids, answer.selected)
    if len(by_step) < 2:
        return None
    rows = [_of_step(by_step[step]) for step in sorted(by_step)]
    percentiles, kept, dropped = zip(*rows, strict=True)
    found = np.array(sorted(by_step), dtype=np.int64)
    return Steps(found, np.array(percentiles), np.array(kept), np.array(dropped), _moved(*halves, pieces))


def _steps(folder: Path) -> list[int]:
    found = {step for number in parts(folder) for step in read_answer_columns(folder, number, "step")[0]}
    return sorted(step for step in found if step is not None)


def _copied(values: np.ndarray | None) -> np.ndarray | None:
    return None if values is None else np.array(values)


class _Half:
    """How often each token id was seen and kept in one half of the steps, int64, shape (highest id + 1,)."""

    def __init__(self) -> None:
        self.seen, self.kept = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)

    def add(self, ids: np.ndarray, kept: np.ndarray) -> None:
        self.grow(int(ids.max()) + 1)
        self.seen += np.bincount(ids, minlength=self.seen.size)
        self.kept += np.bincount(ids[kept], minlength=self.kept.size)

    def grow(self, size: int) -> None:
        missing = max(0, size - self.seen.size)
        self.seen, self.kept = np.pad(self.seen, (0, missing)), np.pad(self.kept, (0, missing))


def _of_step(answers: Sequence[tuple[np.ndarray, np.ndarray | None]]) -> tuple[np.ndarray, float, float]:
    entropy = np.concatenate([values for values, _ in answers]).astype(np.float64)
    sides = [
        np.concatenate([values[selected == side] for values, selected in answers if selected is not None] or [[]])
        for side in (True, False)
    ]
    means = [float(side.mean()) if side.size else float("nan") for side in sides]
    return np.percentile(entropy, PERCENTILES), means[0], means[1]


def _moved(early: _Half, late: _Half, pieces: dict[int, str]) -> list[tuple[str, int, int, float, float]]:
    """The tokens whose kept share changed most from the first half of the steps to the second."""
    for half in (early, late):
        half.grow(max(early.seen.size, late.seen.size))
    often = np.flatnonzero((early.seen >= SEEN_OFTEN) & (late.seen >= SEEN_OFTEN))
    before, after = (half.kept[often] / half.seen[often] for half in (early, late))
    order = np.argsort(-np.abs(after - before), kind="stable")[:30]
    return [
        (pieces[int(often[k])], int(early.seen[often[k]]), int(late.seen[often[k]]), float(before[k]), float(after[k]))
        for k in order
        if after[k] != before[k]
    ]


def page_figures(name: str, found: Steps) -> list[PageFigure]:
    """The figures of a folder called ``name``."""
    made = [
        PageFigure(
            file_name("steps-percentiles", name),
            "percentiles of the entropies of the dumped answers, by training step",
            partial(_percentiles, found),
        )
    ]
    if not np.isnan(found.kept).all() and not np.isnan(found.dropped).all():
        made.append(
            PageFigure(
                file_name("steps-kept", name),
                "mean entropy of the tokens that were trained on and of the others, by training step",
                partial(_sides, found),
            )
        )
    return made


def _percentiles(found: Steps) -> Figure:
    figure, plot = axes("percentiles of the entropy (nats)")
    for name, values in zip(PERCENTILES, found.percentiles.T, strict=True):
        plot.plot(found.steps, values, marker="o", markersize=3, label=f"{name}%")
    step_axis(plot)
    plot.set_ylim(0, 1.25 * float(found.percentiles.max()) or 1)  # room for the legend
    plot.legend(fontsize=9, ncols=5, loc="upper center", columnspacing=1, handlelength=1.2)
    return figure


def _sides(found: Steps) -> Figure:
    figure, plot = axes("mean entropy (nats)")
    for name, values in (("trained on", found.kept), ("dropped", found.dropped)):
        plot.plot(found.steps, values, marker="o", markersize=3, label=name)
    step_axis(plot)
    plot.set_ylim(0, 1.25 * float(np.nanmax([found.kept, found.dropped])) or 1)  # room for the legend
    plot.legend(fontsize=9, ncols=2, loc="upper center")
    return figure
