"""What ``entropy-fork compare-evaluations`` does: read two evaluations, refuse what cannot be paired, take differences.

Two evaluations can be paired if they have the same questions, the same number of answers to each, and the same way to
draw answers. Everything else may differ, and is named beside the result.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.evaluation.answer_store import ScoredAnswer, read_answers
from entropy_fork.evaluation.checkpoint import ModelRecord
from entropy_fork.evaluation.paired import PairedSummary, average_pair, summarise_pair
from entropy_fork.evaluation.results import RESULTS


@dataclass(frozen=True)
class FinishedEvaluation:
    """A folder of ``entropy-fork evaluate`` with all of its answers.

    Attributes:
        folder: where it was read.
        identity: of its manifest.
        model: which model answered; None where an earlier version of this package did not write it down.
        answers: k, answers per question.
        benchmarks: data source → its answers, one row per question, in the order of the data.
    """

    folder: Path
    identity: dict[str, Any]
    model: ModelRecord | None
    answers: int
    benchmarks: dict[str, list[list[ScoredAnswer]]]


@dataclass(frozen=True)
class PairedEvaluation:
    """Two evaluations and their differences.

    Attributes:
        before, after: the two.
        notes: what else differs between them, a sentence each.
        benchmarks: a summary per benchmark in the order of the data.
    """

    before: FinishedEvaluation
    after: FinishedEvaluation
    notes: tuple[str, ...]
    benchmarks: dict[str, PairedSummary]

    @property
    def rows(self) -> list[tuple[str, PairedSummary]]:
        """Name and summary of each benchmark, and of their average if there are several."""
        rows = list(self.benchmarks.items())
        return rows if len(rows) == 1 else [*rows, ("average", average_pair(list(self.benchmarks.values())))]


def compare_evaluations(before: Path, after: Path) -> PairedEvaluation:
    """Compare two folders of ``entropy-fork evaluate``, question by question.

    Raises:
        EntropyForkError: a folder is not a finished evaluation, or the two cannot be paired; the message has a line for
            each reason.
    """
    pair = read_evaluation(before), read_evaluation(after)
    if different := _not_comparable(*pair):
        raise EntropyForkError(
            f"{before} and {after} cannot be compared question by question:\n"
            + "\n".join(f"  {line}" for line in different)
            + "\nEvaluate one of the two again with what the other one has, in another --output. (More --answers can "
            "be added in the same one.)"
        )
    benchmarks = {}
    for name in pair[0].benchmarks:
        tables = [one.benchmarks[name] for one in pair]
        right = [np.array([[answer.score == 1.0 for answer in row] for row in rows]) for rows in tables]
        tokens = [np.array([[answer.tokens for answer in row] for row in rows]) for rows in tables]
        benchmarks[name] = summarise_pair((right[0], right[1]), (tokens[0], tokens[1]))
    return PairedEvaluation(*pair, _notes(*pair), benchmarks)


def read_evaluation(folder: Path) -> FinishedEvaluation:
    """Read a folder of ``entropy-fork evaluate``. Nothing in it is changed.

    Raises:
        EntropyForkError: it is something else, or not finished.
    """
    manifest, records = read_answers(folder)
    unfinished = f"{folder} is not a finished evaluation: repeat its 'entropy-fork evaluate … --output {folder}'"
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        sizes = {name: (int(one["questions"]), int(one["answers_per_question"]))
                 for name, one in results["benchmarks"].items()}  # fmt: skip
        ((answers),) = {k for _, k in sizes.values()}
    except FileNotFoundError as error:
        raise EntropyForkError(f"{unfinished} (it has no {RESULTS} yet)") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EntropyForkError(f"{folder / RESULTS} cannot be read ({error!r}): repeat the evaluation") from error
    by_question = {(record.question, record.sample): record for record in records}
    benchmarks: dict[str, list[list[ScoredAnswer]]] = {name: [] for name in sizes}
    for question in range(sum(count for count, _ in sizes.values())):
        row = [by_question.get((question, sample)) for sample in range(answers)]
        whole = [record for record in row if record is not None]
        if len(whole) < answers or whole[0].data_source not in benchmarks:
            raise EntropyForkError(f"{unfinished} (answers to question {question} are missing)")
        benchmarks[whole[0].data_source].append(whole)
    if wrong := [name for name, rows in benchmarks.items() if len(rows) != sizes[name][0]]:
        raise EntropyForkError(f"{unfinished} ({RESULTS} and the answers differ in the questions of {wrong[0]})")
    model = ModelRecord.of_dict(manifest.get("model"))
    if model is None and isinstance(path := manifest.get("model_path"), str):
        model = ModelRecord(path)
    return FinishedEvaluation(folder, manifest["identity"], model, answers, benchmarks)


def _not_comparable(before: FinishedEvaluation, after: FinishedEvaluation) -> list[str]:
    """Why two evaluations cannot be paired, a line each."""
    different = []
    sizes = [{name: len(rows) for name, rows in one.benchmarks.items()} for one in (before, after)]
    if sizes[0] != sizes[1]:
        said = [", ".join(f"{name} ({count})" for name, count in size.items()) for size in sizes]
        different.append(f"questions: {said[0]} before, {said[1]} after")
    elif before.identity.get("questions") != after.identity.get("questions"):
        different.append(
            "questions: as many, but other texts, ground truths or another order "
            f"(checksum {str(before.identity.get('questions'))[:12]} before, "
            f"{str(after.identity.get('questions'))[:12]} after)"
        )
    if before.answers != after.answers:
        different.append(f"answers per question (--answers): {before.answers} before, {after.answers} after")
    return [*different, *_differing(before, after, is_sampling=True)]


def _notes(before: FinishedEvaluation, after: FinishedEvaluation) -> tuple[str, ...]:
    notes = [f"They also differ in {line}" for line in _differing(before, after, is_sampling=False)]
    if before.identity.get("model") == after.identity.get("model"):
        notes.append("Both have the same model: the difference shows how much another draw of answers changes")
    return tuple(notes)


def _differing(before: FinishedEvaluation, after: FinishedEvaluation, is_sampling: bool) -> list[str]:
    """The keys of the identities that differ: those that decide how answers are drawn, or all others.

    Another seed gives other answers of the same kind, so it is one of the others.
    """
    first, second = _flat(before.identity), _flat(after.identity)
    return [
        f"{name}: {_short(name, first.get(name))} before, {_short(name, second.get(name))} after"
        for name in dict.fromkeys([*first, *second])
        if first.get(name) != second.get(name)
        and name not in ("model", "questions")
        and (name.startswith("sampling.") and name != "sampling.seed") == is_sampling
    ]


def _short(name: str, value: Any) -> str:
    """A value for a message. Of a checksum the beginning is enough."""
    if value is None:
        return "the model's" if name == "tokenizer" else "none"
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
