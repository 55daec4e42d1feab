"""Text that a model or a data set wrote, made harmless for a terminal, a spreadsheet, Markdown and a figure.

Each of these gives some characters a meaning of their own. ``report/page.py`` does the same for HTML, and
``reward/judge.py`` for the comparison of answers. See docs/reference/security.md.
"""

from __future__ import annotations

import re
import unicodedata
from contextlib import suppress
from typing import Any

from rich.cells import cell_len

#: what a spreadsheet takes for the beginning of a formula, in the wide forms of Chinese and Japanese input as well
_FORMULA = tuple("=+-@\t＝＋－＠")

#: what ends a cell of a table, or begins a link, an image, HTML or code
_MARKDOWN = re.compile(r"[\\`|<>\[\]&!]")


def visible(text: str, kept: str = "") -> str:
    """Write each character that cannot be seen by itself as its number. ``\\x1b`` begins terminal commands.

    This includes accents that combine with the letter before them, zero-width characters, variation selectors and skin
    tones: alone they vanish from a table, and behind a letter they make two texts look the same.

    Args:
        text: text from a model, a data set or the name of a file.
        kept: characters that are left as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character if _is_seen(character) or character in kept else character.encode("unicode_escape").decode()
        for character in text
    )


def _is_seen(character: str) -> bool:
    """Whether the character takes a place of its own on a terminal."""
    is_mark = unicodedata.category(character).startswith("M")
    return character.isprintable() and not is_mark and cell_len(character) > 0


def spreadsheet_cell(value: Any) -> Any:
    """A value for CSV. A text that a spreadsheet would take for a formula gets an apostrophe before it.

    Numbers in any form, and single signs, stay as they are. A carriage return is written as ``\\r``, because csv does
    not quote it before Python 3.13 and a new row would begin behind it. A null, which csv cannot read, is written as
    ``\\x00``.
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
    """A cell of a Markdown table that shows the text as it is."""
    return _MARKDOWN.sub(r"\\\g<0>", visible(text))


def figure_label(text: str) -> str:
    """A label for matplotlib, which reads formulas between dollar signs, and hides labels with a leading underscore."""
    return "\u200b" * text.startswith("_") + visible(text).replace("$", r"\$")
