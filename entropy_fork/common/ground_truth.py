"""Which ground truths an answer can be compared with. One rule, for data that are prepared and for data of a run.

Missing values have many spellings: a table program writes ``nan``, Python ``None``, JSON ``null``, a spreadsheet
``#N/A``. No answer can be right against one of these, and the run would not say so: every reward is 0.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

_MISSING = {"none", "null", "n/a", "#n/a", "<na>"}
_NOT_FINITE = {"nan", "inf", "infinity"}

_PYTHON_MAPPING = re.compile(r"\{\s*'[^']*'\s*:")

#: how much of a value a message shows
_SHOWN = 80


class Fault(NamedTuple):
    """Why a ground truth cannot be used."""

    #: one word, for lists and counts
    reason: str
    #: what is said of the row: "has …"
    says: str


def accepted_answers(truth: str) -> list[str]:
    """The answers that a text accepts. A JSON list of texts means any of them; any other text means itself.

    ``["1", "2"]`` is such a list. ``[1, 2]`` is an expression, the interval, because LaTeX has no quotes.
    """
    listed = _json(truth) if truth.lstrip().startswith("[") and '"' in truth else None
    if not isinstance(listed, list) or not any(isinstance(each, str) for each in listed):
        return [truth]
    if not all(isinstance(each, (str, int, float)) and not isinstance(each, bool) for each in listed):
        return [truth]
    return [str(each) for each in listed]


def fault_of(truth: Any) -> Fault | None:
    """Say what is wrong with a ground truth. Return None if an answer can be compared with it.

    A ground truth is an expression, a finite number, or a list of these of which any is right.

    Args:
        truth: a value as parquet, JSON or CSV holds it. What NumPy holds is taken as Python's.
    """
    value = truth.tolist() if hasattr(truth, "tolist") else truth
    if value is None:
        return Fault("no_answer", "has no reward_model.ground_truth")
    if isinstance(value, str):
        return _fault_of_text(value)
    if isinstance(value, dict):
        return Fault("answer_is_a_mapping", f"has a mapping as its ground truth: {_shown(value)}")
    if isinstance(value, (list, tuple)):
        if not value:
            return Fault("no_answer", "has an empty list as its ground truth")
        if any(isinstance(each, (list, tuple)) for each in value):
            return Fault("answer_of_another_kind", f"has a list of lists as its ground truth: {_shown(value)}")
        return next((fault for each in value if (fault := fault_of(each))), None)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return None if math.isfinite(value) else Fault("answer_not_finite", f"has the ground truth {value}")
    return Fault("answer_of_another_kind", f"has a ground truth of the type {type(value).__name__}: {_shown(value)}")


def _fault_of_text(text: str) -> Fault | None:
    word = text.strip().lower()
    if not word:
        return Fault("no_answer", "has no reward_model.ground_truth")
    if word in _MISSING:
        return Fault("no_answer", f"has the ground truth {text.strip()!r}, which stands for a missing one")
    if word.lstrip("+-") in _NOT_FINITE:
        return Fault("answer_not_finite", f"has the ground truth {text.strip()!r}")
    if word[0] == "[" and word[1:].lstrip()[:1] == "'":
        return Fault(
            "answer_of_another_kind",
            f"has a list in Python's notation as its ground truth: {_shown(text)}. Use double quotes, as JSON does",
        )
    if _PYTHON_MAPPING.match(word):
        return Fault("answer_is_a_mapping", f"has a mapping as its ground truth: {_shown(text)}")
    if word[0] in "[{":
        value = _json(text)
        if isinstance(value, dict) and value:
            return Fault("answer_is_a_mapping", f"has a mapping as its ground truth: {_shown(text)}")
        if value in ([], {}):
            return Fault("no_answer", f"has the empty ground truth {text.strip()}")
        if accepted_answers(text) != [text]:
            return fault_of(accepted_answers(text))
    return None


def _json(text: str) -> Any:
    """What a text is as JSON; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
