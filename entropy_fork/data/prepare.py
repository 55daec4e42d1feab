"""Clean the rows of a source and write them as verl's parquet, with a manifest and a list of what was left out.

Every row that is read is accounted for: it is written, or the manifest's ``dropped`` counts it under a reason.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

import entropy_fork
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.progress import Task, task, track
from entropy_fork.data.read import SourceRows, sha256
from entropy_fork.data.sources import Source
from entropy_fork.data.template import INSTRUCTION, user_message
from entropy_fork.reward import compare, compute_score, last_boxed

MANIFEST, REJECTED = "manifest.json", "rejected.jsonl"

#: reasons for rows that could be used; such rows are only counted
DUPLICATE, BEYOND_LIMIT = "duplicate", "beyond_limit"

SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        ("extra_info", pa.struct([("index", pa.int64()), ("split", pa.string()), ("id", pa.string())])),
    ]
)
"""The columns that verl's data set, agent loops and reward loop read, the same for all sources: verl joins files."""

INTEGER = re.compile(r"-?\d{1,18}")
"""Ground truths that the reward can always read. Most of DAPO-Math-17K is of this form."""

POWER_OF_TEN = re.compile(r"(-?\d+(?:\.\d+)?)[eE]([+-]?\d+)")
"""How Minerva's answers are written. math-verify would take the e for Euler's number."""


@dataclass(frozen=True)
class CheckedRow:
    """A row of the source, with its exact copies.

    Attributes:
        question, answer: cleaned text; empty if the row has none.
        identifier: the id that the source gives it, or None.
        first: number of the first copy in the source, from 0.
        copies: how many rows are exact copies, itself included.
        unusable: the reason why it cannot be used, or None.
    """

    question: str
    answer: str
    identifier: str | None
    first: int
    copies: int
    unusable: str | None


@dataclass(frozen=True)
class Prepared:
    """What became of the rows of a source: those kept, those that cannot be used, and the count of rows per reason."""

    kept: list[CheckedRow]
    rejected: list[CheckedRow]
    dropped: Counter[str]
    rows_in: int


def prepare(
    source: Source,
    rows: SourceRows,
    output: Path,
    console: Console,
    *,
    limit: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the folder ``output/NAME`` of a source: ``train.parquet`` or ``test.parquet``, manifest and rejected rows.

    The folder appears at once, with a rename, when everything in it is complete.

    Args:
        source: the data set.
        rows: its rows as they were read.
        output: the folder in which a folder with the source's name is made.
        console: where progress is shown.
        limit: keep at most this many rows, the first ones.
        overwrite: replace what an earlier call wrote there.

    Returns:
        The manifest.

    Raises:
        EntropyForkError: the folder exists already, a file cannot be read, or no row can be used.
    """
    folder = output.absolute() / source.name
    check_free(folder, overwrite)
    with task(source.name, console=console):
        prepared = clean(source, rows, limit)
    if not prepared.kept:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in prepared.dropped.most_common())
        raise EntropyForkError(
            f"none of the {prepared.rows_in} rows can be used as {source.name}: {reasons or 'there are no rows'}. "
            f"Is this the right data set? 'entropy-fork data list' shows where each one comes from."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{source.name}.new.", dir=folder.parent))
    try:
        manifest = write(source, prepared, rows.origin, workspace)
        workspace.chmod(0o755)
        put_in_place(workspace, folder)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return manifest


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse an output folder that exists: always if we did not write it, else unless it is to be replaced.

    Raises:
        EntropyForkError: it exists; the message says what to write instead.
    """
    if not folder.exists():
        return
    if not (folder / MANIFEST).is_file():
        raise EntropyForkError(f"{folder} exists and has no {MANIFEST}, so it is not ours: write another --output")
    if not overwrite:
        raise EntropyForkError(f"{folder} exists. Write --overwrite to replace it, or another --output.")


def clean(source: Source, rows: SourceRows, limit: int | None = None) -> Prepared:
    """Separate usable rows from others, and keep one row of each question, in the order of the source."""
    with task(f"{source.name}: reading", rows.total) as reading:
        distinct = distinct_rows(_counted(rows.batches, reading))
    rows_in = sum(values["copies"] for values in distinct)

    questions: dict[str, list[CheckedRow]] = {}
    rejected: list[CheckedRow] = []
    for values in track(f"{source.name}: checking", distinct):
        row = checked(**values)
        if row.unusable is None:
            questions.setdefault(normalised(row.question), []).append(row)
        else:
            rejected.append(row)

    kept: list[CheckedRow] = []
    dropped: Counter[str] = Counter()
    for same in track(f"{source.name}: comparing answers", questions.values()):
        if any(not agree(same[0].answer, other.answer) for other in same[1:]):
            # Nobody can tell which one is right, and a wrong one would reward wrong answers.
            rejected += [_unusable(row, "conflicting_answers") for row in same]
            continue
        dropped[DUPLICATE] += sum(row.copies for row in same) - 1
        kept.append(same[0])
    for row in rejected:
        dropped[str(row.unusable)] += row.copies
    if limit is not None and limit < len(kept):
        dropped[BEYOND_LIMIT] += len(kept) - limit
        kept = kept[:limit]
    rejected.sort(key=lambda row: row.first)
    return Prepared(kept, rejected, +dropped, rows_in)


def _counted(batches: Iterable[pa.Table], reading: Task) -> Iterator[pa.Table]:
    for batch in batches:
        yield batch
        reading.advance(len(batch))


def distinct_rows(batches: Iterable[pa.Table]) -> list[dict[str, Any]]:
    """The distinct rows of a source, in order, each with its first number and how many copies there are.

    Copies are found in Arrow, batch by batch: memory grows with the distinct rows, not with the rows.
    """
    keys = ["question", "answer", "unusable"]
    found: pa.Table | None = None
    start = 0
    for batch in batches:
        numbered = batch.append_column("first", pa.array(range(start, start + len(batch)), pa.int64()))
        numbered = numbered.append_column("copies", pa.array([1] * len(batch), pa.int64()))
        start += len(batch)
        both = numbered if found is None else pa.concat_tables([found, numbered.select(found.column_names)])
        # One thread keeps the order, and with it the id of the first copy.
        grouped = both.group_by(keys, use_threads=False)
        found = grouped.aggregate([("id", "first"), ("first", "min"), ("copies", "sum")])
        found = found.rename_columns([*keys, "id", "first", "copies"])
    if found is None:
        return []
    return found.sort_by("first").to_pylist()


def checked(
    question: str | None, answer: str | None, unusable: str | None, id: str | None, first: int, copies: int
) -> CheckedRow:
    """Clean a row, and find out whether it can be used."""
    question, answer = (question or "").strip(), clean_answer(answer or "")
    if unusable is None and not question:
        unusable = "no_question"
    if unusable is None and not answer:
        unusable = "no_answer"
    if unusable is None and not is_scorable(answer):
        unusable = "answer_not_scorable"
    return CheckedRow(question, answer, id, first, copies, unusable)


def _unusable(row: CheckedRow, reason: str) -> CheckedRow:
    return CheckedRow(row.question, row.answer, row.identifier, row.first, row.copies, reason)


def clean_answer(answer: str) -> str:
    """A ground truth as the reward reads it: LaTeX, without dollar signs or a box around all of it.

    >>> clean_answer(r" $\\\\boxed{\\\\frac{1}{2}}$ ")
    '\\\\frac{1}{2}'
    """
    answer = answer.strip()
    if len(answer) > 2 and answer[0] == answer[-1] == "$" and "$" not in answer[1:-1]:
        answer = answer[1:-1].strip()
    inner = last_boxed(answer)
    if inner is not None and answer == f"\\boxed{{{inner}}}":
        answer = inner.strip()
    if power := POWER_OF_TEN.fullmatch(answer):
        answer = f"{power[1]} \\times 10^{{{int(power[2])}}}"
    return answer


def agree(truth: str, answer: str) -> bool:
    """Whether the reward accepts an answer for a ground truth."""
    return compute_score("", f"\\boxed{{{answer}}}", truth)["acc"] == 1.0


def is_scorable(truth: str) -> bool:
    """Whether the reward can read a ground truth. If not, only an answer with the same characters would be right."""
    return bool(INTEGER.fullmatch(truth)) or compare(truth, "0").parseable


def normalised(question: str) -> str:
    """A question in the form in which copies are compared: white space and composed characters do not count.

    NFC, not NFKC: the latter would make x² and x2 the same.
    """
    return " ".join(unicodedata.normalize("NFC", question).split())


def write(source: Source, prepared: Prepared, origin: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the three files of a source into a folder that exists."""
    parquet = folder / f"{source.use}.parquet"
    records = [
        {
            "data_source": source.name,
            "prompt": [user_message(row.question)],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": row.answer},
            "extra_info": {"index": index, "split": source.use, "id": row.identifier},
        }
        for index, row in enumerate(prepared.kept)
    ]
    pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), parquet, write_page_checksum=True)
    with (folder / REJECTED).open("w", encoding="utf-8") as stream:
        for row in prepared.rejected:
            line = {
                "reason": row.unusable,
                "row": row.first,
                "copies": row.copies,
                "id": row.identifier,
                "question": row.question,
                "answer": row.answer,
            }
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    manifest = {
        "source": source.name,
        **origin,
        "rows_in": prepared.rows_in,
        "rows_out": len(prepared.kept),
        "dropped": dict(sorted(prepared.dropped.items())),
        "instruction": INSTRUCTION,
        "file": parquet.name,
        "sha256": sha256(parquet),
        "entropy_fork": entropy_fork.__version__,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def put_in_place(finished: Path, folder: Path) -> None:
    """Rename a finished folder to its final name. An older folder of that name is moved away first, then deleted."""
    if not folder.exists():
        finished.rename(folder)
        return
    discarded = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    folder.rename(discarded / folder.name)
    finished.rename(folder)
    shutil.rmtree(discarded)
