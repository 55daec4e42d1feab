"""Questions from parquet files in verl's format (``entropy-fork data prepare`` writes them)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from entropy_fork.common.errors import EntropyForkError

COLUMNS = ("data_source", "prompt", "reward_model")


@dataclass(frozen=True)
class Question:
    """One row of the data.

    Attributes:
        data_source: its benchmark.
        prompt: its chat messages.
        ground_truth: the text that a right answer equals, or a list of texts of which it equals any.
    """

    data_source: str
    prompt: tuple[dict[str, str], ...]
    ground_truth: str | list[str]

    @property
    def truth_text(self) -> str:
        """The ground truth as one text, to be shown."""
        return self.ground_truth if isinstance(self.ground_truth, str) else " or ".join(self.ground_truth)


def read_questions(files: Sequence[Path]) -> list[Question]:
    """All rows of all files, in order.

    Raises:
        EntropyForkError: a file is missing, is not parquet, lacks a column, or has a row that cannot be used.
    """
    questions = [question for file in files for question in _read(file)]
    if not questions:
        raise EntropyForkError(f"no questions in {', '.join(map(str, files)) or 'no file'}: name files with --data")
    return questions


def checksum(questions: Sequence[Question]) -> str:
    """sha256 of the questions and their ground truths, in order. How the parquet was written does not matter."""
    rows = [[question.data_source, question.prompt, question.ground_truth] for question in questions]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _read(file: Path) -> list[Question]:
    advice = "write files with 'entropy-fork data prepare', or in verl's format"
    try:
        schema = pq.read_schema(file)
        if missing := [column for column in COLUMNS if column not in schema.names]:
            raise EntropyForkError(f"{file} has no column {', '.join(missing)}: {advice}")
        rows = pq.read_table(file, columns=list(COLUMNS)).to_pylist()
    except FileNotFoundError as error:
        raise EntropyForkError(f"there is no file {file}: {advice}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, EntropyForkError):
            raise
        raise EntropyForkError(f"{file} cannot be read as parquet ({error}): {advice}") from error
    return [_question(row, f"row {number} of {file}") for number, row in enumerate(rows)]


def _question(row: dict[str, Any], where: str) -> Question:
    prompt, reward = row["prompt"], row["reward_model"]
    if not (
        isinstance(prompt, list)
        and prompt
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
        )
    ):
        raise EntropyForkError(f"{where}: prompt must be a list of messages with a role and a content, not {prompt!r}")
    given = reward.get("ground_truth") if isinstance(reward, dict) else None
    if (truth := _truth(given)) is None:
        raise EntropyForkError(
            f"{where}: reward_model.ground_truth must be a text, a number, or a list of these of which any is right, "
            f"not {given!r}"
        )
    if not isinstance(row["data_source"], str):
        raise EntropyForkError(f"{where}: data_source must be a text, not {row['data_source']!r}")
    messages = tuple({"role": message["role"], "content": message["content"]} for message in prompt)
    return Question(row["data_source"], messages, truth)


def _truth(given: Any) -> str | list[str] | None:
    """A ground truth as the reward compares it; None if it is nothing to compare with.

    A list with one truth is that truth.
    """
    if not isinstance(given, list):
        return _one_truth(given)
    truths = [truth for truth in map(_one_truth, given) if truth is not None]
    if not truths or len(truths) < len(given):
        return None
    return truths[0] if len(truths) == 1 else truths


def _one_truth(given: Any) -> str | None:
    if isinstance(given, str):
        return given if given.strip() else None
    is_number = isinstance(given, int | float | Decimal) and not isinstance(given, bool)
    return str(given) if is_number and math.isfinite(given) else None
