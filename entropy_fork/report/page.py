"""Make the HTML file: data, figures and tables go into ``template.html``, and everything it needs is inside.

The page runs one script. A Content-Security-Policy names it by its hash, and allows no other script and no connection.
Text that a model wrote reaches the page in two ways: through jinja2, which escapes it, and as JSON in a data block, in
which ``<``, ``>`` and ``&`` are escaped, so that no text can end the block. The script shows it as text nodes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_fork import __version__
from entropy_fork.analysis import plots
from entropy_fork.analysis.compare import compare
from entropy_fork.analysis.results import check_installed, comparison_tables, summary_tables
from entropy_fork.analysis.summary import MIN_COUNT, NUM_TOKENS, summarise
from entropy_fork.analysis.token_scores import named_scores
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.installing import why_missing
from entropy_fork.common.output_folder import write_whole
from entropy_fork.core.scores import Score
from entropy_fork.report import curves, packed_answers, steps
from entropy_fork.report.figures import PageFigure, data_uri, file_name, write_files
from entropy_fork.tokens.store import read_manifest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PageTable:
    """Rows of text under a header. A long table scrolls in a box of its own."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    @property
    def long(self) -> bool:
        """Whether it scrolls in a box of its own."""
        return len(self.rows) > 12


@dataclass(frozen=True)
class Section:
    """A heading with the text, figures and tables under it."""

    id: str
    title: str
    text: str = ""
    figures: list[PageFigure] = field(default_factory=list)
    tables: list[PageTable] = field(default_factory=list)


@dataclass(frozen=True)
class ReportSettings:
    """What goes into a report.

    Attributes:
        output: the file to write.
        tokens: folders of tokens, see ``entropy_fork/tokens/store.py``.
        runs: name and folder of tensorboard files, for each training run.
        compare: folders of the same tokens, measured with checkpoints in the order of training: none, or at least two.
        top_ratio: ρ of the comparison.
        min_count: how often a token must have been seen to be in the tables of highest and lowest mean entropy.
        figures: a folder to which the figures are written as SVG and PNG as well; None for none.
        answers: the page shows at most this many answers of each folder. The figures use all answers.
        title: title of the page.
        scores: scores that the user asked for: built-in names, or import paths of a user's own. The first one is chosen
            when the page is opened.
    """

    output: Path
    tokens: Sequence[Path] = ()
    runs: Sequence[tuple[str, Path]] = ()
    compare: Sequence[Path] = ()
    top_ratio: float = 0.2
    min_count: int = MIN_COUNT
    figures: Path | None = None
    answers: int = 200
    title: str = "Forking tokens"
    scores: Sequence[str] = ()


def write(settings: ReportSettings, note: Callable[[str], None] = lambda _: None) -> Path:
    """Make the report.

    Args:
        settings: what goes into it, and where it is written.
        note: called with what is being done.

    Returns:
        The file.

    Raises:
        EntropyForkError: there is nothing to show, an input cannot be read, the output cannot be written, or a library
            is missing.
    """
    if not settings.tokens and not settings.runs and not settings.compare:
        raise EntropyForkError(
            "there is nothing to report: write --tokens FOLDER (of 'entropy-fork analyze', or of a run with "
            "entropy_fork.dump_every), --run NAME=DIR (a folder of tensorboard files) or --compare FOLDER twice"
        )
    if settings.scores and not settings.tokens:
        raise EntropyForkError("--score chooses what the tokens are ranked by: write --tokens FOLDER, or no --score")
    check_installed()
    if settings.runs and find_spec("tensorboard") is None:
        raise EntropyForkError(why_missing(["tensorboard"], "analysis"))
    scores = named_scores(settings.scores)
    runs = {}
    for name, (_, folder) in zip(_distinct([name for name, _ in settings.runs]), settings.runs, strict=True):
        note(f"reading the curves of {name}")
        runs[name] = curves.read_run(folder)
    names = _distinct([folder.resolve().name for folder in settings.tokens])
    folders = []
    for name, folder in zip(names, settings.tokens, strict=True):
        note(f"reading the tokens of {name}")
        answers = packed_answers.chosen_answers(folder, settings.answers)
        folders.append(packed_answers.Folder(name, answers, read_manifest(folder)))
    data = packed_answers.packed_folders(folders, scores) if folders else None
    sections = []
    slugs = _distinct([file_name(name) or "folder" for name in names])  # for file names, and for links in the page
    for name, slug, folder in zip(names, map(file_name, slugs), settings.tokens, strict=True):
        note(f"summarising the tokens of {name}")
        suffix = "" if len(folders) == 1 else f": {name}"
        sections.append(_entropy_section(slug, folder, suffix, settings.min_count, scores))
        sections += _steps_section(slug, folder, suffix)
    if settings.compare:
        note("comparing checkpoints")
        sections.append(_comparison_section(settings.compare, settings.top_ratio))
    if runs:
        sections.append(_curves_section(runs))
    note("drawing")
    page = render(settings.title, data, sections)
    if settings.figures is not None:
        write_files([figure for section in sections for figure in section.figures], settings.figures)
    try:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(settings.output, page)
    except OSError as error:
        raise EntropyForkError(f"{settings.output} cannot be written: {error}") from error
    return settings.output


#: captions of the figures of ``analysis/plots.py``
CAPTIONS = {
    "entropy_histogram": "tokens by entropy, on a logarithmic scale",
    "entropy_by_position": "mean entropy and share of forks along the answer",
    "entropy_by_kind": "mean entropy by part of the answer, and by kind of text",
    "words_highest": "tokens of highest mean entropy; the highest are the largest",
    "words_lowest": "tokens of lowest mean entropy; the lowest are the largest",
    "overlap": "how many of a checkpoint's top positions are also those of the base, and of the final model",
    "entropy_change": "mean change of the entropy against the base, per 5% of the base's tokens",
    "percentile_evolution": "percentiles of the entropy over the checkpoints",
}


def _entropy_section(slug: str, folder: Path, suffix: str, min_count: int, scores: Sequence[Score]) -> Section:
    summary = summarise(folder, min_count, scores=scores)
    tables = [PageTable(table.header, table.rows, title) for title, table in summary_tables(summary, NUM_TOKENS)]
    return Section(f"entropy-{slug}", f"Entropy{suffix}", "", _page_figures(plots.of_summary(summary), slug), tables)


def _comparison_section(folders: Sequence[Path], top_ratio: float) -> Section:
    comparison = compare(folders, top_ratio)
    tables = [PageTable(table.header, table.rows, title) for title, table in comparison_tables(comparison)]
    return Section(
        "checkpoints", "Checkpoints", "", _page_figures(plots.of_comparison(comparison), "checkpoints"), tables
    )


def _page_figures(figures: dict[str, Figure], slug: str) -> list[PageFigure]:
    """Figures of the analyses, at the size of the page's other figures: a legend must be readable on a phone."""
    for figure in figures.values():
        figure.set_size_inches(5.2, 3.2)
    return [
        PageFigure(file_name(key, slug), CAPTIONS[key], partial(_same, one), both=True) for key, one in figures.items()
    ]


def _same(figure: Figure) -> Figure:
    return figure


def _steps_section(slug: str, folder: Path, suffix: str) -> list[Section]:
    found = steps.read_steps(folder)
    if found is None:
        return []
    tables = []
    if found.moved:
        header = ["token", "seen early", "seen late", "kept early", "kept late"]
        rows = [
            [plots.shown(piece), f"{early:,}", f"{late:,}", f"{before:.1%}", f"{after:.1%}"]
            for piece, early, late, before, after in found.moved
        ]
        tables.append(
            PageTable(
                header, rows, "Tokens whose kept share changed most from the first half of the steps to the second"
            )
        )
    text = f"{len(found.steps)} dumped steps, {found.steps[0]} to {found.steps[-1]}."
    return [Section(f"steps-{slug}", f"Forks over training{suffix}", text, steps.page_figures(slug, found), tables)]


def _curves_section(runs: dict[str, curves.Run]) -> Section:
    header, rows = curves.last_values(runs)
    return Section("curves", "Training curves", "", curves.page_figures(runs), [PageTable(header, rows)])


def render(title: str, data: dict[str, Any] | None, sections: Sequence[Section]) -> str:
    """The page as text.

    Args:
        title: title of the page.
        data: what :func:`entropy_fork.report.packed_answers.packed_folders` returns; None without tokens.
        sections: what is shown below the tokens.

    Raises:
        EntropyForkError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise EntropyForkError(why_missing([error.name or "jinja2"], "analysis")) from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    script, sheet = _part("page.js"), _part("page.css")
    return environment.from_string(_part("template.html")).render(
        title=title,
        version=__version__,
        sections=sections,
        answers=None if data is None else len(data["answers"]),
        data=None if data is None else _safe_json(data),
        script=script,
        sheet=sheet,
        script_hash=_hash(script),
        sheet_hash=_hash(sheet),
        uri=data_uri,
    )


def _part(name: str) -> str:
    return (files("entropy_fork.report") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _safe_json(data: dict[str, Any]) -> str:
    """JSON for a ``<script>`` block: nothing in it can end the block or begin a comment."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number behind a name that came before."""
    found: list[str] = []
    for name in names:
        same = sum(each == name or each.startswith(f"{name} (") for each in found)
        found.append(f"{name} ({same + 1})" if same else name)
    return found
