"""The reward for questions that reasoning-gym generated: its own ``score_answer``, within limits.

``entropy-fork data prepare reasoning_gym`` writes rows whose ``data_source`` is ``reasoning_gym/TASK``, and
:func:`entropy_fork.reward.compute_score` sends such rows here. So a run and ``entropy-fork evaluate`` need no other
reward function, and one file may hold rows of both kinds.

The last box of the answer is scored in a child process, as in :mod:`entropy_fork.reward.judge`, with a limit on time
and memory. Some of reasoning-gym's scorers run what a model wrote as Python (``eval``, or sympy's ``parse_expr``). In
the child only expressions of numbers, lists and a few functions become code, see :data:`_HARMLESS`. Any other answer
that would be run is stopped, and counts as wrong.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from copy import deepcopy
from functools import cache
from typing import Any

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.ground_truth import accepted_answers, fault_of
from entropy_fork.common.installing import why_missing
from entropy_fork.reward import judge
from entropy_fork.reward.judge import Verdict, judges

#: how the data sources of such rows begin; the name of the task follows
PREFIX = "reasoning_gym/"

#: how a ground truth begins that holds more than the right answer; JSON follows
_WHOLE = "reasoning_gym {"

#: the extra that has reasoning-gym
EXTRA = "reasoning-gym"


# -------------------------------------------------------------------------------------------------- the ground truths


def ground_truth_of(dataset: Any, entry: dict[str, Any], options: dict[str, Any]) -> str | None:
    """What a row holds as its ground truth: the right answer, and more only where the task's scorer reads more.

    Args:
        dataset: of reasoning-gym.
        entry: one of its entries.
        options: the difficulty that the dataset was made with.

    Returns:
        The right answer as it is, or behind a mark a mapping as JSON. None if there is no right answer, or if JSON
        cannot hold what the scorer reads.
    """
    answer = entry["answer"]
    if not isinstance(answer, str):
        return None
    kind: Any = type(dataset)
    reads_entry, reads_question, reads_options = _reads(kind)
    plain = fault_of(answer) is None and accepted_answers(answer) == [answer] and not answer.startswith(_WHOLE)
    if plain and not reads_entry and not reads_options:
        return answer
    whole: dict[str, Any] = {"answer": answer}
    if reads_entry:
        whole |= {name: value for name, value in entry.items() if name != "question" or reads_question}
    if reads_options:
        whole["options"] = options
    try:
        return f"{_WHOLE[:-1]}{json.dumps(whole, ensure_ascii=False)}"
    except (TypeError, ValueError):
        return None


@cache
def _reads(dataset: Any) -> tuple[bool, bool, bool]:
    """What a task's scorer reads beside the right answer: the entry, the question in it, and the options."""
    import inspect

    from reasoning_gym.dataset import ProceduralDataset

    scorer = dataset.score_answer
    if scorer is ProceduralDataset.score_answer:
        return False, False, False
    try:
        source = inspect.getsource(scorer)
    except (OSError, TypeError):
        return True, True, True
    body = re.sub(r'"""[\s\S]*?"""|^.*?->.*?:\n', "", source, count=2)
    rest = re.sub(r"""entry\[["']answer["']\]""", "", body)
    return "entry" in rest, "question" in rest, "self.config" in body


def _whole(truth: str) -> dict[str, Any]:
    """The entry in a ground truth, and its options."""
    if truth.startswith(_WHOLE):
        try:
            whole = json.loads(truth[len(_WHOLE) - 1 :])
        except ValueError:
            raise EntropyForkError(f"the ground truth {truth[:80]!r} of a row of reasoning_gym is not whole") from None
        return {"question": "", "metadata": {}, **whole}
    return {"question": "", "metadata": {}, "answer": truth}


# ---------------------------------------------------------------------------------------------------------- the child

#: the names that the expressions below may hold; a letter by itself is a variable
_NAMES = (
    "Integer|Float|Rational|Symbol|sin|cos|tan|asin|acos|atan|sinh|cosh|tanh|exp|log|sqrt|Abs|pi|True|False|[A-Za-z]"
)

#: Text that may become code: numbers, lists, signs and calls of sympy's functions. There is no attribute, no assignment
#: and no other name in it, and what stands between quotes is a name or a number.
_HARMLESS = re.compile(
    r"(?:\s+|0[xX][0-9a-fA-F]+(?!\w)|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?!\w)|'[-+\w.]{1,40}'"
    rf"|(?<![\w.'])(?:{_NAMES})(?![\w.'])|[-+*/%(),\[\]&|^~]|<<|>>)*",
    re.ASCII,
)
_NAME = re.compile(_NAMES)

#: what sympy's parser runs before each expression
_SYMPY = "from sympy import *"


def _is_harmless(event: str, what: Any) -> bool:
    """Whether code may be made of a text (``compile``), or such code may run (``exec``)."""
    if event == "compile":
        text = what.decode("utf-8", "replace") if isinstance(what, bytes) else what
        return isinstance(text, str) and len(text) < 20_000 and (text == _SYMPY or bool(_HARMLESS.fullmatch(text)))
    names, constants = getattr(what, "co_names", (None,)), getattr(what, "co_consts", ())
    if names == ("sympy",):
        return True
    return all(_NAME.fullmatch(str(name)) for name in names) and not any(hasattr(each, "co_code") for each in constants)


def get_ready() -> None:
    """Import reasoning-gym, and from then on refuse to make code of text that is not harmless. Runs in the child.

    Raises:
        PermissionError: later, where a text would become code.
    """
    import reasoning_gym  # noqa: F401

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("compile", "exec") and not judge._is_harmless() and not _is_harmless(event, arguments[0]):
            judge._refused += 1
            raise PermissionError("text would become code")

    sys.addaudithook(refuse)


def serve(memory_mib: int) -> None:
    """Score the answers on standard input, one line each, until it ends. Runs in the child."""
    judge.serve(memory_mib, get_ready, scored)


def scored(answer: str, request: str) -> Verdict:
    """The verdict of a task's own scorer, in this process and without any limit.

    Args:
        answer: the contents of the box. They are scored without what LaTeX adds to plain text, and as they are; the
            better score counts.
        request: as JSON, the task and the ground truth.
    """
    task, truth = json.loads(request)
    entry = _whole(truth)
    dataset = _dataset(task, json.dumps(entry.pop("options", {}), sort_keys=True))
    credit = 0.0
    for form in dict.fromkeys((without_latex(answer), answer.strip())):
        given = float(dataset.score_answer(form, deepcopy(entry)))
        credit = max(credit, min(given, 1.0)) if math.isfinite(given) else credit
        if credit >= 1.0:
            break
    return Verdict(credit >= 1.0, True, credit=credit)


@cache
def _dataset(task: str, options: str) -> Any:
    """The dataset that scores a task. Only numbers of the options are taken, because the data may be anybody's."""
    from dataclasses import fields

    from reasoning_gym.factory import DATASETS

    dataset, config = DATASETS[task]
    known = {field.name for field in fields(config)}
    numbers = {
        name: value
        for name, value in json.loads(options).items()
        if name in known and isinstance(value, (int, float)) and name not in ("seed", "size")
    }
    return dataset(config=config(**numbers))


_TEXT = re.compile(r"\\(?:text|textbf|textit|texttt|mathrm|mathbf|mathtt|operatorname)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{(-?\d+)\}\s*\{(\d+)\}")


def without_latex(answer: str) -> str:
    r"""The contents of a box as plain text: ``\text{Friday}`` is Friday, and ``\frac{1}{2}`` is 1/2."""
    answer = answer.strip().strip("$").strip()
    answer = _FRACTION.sub(r"\1/\2", _TEXT.sub(r"\1", answer))
    answer = re.sub(r"\\(?:times|cdot)(?![A-Za-z])", "*", answer).replace("\\div", "/").replace("{,}", ",")
    answer = re.sub(r"\\([{}_%$#&])", r"\1", answer)
    return re.sub(r"\\[,;! ]", " ", answer).strip()


# --------------------------------------------------------------------------------------------------------- the parent


def score_box(
    data_source: str,
    answer: str | None,
    ground_truth: Any,
    timeout: float,
    memory_mib: int,
    processes: int,
    max_characters: int,
) -> dict[str, float]:
    """The reward of a row that reasoning-gym generated.

    Args:
        data_source: ``reasoning_gym/TASK``.
        answer: the contents of the last box; None if there is none.
        ground_truth: as :func:`ground_truth_of` writes it.
        timeout: processor seconds for one answer.
        memory_mib: address space in MiB of a process that scores.
        processes: how many such processes this reward worker may have.
        max_characters: a box that is longer than this and than three times the ground truth is wrong.

    Returns:
        ``score``: what the task's scorer gives, from 0 to 1; some give a part for a half-right answer. ``acc``: 1.0 if
        that is 1. ``format``: 1.0 if there is a box with something in it. ``stopped``: as of the other reward.

    Raises:
        EntropyForkError: reasoning-gym is not installed or has no such task, or the ground truth is none of its.
        JudgeError: the processes cannot be started, or not with so little memory.
    """
    task = data_source.removeprefix(PREFIX)
    _check(task)
    if not isinstance(ground_truth, str):
        raise EntropyForkError(f"the ground truth of a row of {data_source} must be a text, not {ground_truth!r}")
    _whole(ground_truth)
    verdict = Verdict(False, False)
    boxed = answer is not None and bool(answer.strip())
    if boxed and len(str(answer)) <= max(max_characters, 3 * len(ground_truth)):
        request = json.dumps([task, ground_truth])
        verdict = judges(processes, memory_mib, __name__).compare(str(answer), request, timeout)
    return {
        "score": verdict.credit,
        "acc": float(verdict.equal),
        "format": float(boxed and not verdict.stopped),
        "stopped": float(verdict.stopped),
    }


@cache
def _check(task: str) -> None:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise EntropyForkError(f"data_source {PREFIX}{task}: {why_missing(['reasoning_gym'], EXTRA)}")
    if not re.fullmatch(r"\w+", task) or task == "composite":
        raise EntropyForkError(f"data_source {PREFIX}{task}: reasoning-gym has no task of this name")
