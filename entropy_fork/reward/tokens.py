r"""From spelled text to tokens: numbers, letters, commands, and the words of a ``\text``, each word a token."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence

from entropy_fork.reward.words import (
    ANSWER_WORDS,
    COMMAND_WORDS,
    CURRENCY_WORDS,
    FUNCTION_WORDS,
    ORDINAL_ENDS,
    UNIT_WORDS,
)

Tokens = Sequence[str]

OPEN, CLOSE = (
    {"{", "(", "[", "\\{", "\\langle", "\\lfloor", "\\lceil"},
    {"}", ")", "]", "\\}", "\\rangle", "\\rfloor", "\\rceil"},
)

_TOKEN = re.compile(
    r"\\(?:begin|end)\s*\{[a-zA-Z]+\*?\}|\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\.\d+|[a-zA-Z]+|\s+|[^\x00-\x7f]+|.", re.DOTALL
)
_ASCII = re.compile(r"[a-zA-Z]+")
_VOWEL = re.compile(r"[aeiou]", re.I)


class Unreadable(ValueError):
    """A text that is no expression. Its words can still be compared."""


def tokens_of(text: str) -> list[str]:
    r"""Tokens of a spelled text. A word is the token ``\text{word}``; other letters are one token each.

    >>> tokens_of(r"2\text{ ft}")
    ['2', '\\text{ft}']
    """
    return strip(_tokens(text, inside_text=False))


def _tokens(text: str, inside_text: bool) -> list[str]:
    found: list[str] = []
    raw = _TOKEN.findall(text)
    at = 0
    while at < len(raw):
        token = raw[at]
        at += 1
        if token == "\\text":
            end = _closing(raw, at)
            inner = "".join(raw[at + 1 : end])
            found += [" ", *_tokens(inner, inside_text=True), " "]
            at = end + 1
        elif token.startswith(("\\begin", "\\end")):
            found.append(re.sub(r"\s", "", token))
        elif token == "\\operatorname":
            end = _closing(raw, at)
            found.append(f"\\text{{{''.join(raw[at + 1 : end]).strip()}}}")
            at = end + 1
        elif token.isspace():
            found.append(" ")
        elif _ASCII.fullmatch(token):
            found += _letters(token, found, inside_text, raw[at] if at < len(raw) else "")
        elif not token.isascii() and token.isalnum():
            found.append(f"\\text{{{token}}}")
        else:
            found.append(token)
    return [token for place, token in enumerate(found) if token != " " or found[place - 1 : place] != [" "]]


def _closing(raw: list[str], at: int) -> int:
    """Where the group that begins at ``at`` ends."""
    depth = 0
    for place in range(at, len(raw)):
        depth += (raw[place] == "{") - (raw[place] == "}")
        if depth == 0:
            return place
    raise Unreadable("a brace is not closed")


def _letters(run: str, before: list[str], inside_text: bool, after: str) -> list[str]:
    """A run of letters: a word, a command without its backslash, or letters that stand for numbers."""
    if inside_text:
        return ["\\" + COMMAND_WORDS[run], " "] if run in FUNCTION_WORDS else [f"\\text{{{run}}}"]
    if run.lower() in CURRENCY_WORDS:
        return [f"\\text{{{run}}}"]
    behind_number = bool(strip(before)) and strip(before)[-1][-1:].isdigit() and before[-1] not in "^_"
    if run in COMMAND_WORDS and not (behind_number and run in UNIT_WORDS and not after):
        return ["\\" + COMMAND_WORDS[run], " "]
    if len(run) > 1 and behind_number and run in UNIT_WORDS and (before[-1] == " " or after in ("", " ", "^", "/")):
        return [f"\\text{{{run}}}"]
    if run in ORDINAL_ENDS and before[-2:] == ["^", "{"] and before[-3:-2] and before[-3][-1].isdigit():
        return [f"\\text{{{run}}}"]
    if is_word(run) and (len(run) > 2 or (before[-1:] in ([], [" "]) and (not after or after.isspace()))):
        return [f"\\text{{{run}}}"]
    for name, command in COMMAND_WORDS.items():
        if len(name) > 1 and run.startswith(name) and len(run) - len(name) == 1:
            return ["\\" + command, " ", run[-1]]
    return list(run)


def is_word(run: str) -> bool:
    """Whether letters without a ``\\text`` make a word. ``even`` does, ``xy`` and ``abc`` are products.

    >>> [is_word(run) for run in ("even", "no", "Tuesday", "mgh", "xy", "abc")]
    [True, True, True, False, False, False]
    """
    lower = run.lower()
    if lower in ANSWER_WORDS:
        return True
    in_order = sorted(lower) == [chr(ord(min(lower)) + step) for step in range(len(lower))]
    return len(run) >= 3 and not run.isupper() and _VOWEL.search(run) is not None and not in_order


def strip(tokens: Tokens) -> list[str]:
    """Without spaces at the ends."""
    begin, end = 0, len(tokens)
    while begin < end and tokens[begin] in (" ", "\\quad"):
        begin += 1
    while end > begin and tokens[end - 1] in (" ", "\\quad"):
        end -= 1
    return list(tokens[begin:end])


def without_spaces(tokens: Tokens) -> list[str]:
    """Without any space."""
    return [token for token in tokens if token not in (" ", "\\quad")]


def depth_change(token: str) -> int:
    """1 for an opening bracket, -1 for a closing one, else 0. ``(1,3]`` closes as ``(1,3)`` does."""
    if token in OPEN or token.startswith("\\begin"):
        return 1
    return -(token in CLOSE or token.startswith("\\end"))


def deepest(tokens: Tokens) -> int:
    """How many brackets are open at once."""
    return max(itertools.accumulate(map(depth_change, tokens)), default=0)


def split(tokens: Tokens, at: Collection[str]) -> tuple[list[list[str]], list[str]]:
    """The parts between the tokens ``at`` that stand outside of brackets, and those tokens.

    Raises:
        Unreadable: a bracket is not opened or not closed.
    """
    parts: list[list[str]] = [[]]
    found: list[str] = []
    depth = 0
    for token in tokens:
        depth += depth_change(token)
        if depth < 0:
            raise Unreadable("a bracket is not opened")
        if depth == 0 and token in at:
            parts.append([])
            found.append(token)
        else:
            parts[-1].append(token)
    if depth:
        raise Unreadable("a bracket is not closed")
    return [strip(part) for part in parts], found


def group_end(tokens: Tokens, at: int) -> int:
    """The place of the bracket that closes the one at ``at``.

    Raises:
        Unreadable: no bracket closes it.
    """
    depth = 0
    for place in range(at, len(tokens)):
        depth += depth_change(tokens[place])
        if depth == 0:
            return place
    raise Unreadable("a bracket is not closed")


def in_one_piece(tokens: Tokens) -> str:
    """Tokens as text without spaces, except between two numbers and between two words: ``10 20`` is not ``1020``."""
    made = ""
    for token in without_spaces(tokens):
        word = word_of(token) or token
        apart = (made[-1:].isdigit() and word[0].isdigit()) or (made[-1:].isalpha() and token.startswith("\\text{"))
        made += " " * apart + word
    return made


def word_of(token: str) -> str | None:
    r"""The word of a token ``\text{word}``, in lower case; None for another token."""
    return token[6:-1].lower() if token.startswith("\\text{") else None
