"""Clean the rows of a source and write them as verl's parquet, with a manifest and a list of what was left out.

Every row that is read is accounted for: it is written, or the manifest's ``dropped`` counts it under a reason.
"""

from __future__ import annotations

import json
import random
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
from entropy_fork.common.ground_truth import accepted_answers, fault_of
from entropy_fork.common.progress import Task, task, track
from entropy_fork.data.read import SourceRows, sha256
from entropy_fork.data.sources import BOX, HASHES, TEST, TRAIN, Source
from entropy_fork.data.template import INSTRUCTION, OTHER_FORM, asks_for_a_box, user_message
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


#: GSM8K writes 70,000
THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")

#: how some solutions of MATH mark the answer: ``\\boxed 2``
BARE_BOX = re.compile(r"\\boxed\s+([^\s$.,]+)")

#: what a table program writes for a missing text
MISSING_TEXT = {"nan", "none", "null", "n/a", "#n/a", "<na>"}


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


@dataclass(frozen=True)
class Form:
    """How the rows are written.

    Attributes:
        template: the instruction behind each question, or a text with ``{question}`` in it.
        holdout: how many of the rows go to ``test.parquet``, drawn at random.
        seed: of that draw.
    """

    template: str = INSTRUCTION
    holdout: int = 0
    seed: int = 0


def prepare(
    source: Source,
    rows: SourceRows,
    output: Path,
    console: Console,
    *,
    limit: int | None = None,
    overwrite: bool = False,
    form: Form | None = None,
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
        form: the template, and how many rows are held out.

    Returns:
        The manifest.

    Raises:
        EntropyForkError: the folder exists already, a file cannot be read, no row can be used, or none is left after
            those that are held out.
    """
    form = form or Form()
    folder = output.absolute() / source.name
    check_free(folder, overwrite)
    with task(source.name, console=console):
        prepared = clean(source, rows, limit, form.template)
    if not prepared.kept:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in prepared.dropped.most_common())
        example = "".join(
            f" The first one has the question {_begin(row.question)} and the answer {_begin(row.answer)}."
            for row in prepared.rejected[:1]
        )
        where = (
            "Do --question and --answer name the right columns?"
            if source.own
            else "Is this the right data set? 'entropy-fork data list' shows where each one comes from."
        )
        raise EntropyForkError(
            f"none of the {prepared.rows_in} rows can be used as {source.name}: {reasons or 'there are no rows'}."
            f"{example} {where}"
        )
    if form.holdout and source.use != TRAIN:
        raise EntropyForkError(f"--holdout is for training data, and {source.name} is for evaluation")
    if form.holdout >= len(prepared.kept):
        raise EntropyForkError(
            f"--holdout {form.holdout} leaves no row to train on: {source.name} has {len(prepared.kept)} rows that "
            f"can be used"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{source.name}.new.", dir=folder.parent))
    try:
        manifest = write(source, prepared, rows.origin, workspace, form)
        workspace.chmod(0o755)
        put_in_place(workspace, folder)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return manifest


def _begin(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "…")


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


def clean(source: Source, rows: SourceRows, limit: int | None = None, template: str = INSTRUCTION) -> Prepared:
    """Separate usable rows from others, and keep one row of each question, in the order of the source."""
    with task(f"{source.name}: reading", rows.total) as reading:
        distinct = distinct_rows(_counted(rows.batches, reading))
    rows_in = sum(values["copies"] for values in distinct)

    questions: dict[str, list[CheckedRow]] = {}
    rejected: list[CheckedRow] = []
    for values in track(f"{source.name}: checking", distinct):
        row = checked(**values, solution=source.solution, template=template)
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
    question: str | None,
    answer: str | None,
    unusable: str | None,
    id: str | None,
    first: int,
    copies: int,
    solution: str | None = None,
    template: str = INSTRUCTION,
) -> CheckedRow:
    """Clean a row, and find out whether it can be used."""
    question, answer = (question or "").strip(), answer or ""
    answer = clean_answer(answer if solution is None else answer_in(answer, solution))
    if unusable is None and (not question or question.lower() in MISSING_TEXT):
        unusable = "no_question"
    for_our_reward = asks_for_a_box(template)
    if unusable is None and for_our_reward and OTHER_FORM.search(question):
        unusable = "other_instruction"
    if unusable is None and (fault := fault_of(answer)):
        unusable = fault.reason
    if unusable is None and for_our_reward and not is_scorable(answer):
        unusable = "answer_not_scorable"
    return CheckedRow(question, answer, id, first, copies, unusable)


def answer_in(solution: str, where: str) -> str:
    """The answer at the end of a solution; empty if there is none.

    Args:
        solution: the whole text.
        where: ``hashes`` or ``box``, as :class:`~entropy_fork.data.sources.Source` says.
    """
    if where == HASHES:
        _, there, answer = solution.rpartition("####")
        answer = answer.strip() if there else ""
        return answer.replace(",", "") if THOUSANDS.fullmatch(answer) else answer
    assert where == BOX
    text = solution.replace("\\fbox", "\\boxed")
    if (boxed := last_boxed(text)) is not None:
        return boxed
    bare = BARE_BOX.findall(text)
    return bare[-1] if bare else ""


def _unusable(row: CheckedRow, reason: str) -> CheckedRow:
    return CheckedRow(row.question, row.answer, row.identifier, row.first, row.copies, reason)


def clean_answer(answer: str) -> str:
    """A ground truth as the reward reads it: LaTeX, without dollar signs or a box around all of it.

    In a list in JSON, of which any answer is right, each one is cleaned. A list of one is that one.

    >>> clean_answer(r" $\\\\boxed{\\\\frac{1}{2}}$ ")
    '\\\\frac{1}{2}'
    """
    answer = answer.strip()
    if (several := accepted_answers(answer)) != [answer]:
        cleaned = list(dict.fromkeys(clean_answer(each) for each in several))
        return cleaned[0] if len(cleaned) == 1 else json.dumps(cleaned, ensure_ascii=False)
    if len(answer) > 2 and answer[0] == answer[-1] == "$" and "$" not in answer[1:-1]:
        answer = answer[1:-1].strip()
    inner = last_boxed(answer)
    if inner is not None and answer == f"\\boxed{{{inner}}}":
        answer = inner.strip()
    if power := POWER_OF_TEN.fullmatch(answer):
        answer = f"{power[1]} \\times 10^{{{int(power[2])}}}"
    return answer


def agree(truth: str, answer: str) -> bool:
    """Whether two ground truths accept the same: the reward accepts, for the first, whatever the second one accepts.

    If one of them is a list, this is asked in both directions.
    """
    there, back = accepted_answers(answer), accepted_answers(truth)
    return all(_accepts(truth, each) for each in there) and (
        len(there) == len(back) == 1 or all(_accepts(answer, each) for each in back)
    )


def _accepts(truth: str, answer: str) -> bool:
    return compute_score("", f"\\boxed{{{answer}}}", truth)["acc"] == 1.0


def is_scorable(truth: str) -> bool:
    """Whether the reward can read a ground truth. If not, only an answer with the same characters would be right."""
    return all(INTEGER.fullmatch(each) or compare(each, "0").parseable for each in accepted_answers(truth))


def normalised(question: str) -> str:
    """A question in the form in which copies are compared: white space and composed characters do not count.

    NFC, not NFKC: the latter would make x² and x2 the same.
    """
    return " ".join(unicodedata.normalize("NFC", question).split())


def write(
    source: Source, prepared: Prepared, origin: dict[str, Any], folder: Path, form: Form | None = None
) -> dict[str, Any]:
    """Write the files of a source into a folder that exists, and return the manifest."""
    form = form or Form()
    held_out = set(random.Random(form.seed).sample(range(len(prepared.kept)), form.holdout))
    parts = {source.use: [row for number, row in enumerate(prepared.kept) if number not in held_out]}
    if held_out:
        parts[TEST] = [row for number, row in enumerate(prepared.kept) if number in held_out]
    files = {use: _write_rows(source.name, use, rows, folder, form.template) for use, rows in parts.items()}
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
    columns = {"columns": {"question": source.question[0], "answer": source.answer[0]}} if source.own else {}
    holdout = {}
    if held_out:
        told = {"rows": form.holdout, "seed": form.seed, "file": files[TEST].name, "sha256": sha256(files[TEST])}
        holdout = {"holdout": told}
    manifest = {
        "source": source.name,
        **origin,
        **columns,
        "rows_in": prepared.rows_in,
        "rows_out": len(prepared.kept),
        "dropped": dict(sorted(prepared.dropped.items())),
        "instruction": form.template,
        "file": files[source.use].name,
        "sha256": sha256(files[source.use]),
        **holdout,
        "entropy_fork": entropy_fork.__version__,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def _write_rows(name: str, use: str, rows: list[CheckedRow], folder: Path, template: str) -> Path:
    records = [
        {
            "data_source": name,
            "prompt": [user_message(row.question, template)],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": row.answer},
            "extra_info": {"index": index, "split": use, "id": row.identifier},
        }
        for index, row in enumerate(rows)
    ]
    file = folder / f"{use}.parquet"
    pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), file, write_page_checksum=True)
    return file


def put_in_place(finished: Path, folder: Path) -> None:
    """Rename a finished folder to its final name. An older folder of that name is moved away first, then deleted."""
    if not folder.exists():
        finished.rename(folder)
        return
    discarded = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    folder.rename(discarded / folder.name)
    finished.rename(folder)
    shutil.rmtree(discarded)
