"""A matplotlib figure in the two styles of the page, and as files."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_fork.common.errors import EntropyForkError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: after Okabe and Ito: people who see fewer colours can tell them apart as well
_CYCLES = {
    "light": ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#000000"],
    "dark": ["#56b4e9", "#ff8c42", "#2fd6a3", "#f0a3cf", "#f0e442", "#8ab4ff", "#ffffff"],
}
_INK = {"light": "#1d2430", "dark": "#e6e9ef"}
_PAPER = {"light": "#ffffff", "dark": "#14171c"}


@dataclass(frozen=True)
class PageFigure:
    """A figure of the page.

    Attributes:
        name: the name of its files: letters, digits and hyphens.
        caption: what one sees; a screen reader reads it in place of the figure.
        draw: makes the figure; called once per style, because matplotlib fixes colours when it makes a line or a text.
        both: its colours can be read on a light and on a dark background, so the page has it once.
    """

    name: str
    caption: str
    draw: Callable[[], Figure]
    both: bool = False

    @cached_property
    def light(self) -> bytes:
        """SVG with dark ink on a transparent background."""
        return _saved(self, "light", "svg", transparent=True)

    @cached_property
    def dark(self) -> bytes:
        """SVG with light ink on a transparent background."""
        return _saved(self, "dark", "svg", transparent=True)


def style(name: str) -> dict[str, Any]:
    """matplotlib's settings for ``light`` or ``dark``."""
    from cycler import cycler

    ink = _INK[name]
    colours = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(colours, ink),
        "axes.prop_cycle": cycler(color=_CYCLES[name]),
        "axes.facecolor": _PAPER[name],
        "figure.facecolor": _PAPER[name],
        "savefig.facecolor": _PAPER[name],
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": ink,
        "grid.alpha": 0.15,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "font.size": 11,
        "svg.hashsalt": "entropy-fork",  # the same figure gives the same file
    }


def _saved(figure: PageFigure, name: str, kind: str, **options: Any) -> bytes:
    import matplotlib

    settings: Any = style(name)
    with matplotlib.rc_context(settings):
        buffer = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        figure.draw().savefig(buffer, format=kind, metadata=metadata, **options)
    return buffer.getvalue()


def data_uri(svg: bytes) -> str:
    """The address of an image that is in the page itself."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def write_files(figures: Sequence[PageFigure], folder: Path) -> list[Path]:
    """Write each figure as SVG, as in the page, and as PNG.

    Raises:
        EntropyForkError: ``folder`` cannot be written to.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure in figures:
            for kind, image in (("svg", figure.light), ("png", _saved(figure, "light", "png", dpi=150))):
                file = folder / f"{figure.name}.{kind}"
                temporary = file.with_name(f".{file.name}")
                temporary.write_bytes(image)
                written.append(temporary.replace(file))
    except OSError as error:
        raise EntropyForkError(f"--figures {folder} cannot be written to: {error}") from error
    return written


def file_name(*words: str) -> str:
    """A name for the files of a figure, made from names of runs and metrics."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def step_axis(plot: Any) -> None:
    """Mark whole steps only on the axis of the training steps."""
    from matplotlib.ticker import MaxNLocator

    plot.set_xlabel("step")
    plot.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def axes(title: str, width: float = 5.2, height: float = 3.2) -> tuple[Figure, Any]:
    """A figure with one plot, small enough to be read on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(left=0.16, right=0.98, bottom=0.16, top=0.9)  # faster than a layout that matplotlib computes
    plot = figure.subplots()
    plot.set_title(title, loc="left", fontsize=12)
    return figure, plot
