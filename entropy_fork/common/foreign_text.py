"""Text that a model or a data set wrote, where a reader takes more than text: terminal, spreadsheet, Markdown, figure.

A page of HTML is the matter of ``report/page.py``, and the reward that of ``reward/judge.py``. See
docs/reference/security.md.
"""

from __future__ import annotations

import re
import unicodedata
from contextlib import suppress
from typing import Any

from rich.cells import cell_len

#: what a spreadsheet takes for the beginning of a formula, the wide forms of Chinese and Japanese input among them
_FORMULA = tuple("=+-@\t＝＋－＠")

#: what would end a cell of a table, or become a link, an image, HTML or code
_MARKDOWN = re.compile(r"[\\`|<>\[\]&!]")


def visible(text: str, kept: str = "") -> str:
    """Each character that cannot be seen by itself as its number: ``\\x1b``, which begins a terminal's commands.

    So are accents that combine with the letter before them, zero-width characters, variation selectors and skin tones:
    alone they vanish from a table, and behind a letter two texts would look like one.

    Args:
        text: from a model, a data set or a file's name.
        kept: characters that are left as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character if _is_seen(character) or character in kept else character.encode("unicode_escape").decode()
        for character in text
    )


def _is_seen(character: str) -> bool:
    """Whether it has a place of its own on a terminal."""
    is_mark = unicodedata.category(character).startswith("M")
    return character.isprintable() and not is_mark and cell_len(character) > 0


def spreadsheet_cell(value: Any) -> Any:
    """A value for CSV: a text that a spreadsheet would compute or run gets an apostrophe before it.

    Numbers, in whatever form, and single signs stay as they are. A carriage return, which csv does not quote before
    Python 3.13 and behind which a new row would begin, is written as ``\\r``; a null, which it cannot read, likewise.
    """
    if not isinstance(value, str):
        return value
    value = value.replace("\r", r"\r").replace("\0", r"\x00")
    if len(value) < 2 or not value.startswith(_FORMULA):
        return value
    with suppress(ValueError):
        float(value)
        return value
    return "'" + value


def markdown_cell(text: str) -> str:
    """A cell of a Markdown table that shows this very text."""
    return _MARKDOWN.sub(r"\\\g<0>", visible(text))


def figure_label(text: str) -> str:
    """matplotlib reads formulas between dollar signs, and hides labels that begin with an underscore."""
    return "\u200b" * text.startswith("_") + visible(text).replace("$", r"\$")
