"""Grade pairs of an answer and a ground truth, one or a file of them, as the reward does it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.reward.judge import Verdict
from entropy_fork.reward.reading import read
from entropy_fork.reward.score import compare
from entropy_fork.reward.spelling import spelled

#: the signs of a file for equal and not equal
SIGNS = {True: "=", False: "≠"}

#: names of the columns with the ground truth and with the verdict of a human
_TRUTH, _WANTED = ("ground_truth", "ground truth", "truth"), ("wanted", "grader")


class Graded(NamedTuple):
    """A pair with its verdict; ``wanted`` is a human's sign, if the file has one."""

    answer: str
    truth: str
    verdict: Verdict
    wanted: str | None = None


class GradedFile(NamedTuple):
    """The pairs of a file."""

    name: str
    graded: list[Graded]

    @property
    def disagreed(self) -> list[Graded]:
        """The pairs on which a human says something else."""
        return [each for each in self.graded if each.wanted not in (None, SIGNS[each.verdict.equal])]

    def summary(self) -> str:
        """How many pairs are equal, and how many agree with a human, in one line."""
        equal = sum(each.verdict.equal for each in self.graded)
        line = f"{self.name}: {len(self.graded)} pairs, {equal} equal"
        wanted = sum(each.wanted is not None for each in self.graded)
        if wanted:
            fooled = sum(each.verdict.equal for each in self.disagreed)
            refused = len(self.disagreed) - fooled
            agreed = wanted - len(self.disagreed)
            line += f"; {agreed} of {wanted} as wanted, {fooled} wrong taken for right, {refused} right taken for wrong"
        return line


def grade_pair(answer: str, truth: str, convention: str = "strict", wanted: str | None = None) -> Graded:
    """Grade one pair, in a process with the reward's limits.

    Raises:
        JudgeError: the process cannot be started.
    """
    return Graded(answer, truth, compare(answer, truth, convention=convention), wanted)


def grade_file(file: Path, convention: str = "strict") -> GradedFile:
    """Grade a table with tabs between its columns.

    Raises:
        EntropyForkError: the file is not there, or has no columns of these names.
        JudgeError: the process cannot be started.
    """
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            rows = list(csv.DictReader(opened, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EntropyForkError(f"{file} cannot be read: {error}") from error
    columns = list(rows[0]) if rows else []
    truth = next((name for name in _TRUTH if name in columns), None)
    wanted = next((name for name in _WANTED if name in columns), None)
    if "answer" not in columns or truth is None:
        raise EntropyForkError(
            f"{file} needs a header with the columns answer and ground_truth, and tabs between them; it has "
            f"{', '.join(map(str, columns)) or 'no rows'}"
        )
    for number, row in enumerate(rows, 2):
        if row["answer"] is None or row[truth] is None:
            raise EntropyForkError(f"{file}, line {number}: the answer or the ground truth is missing")
    graded = [grade_pair(row["answer"], row[truth], convention, wanted and row[wanted]) for row in rows]
    return GradedFile(file.name, graded)


def reading_of(text: str) -> str:
    """How a text is read: its kind, and its spelling after the rules."""
    reading = read(spelled(text))
    return f"{type(reading).__name__}: {spelled(text)}"
