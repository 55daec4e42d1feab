"""The HTML file: data, figures and tables into ``template.html``, with everything that it needs inside.

The page runs one script, named by its hash in a Content-Security-Policy that allows nothing else and no connection.
What a model wrote reaches it in two ways: through jinja2, which escapes it, and as JSON in a data block, in which
``<``, ``>`` and ``&`` are written as escapes, so that no text can end the block. The script shows it as text nodes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from entropy_fork import __version__
from entropy_fork.report import answers as packing
from entropy_fork.report import curves, steps
from entropy_fork.report.figures import Drawing, data_uri, write_files
from entropy_fork.verl.errors import EntropyForkError


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; ``long`` ones scroll in a box of their own."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    @property
    def long(self) -> bool:
        return len(self.rows) > 12


@dataclass(frozen=True)
class Section:
    """A heading with what belongs under it."""

    id: str
    title: str
    text: str = ""
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """What goes into a report.

    Attributes:
        output: the file to write.
        tokens: folders of ``entropy_fork/analysis/table.py``.
        runs: name and folder of tensorboard files of each training run.
        figures: a folder for the figures as SVG and PNG; None for none.
        answers: at most so many of each folder can be looked at; all of them are in the figures.
        title: of the page.
    """

    output: Path
    tokens: Sequence[Path] = ()
    runs: Sequence[tuple[str, Path]] = ()
    figures: Path | None = None
    answers: int = 200
    title: str = "Forking tokens"


def write(settings: Settings, note: Callable[[str], None] = lambda _: None) -> Path:
    """Make the report.

    Args:
        note: is told what is being done.

    Returns:
        The file.

    Raises:
        EntropyForkError: nothing to show, input that cannot be read, output that cannot be written; or a library is
            missing.
    """
    if not settings.tokens and not settings.runs:
        raise EntropyForkError(
            "nothing to report: give --tokens FOLDER (of 'entropy-fork analyze', or of a run with "
            "entropy_fork.dump_every) or --run NAME=DIR (a folder of tensorboard files)"
        )
    names = _distinct([name for name, _ in settings.runs])
    runs = {}
    for name, (_, folder) in zip(names, settings.runs, strict=True):
        note(f"reading the curves of {name}")
        runs[name] = curves.read_run(folder)
    folders = []
    for name, folder in zip(_distinct([path.resolve().name for path in settings.tokens]), settings.tokens, strict=True):
        note(f"reading the tokens of {name}")
        folders.append((name, packing.chosen_answers(folder, settings.answers)))
    sections = []
    for (name, _), folder in zip(folders, settings.tokens, strict=True):
        note(f"going over the steps of {name}")
        sections += _steps_section(name, folder, alone=len(folders) == 1)
    if runs:
        sections.append(_curves_section(runs))
    note("drawing")
    page = render(settings.title, packing.packed_folders(folders) if folders else None, sections)
    if settings.figures is not None:
        write_files([drawing for section in sections for drawing in section.drawings], settings.figures)
    _write_whole(settings.output, page)
    return settings.output


def _steps_section(name: str, folder: Path, alone: bool) -> list[Section]:
    found = steps.read_steps(folder)
    if found is None:
        return []
    tables = []
    if found.moved:
        header = ["token", "seen early", "seen late", "kept early", "kept late"]
        rows = [
            [visible(piece), f"{early:,}", f"{late:,}", f"{before:.1%}", f"{after:.1%}"]
            for piece, early, late, before, after in found.moved
        ]
        tables.append(
            Table(header, rows, "Tokens whose kept share changed most from the first half of the steps to the second")
        )
    title = "Forks over training" + ("" if alone else f": {name}")
    text = f"{len(found.steps)} dumped steps, {found.steps[0]} to {found.steps[-1]}."
    return [Section(f"steps-{_slug(name)}", title, text, steps.drawings(name, found), tables)]


def _curves_section(runs: dict[str, curves.Run]) -> Section:
    header, rows = curves.last_values(runs)
    return Section("curves", "Training curves", "", curves.drawings(runs), [Table(header, rows)])


def visible(text: str) -> str:
    """A token for a table: what cannot be seen is named, as ``page.js`` does it."""
    return "".join(_named(character) for character in text)


#: characters that change the order or the look of what stands beside them, or that cannot be seen
_INVISIBLE = {0x061C, 0x200E, 0x200F, 0xFEFF, *range(0x200B, 0x200E), *range(0x2028, 0x202F), *range(0x2060, 0x2070)}


def _named(character: str) -> str:
    code = ord(character)
    if character == "\n":
        return "↵"
    if character == " ":
        return "␣"
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if 0x80 <= code < 0xA0 or code in _INVISIBLE:
        return f"‹U+{code:04X}›"
    return character


def render(title: str, data: dict[str, Any] | None, sections: Sequence[Section]) -> str:
    """The page as text.

    Args:
        title: of the page.
        data: of :func:`entropy_fork.report.answers.packed_folders`; None where there are no tokens.
        sections: below the token view.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise EntropyForkError(f"the report needs {error.name}: pip install 'entropy-fork[analysis]'") from error
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
    """JSON that can stand in a ``<script>`` block: nothing in it can end the block or begin a comment."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _write_whole(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise EntropyForkError(f"{file} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _distinct(names: Sequence[str]) -> list[str]:
    """Names, with a number behind those that were there before."""
    found: list[str] = []
    for name in names:
        same = sum(each == name or each.startswith(f"{name} (") for each in found)
        found.append(f"{name} ({same + 1})" if same else name)
    return found


def _slug(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name.lower())
