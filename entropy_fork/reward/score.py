"""The reward of the paper's runs: 1 when the last ``\\boxed{}`` of an answer equals the ground truth, else 0.

Use it through verl's reward interface, with any reward manager::

    reward.custom_reward_function.path=pkg://entropy_fork.reward
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.timeout=10      # or memory_mib, processes, max_characters

Two plain numbers are compared here, exactly. :mod:`entropy_fork.reward.grader` compares everything else
(``\\frac{\\sqrt{8}}{2}`` equals ``\\sqrt2``), with math-verify, in processes with a limit on time and memory
(:mod:`entropy_fork.reward.judge`). So no answer can block or end a reward worker, or be run as code. This module
imports neither math-verify nor torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from entropy_fork.common.cores import available_cores
from entropy_fork.common.ground_truth import accepted_answers
from entropy_fork.reward import reasoning_gym
from entropy_fork.reward.convention import CONVENTIONS
from entropy_fork.reward.judge import Verdict, judges

#: processor seconds for one comparison
TIMEOUT = 5.0

#: address space in MiB of a process that compares; it needs 61 at its start
MEMORY_MIB = 512

#: processes of one reward worker that compare
PROCESSES = min(4, available_cores())

#: a longer box is wrong without being parsed, unless it has exactly the characters of the ground truth
MAX_CHARACTERS = 1000

_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\(?!\\boxed).|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    """The contents of the last complete ``\\boxed{…}`` after any ``</think>``, or None if there is none.

    Of nested boxes the inner one is the last. Escaped braces (``\\{``) are characters, as in LaTeX. The time is linear
    in the length of the text, even for 10,000 boxes that are never closed.
    """
    span = last_boxed_span(text)
    return None if span is None else text[slice(*span)]


def last_boxed_span(text: str) -> tuple[int, int] | None:
    """Where the contents of :func:`last_boxed` begin and end in the text."""
    begin = max(0, text.rfind("</think>"))
    last = text.rfind("\\boxed", begin)
    if last < 0:
        return None
    # Nearly always the box that begins last is complete, and the text before it need not be read.
    return _last_boxed(text, last) or _last_boxed(text, begin)


def _last_boxed(text: str, begin: int) -> tuple[int, int] | None:
    opened: list[int | None] = []  # where the contents of an open box begin, None for another open brace
    last: tuple[int, int] | None = None
    for match in _BOX_OR_BRACE.finditer(text, begin):
        token = match.group()
        if token == "}":
            box = opened.pop() if opened else None
            if box is not None and (last is None or box > last[0]):
                last = (box, match.start())
        elif token[-1] == "{" and token != "\\{":
            opened.append(None if token == "{" else match.end())
    return last


_INTEGER = r"-?\d{1,40}"
_PLAIN_NUMBER = re.compile(
    rf"(?P<decimal>-?\d{{1,40}}\.\d{{1,40}})"
    rf"|(?P<top>{_INTEGER})(?:/(?P<bottom>\d{{1,40}}))?"
    rf"|(?P<sign>-?)\\[dt]?frac\{{(?P<numerator>{_INTEGER})\}}\{{(?P<denominator>{_INTEGER})\}}",
    re.ASCII,
)


#: no plain number is longer; longer texts stay out of the cache, or it would grow with what a model writes
_LONGEST_NUMBER = 100


@lru_cache(maxsize=16384)
def plain_number(text: str) -> tuple[Fraction, bool] | None:
    """The value of an integer, a decimal or a fraction of integers, and whether it is a decimal; else None."""
    match = _PLAIN_NUMBER.fullmatch(text)
    if match is None:
        return None
    if match["decimal"]:
        return Fraction(match["decimal"]), True
    top, bottom = int(match["top"] or match["sign"] + "1"), int(match["bottom"] or 1)
    if match["numerator"]:
        top, bottom = top * int(match["numerator"]), int(match["denominator"])
    return (Fraction(top, bottom), False) if bottom else None


def _compare_plain(answer: str, truth: str) -> Verdict | None:
    """The verdict on two plain numbers; None if one could be the other, rounded: then the grader decides.

    So both ways always give the same verdict.
    """
    if max(len(answer), len(truth)) > _LONGEST_NUMBER:
        return None
    left, right = plain_number(answer), plain_number(truth)
    if left is None or right is None:
        return None
    difference = abs(left[0] - right[0])
    if left[1] != right[1] and 0 < difference * 100_000 < abs(left[0]) + abs(right[0]):
        return None
    return Verdict(difference == 0, True, why="exact numbers")


def compare(
    answer: str,
    truth: str,
    timeout: float = TIMEOUT,
    memory_mib: int = MEMORY_MIB,
    processes: int = PROCESSES,
    max_characters: int = MAX_CHARACTERS,
    convention: str = "strict",
) -> Verdict:
    """Compare the contents of a box with the ground truth; the arguments are those of :func:`compute_score`."""
    answer, truth = answer.strip(), truth.strip()
    if not answer:
        return Verdict(False, False, why="nothing in the box")
    if answer == truth:
        return Verdict(True, True, why="the same text")
    verdict = _compare_plain(answer, truth)
    if verdict is not None:
        return verdict
    if max(len(answer), len(truth)) > max_characters:
        return Verdict(False, False, why="too long to be read")
    return _judged(answer, truth, timeout, memory_mib, processes, convention)


@lru_cache(maxsize=16384)
def _judged(answer: str, truth: str, timeout: float, memory_mib: int, processes: int, convention: str) -> Verdict:
    return judges(processes, memory_mib).compare(answer, truth, timeout, CONVENTIONS[convention])


def _truths(ground_truth: Any) -> list[str]:
    """The right answers of a data row as strings."""
    # values from parquet arrive as arrays and numbers of numpy
    given: Any = ground_truth.tolist() if hasattr(ground_truth, "tolist") else ground_truth
    if isinstance(given, str):
        given = accepted_answers(given)
    elif isinstance(given, (int, float)) and not isinstance(given, bool):
        given = [given]
    if isinstance(given, Iterable) and not isinstance(given, (Mapping, bytes)):
        truths = [str(truth) for truth in given if isinstance(truth, (str, int, float))]
        if truths and all(truth.strip() for truth in truths):
            return truths
    raise ValueError(
        f"the ground truth {ground_truth!r} cannot be compared with: reward_model.ground_truth of every data row must "
        "be an expression in LaTeX, a number, or a list of these of which any is right"
    )


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    timeout: float = TIMEOUT,
    memory_mib: int = MEMORY_MIB,
    processes: int = PROCESSES,
    max_characters: int = MAX_CHARACTERS,
    convention: str = "strict",
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
) -> dict[str, float]:
    """verl's reward function. May be called by any number of threads.

    Args:
        data_source: of the data row. Rows of ``reasoning_gym/…`` are scored by
            :mod:`entropy_fork.reward.reasoning_gym`; of others it is not used.
        solution_str: the decoded answer.
        ground_truth: ``reward_model.ground_truth`` of the data row: an expression, a number, or a list of these of
            which any is right. A text may hold such a list as JSON: ``["1", "2"]``.
        extra_info: of the data row; not used.
        timeout: processor seconds for one comparison in a process (at most four times as long by the clock).
        memory_mib: address space in MiB of a process that compares.
        processes: how many such processes this reward worker may have.
        max_characters: longer answers are wrong without being parsed.
        convention: what counts as equal where people differ (units, percent, order): a name of
            :data:`entropy_fork.reward.convention.CONVENTIONS`.
        reward_router_address: verl gives it if a reward model runs too; not used.
        reward_model_tokenizer: the same.

    Returns:
        The same keys for every answer, as verl requires, each 0.0 or 1.0:

        - ``score`` and ``acc``: whether the answer is right.
        - ``format``: whether it has a complete box that can be parsed. Its contents are not empty, and they are words
          or mathematics that can be read within the limits, or exactly the characters of the ground truth.
        - ``stopped``: whether a limit ended the comparison, or the answer would have been run as code. Such an answer
          counts as wrong and as not parseable.

    Raises:
        ValueError: the ground truth is not something to compare with, a limit is not a positive number, or there is no
            such convention.
        JudgeError: the processes cannot be started, or not with so little memory.
    """
    for name, limit in {
        "timeout": timeout, "memory_mib": memory_mib, "processes": processes, "max_characters": max_characters
    }.items():  # fmt: skip
        if limit <= 0:
            raise ValueError(f"reward.custom_reward_function.reward_kwargs.{name} must be positive, not {limit}")
    if convention not in CONVENTIONS:
        raise ValueError(
            f"reward.custom_reward_function.reward_kwargs.convention must be one of {', '.join(CONVENTIONS)}, "
            f"not {convention!r}"
        )
    answer = last_boxed(solution_str)
    if str(data_source).startswith(reasoning_gym.PREFIX):
        limits = (timeout, memory_mib, processes, max_characters)
        return reasoning_gym.score_box(data_source, answer, ground_truth, *limits)
    truths = _truths(ground_truth)
    verdicts = [] if answer is None else [
        compare(answer, truth, timeout, memory_mib, processes, max_characters, convention) for truth in truths
    ]  # fmt: skip
    right = float(any(verdict.equal for verdict in verdicts))
    return {
        "score": right,
        "acc": right,
        "format": float(any(verdict.parseable for verdict in verdicts)),
        "stopped": float(any(verdict.stopped for verdict in verdicts)),
    }
