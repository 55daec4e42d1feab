"""Find out what each token of an answer belongs to: thinking, final answer, formula, code or other text.

The kinds are found on the characters of the text, in one pass over its delimiters. (A hostile text of nothing but
``\\(`` takes no longer than another one.) Each token then gets the kind of its characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from entropy_fork.reward import last_boxed_span

#: kinds of text; if a character is of several kinds, the later one counts
KINDS = ("other text", "formula", "code", "final answer")
_OTHER, _FORMULA, _CODE, _FINAL = range(len(KINDS))

#: parts of an answer: thinking ends with ``</think>``, and the rest is the answer
SECTIONS = ("answer", "thinking")

_DELIMITER = re.compile(r"\\[\\`$()\[\]]|```|`|\$\$|\$|\n(?:[ \t]*\n)?")
_CLOSING = {"\\(": "\\)", "\\[": "\\]", "$": "$", "$$": "$$", "`": "`", "```": "```"}


def kinds_of_tokens(pieces: Sequence[str]) -> np.ndarray:
    """The kind of each token, as an index of :data:`KINDS`: the highest kind among its characters.

    - final answer: inside the last ``\\boxed{}``
    - code: between fences of three backticks (to the end of the text if the fence is never closed), or between
      backticks on one line
    - formula: ``$…$`` on one line (neither the first nor the last character inside is a space, and no digit follows, so
      that prices are not formulas), ``$$…$$``, ``\\(…\\)`` and ``\\[…\\]`` without a blank line in them

    Delimiters belong to what they delimit, except those of the box.

    Args:
        pieces: the tokens of one answer as text, see :func:`entropy_fork.tokens.store.token_pieces`.

    Returns:
        uint8 of shape (tokens,).
    """
    text = "".join(pieces)
    kinds = np.zeros(len(text), dtype=np.uint8)
    _mark_formulas_and_code(text, kinds)
    if (box := last_boxed_span(text)) is not None:
        kinds[slice(*box)] = _FINAL
    return _highest_per_token(kinds, pieces)


def sections_of_tokens(pieces: Sequence[str], prompt: str = "") -> np.ndarray:
    """Whether each token is thinking, as an index of :data:`SECTIONS`.

    Thinking ends with the first ``</think>``. An answer without ``</think>`` is all thinking if ``<think>`` is at the
    beginning of the answer or at the end of the prompt, and has no thinking otherwise.

    Returns:
        uint8 of shape (tokens,).
    """
    text = "".join(pieces)
    found = text.find("</think>")
    if found >= 0:
        end = found + len("</think>")
    else:
        end = len(text) if text.lstrip().startswith("<think>") or prompt.rstrip().endswith("<think>") else 0
    starts, _ = _bounds(pieces)
    return (starts < end).astype(np.uint8)


def _bounds(pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))
    ends = lengths.cumsum()
    return ends - lengths, ends


def _highest_per_token(kinds: np.ndarray, pieces: Sequence[str]) -> np.ndarray:
    starts, ends = _bounds(pieces)
    found = np.zeros(len(pieces), dtype=np.uint8)
    has_text = ends > starts  # a token without text would get the kind of its neighbour
    if has_text.any():
        found[has_text] = np.maximum.reduceat(kinds, starts[has_text])
    return found


def _mark_formulas_and_code(text: str, kinds: np.ndarray) -> None:
    opened, start = "", 0
    for match in _DELIMITER.finditer(text):
        mark, place = match[0], match.start()
        if opened == "```":
            if mark == "```":
                kinds[start : match.end()] = _CODE
                opened = ""
        elif opened == "`":
            if mark == "`":
                kinds[start : match.end()] = _CODE
            if mark in ("`", "```") or mark[0] == "\n":
                opened = ""
                if mark == "```":
                    opened, start = mark, place
        elif mark == "```" or (mark == "`" and not opened):
            opened, start = mark, place
        elif mark[0] == "\n":
            if opened == "$" or len(mark) > 1:
                opened = ""
        elif opened == "$" and mark[0] == "$":
            if not text[place - 1].isspace() and not text[place + 1 : place + 2].isdecimal():
                kinds[start : place + 1] = _FORMULA
                opened = ""
                if mark == "$$" and _opens_inline(text, place + 1):
                    opened, start = "$", place + 1
            elif mark == "$" and _opens_inline(text, place):
                start = place
        elif opened and mark == _CLOSING[opened]:
            kinds[start : match.end()] = _FORMULA
            opened = ""
        elif mark in ("\\(", "\\[") or (not opened and (mark == "$$" or (mark == "$" and _opens_inline(text, place)))):
            # of two \( or \[ the later one counts: LaTeX allows only that one to be closed
            opened, start = mark, place
    if opened == "```":
        kinds[start:] = _CODE


def _opens_inline(text: str, place: int) -> bool:
    following = text[place + 1 : place + 2]
    return following != "" and not following.isspace()
