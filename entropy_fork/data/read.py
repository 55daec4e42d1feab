"""Read the rows of a source, from the hub or from local files, as batches of text columns.

``datasets`` loads what is on the hub, and ``huggingface_hub`` turns a branch into the commit that the manifest names.
Local files are read by ``files.py``. Where a column holds plain text or numbers, all work is done on Arrow columns,
because DAPO-Math-17K has 1.79M rows. Values of other kinds (lists, mappings, mixed ones) are looked at one by one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.ground_truth import fault_of
from entropy_fork.data.files import (
    Batch,
    column_names,
    files_at,
    first_line,
    number_of_rows,
    read_file,
    why_unreadable,
)
from entropy_fork.data.sources import Source

BATCH_ROWS = 50_000

#: the columns that every source is brought to; ``unusable`` is the reason why a row cannot be used, or null
COLUMNS = ("question", "answer", "id", "unusable")


@dataclass(frozen=True)
class SourceRows:
    """The rows of a source, as they are read.

    Attributes:
        batches: tables of the text columns ``question``, ``answer``, ``id`` and ``unusable`` (a reason, or null).
        total: number of rows; None if it is not known beforehand.
        origin: where they come from, for the manifest: repository and commit, or local files with their checksums.
    """

    batches: Iterator[pa.Table]
    total: int | None
    origin: dict[str, Any]


def from_hub(source: Source, revision: str) -> SourceRows:
    """Download a source, or take it from the local hub cache.

    Args:
        source: the data set, with its place on the hub.
        revision: a branch, tag or commit.

    Raises:
        EntropyForkError: the hub cannot be reached, or has no such repository, revision or file.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    instead = f"Write --from PATH with a local copy of {source.hub} (a file, or the folder of a download)."
    try:
        commit = HfApi().dataset_info(source.hub, revision=revision, timeout=30).sha
        data_files = None if source.file is None else {source.split: source.file}
        data = datasets.load_dataset(
            source.hub, source.config, split=source.split, revision=commit, data_files=data_files
        )
    except RevisionNotFoundError:
        raise EntropyForkError(f"{source.hub} has no revision {revision!r}. Write --revision main.") from None
    except GatedRepoError:
        raise EntropyForkError(f"{source.hub} wants you to log in and accept its terms. {instead}") from None
    except RepositoryNotFoundError:
        raise EntropyForkError(f"the hub has no data set {source.hub} (or it is private). {instead}") from None
    except Exception as error:  # every HTTP library and version has exceptions of its own
        raise EntropyForkError(f"cannot load {source.hub} from the hub ({first_line(error)}). {instead}") from None
    origin = {"hub": source.hub, "config": source.config, "split": source.split, "revision": commit}
    return SourceRows(_columns(source, source.hub, data.with_format("arrow")), len(data), origin)


def from_files(source: Source, paths: Path | Sequence[Path]) -> SourceRows:
    """Read local parquet, JSON lines, JSON or CSV files.

    Args:
        source: the data set, with the names of its columns.
        paths: a file, or a folder such as the download of a hub repository; or several.

    Raises:
        EntropyForkError: there is nothing that can be read.
    """
    given = [paths] if isinstance(paths, Path) else paths
    files = list(dict.fromkeys(file for path in given for file in files_at(source, path)))
    counts = [number_of_rows(file) for file in files]
    known = [count for count in counts if count is not None]
    total = sum(known) if len(known) == len(files) else None
    origin = {"files": [{"name": file.name, "sha256": _sha256_of_input(file)} for file in files]}
    return SourceRows(_rows_of(source, files), total, origin)


def _sha256_of_input(file: Path) -> str:
    try:
        return sha256(file)
    except OSError as error:
        raise EntropyForkError(why_unreadable(file, error)) from None


def _rows_of(source: Source, files: Iterable[Path]) -> Iterator[pa.Table]:
    wanted = [*source.question, *source.answer, *source.identifier, *source.only]
    for file in files:
        first = True
        for batch in read_file(file, BATCH_ROWS, [*wanted, source.context] if source.context else wanted):
            yield text_columns(source, str(file), batch, first)
            first = False
        if first:
            raise EntropyForkError(f"{file} has no rows")


def _columns(source: Source, place: str, data: Any) -> Iterator[pa.Table]:
    batches = data.iter(batch_size=BATCH_ROWS)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:  # broken rows surface here, while streaming
            raise EntropyForkError(why_unreadable(place, error)) from None
        yield text_columns(source, place, batch)


def text_columns(source: Source, place: str, batch: Batch, all_must_be_there: bool = True) -> pa.Table:
    """Bring a batch of a source's rows to the columns :data:`COLUMNS`.

    Args:
        source: the data set.
        place: where the rows come from, for errors.
        batch: some of its rows, with the columns of the source.
        all_must_be_there: False for a later batch of a JSON file, whose rows may lack what those before had.

    Raises:
        EntropyForkError: a column of the source is missing, or its type holds no text.
    """
    length = len(batch)
    columns = [_find(batch, names) for names in (source.question, source.answer)]
    if all_must_be_there and any(column is None for column in columns):
        raise EntropyForkError(_missing(source, place, batch))
    questions, answers = ([None] * length if column is None else column for column in columns)
    asked, answered = _question(questions), _answer(answers, source.list_is_a_set)
    if asked is None or answered is None:
        names, column = (source.question, questions) if asked is None else (source.answer, answers)
        raise EntropyForkError(
            f"{place}: the column {' or '.join(names)} of {source.name} holds no text; its type is {_type(column)}. "
            f"{_expected(source, batch)}"
        )
    question, messages = asked
    answer, reason = answered
    identifier = _optional(batch, source.identifier)

    for name, (wanted, why) in source.only.items():
        if (value := _optional(batch, (name,))) is not None:
            other = pc.not_equal(pc.utf8_lower(value), wanted)
            reason = pc.if_else(pc.fill_null(other, False), why, reason)
    reason = pc.if_else(pc.fill_null(pc.equal(messages, 1), True), reason, "not_one_message")
    question = pc.utf8_trim_whitespace(question)
    # A row that was flattened to text has the same words around its question, or none.
    prefix, suffix = source.prefix.strip(), source.suffix.strip()
    if source.instructed:
        instructed = pc.and_(pc.starts_with(question, prefix), pc.ends_with(question, suffix))
        other = pc.and_(pc.is_valid(messages), pc.invert(pc.fill_null(instructed, True)))
        reason = pc.coalesce(reason, pc.if_else(other, "other_instruction", None))
    # Sliced by length, where the text is there: Arrow's trim functions take sets of characters.
    for text, has, cut in (
        (prefix, pc.starts_with, {"start": len(prefix)}),
        (suffix, pc.ends_with, {"start": 0, "stop": -len(suffix)}),
    ):
        if text:
            question = pc.if_else(has(question, text), pc.utf8_slice_codeunits(question, **cut), question)
    if source.context is not None and (context := _optional(batch, (source.context,))) is not None:
        context = pc.utf8_trim_whitespace(pc.fill_null(context, ""))
        joined = pc.binary_join_element_wise(context, question, "\n")
        question = pc.if_else(pc.equal(context, ""), question, joined)
    return pa.table(
        [question, answer, pa.nulls(length, pa.string()) if identifier is None else identifier, reason],
        names=list(COLUMNS),
    )


#: the values of a column: of an Arrow table, or of rows that were read from JSON or CSV
Column: TypeAlias = "pa.Array | list[Any]"


def _question(column: Column) -> tuple[pa.Array, pa.Array] | None:
    """The text of each question, and for chat messages how many there are, else null. None if nothing holds text."""
    if isinstance(column, pa.Array):
        if (plain := _plain_text(column)) is not None:
            return plain, pa.nulls(len(column), pa.int64())
        if (chat := _chat(column)) is not None:
            return chat
        if not _looked_at_one_by_one(column.type) or pa.types.is_decimal(column.type):
            return None
        column = column.to_pylist()
    texts = [_question_text(value) for value in column]
    if any(value is not None for value in column) and all(text is None and count is None for text, count in texts):
        return None
    return (
        pa.array([text for text, _ in texts], pa.string()),
        pa.array([count for _, count in texts], pa.int64()),
    )


def _chat(column: pa.Array) -> tuple[pa.Array, pa.Array] | None:
    """The first message of each row and the number of messages, where Arrow can do it: DAPO-Math-17K is such."""
    if not pa.types.is_list(column.type) or not pa.types.is_struct(message := column.type.value_type):
        return None
    if message.get_field_index("content") < 0 or not pa.types.is_string(message.field("content").type):
        return None
    lengths = pc.list_value_length(column)
    first = pc.list_flatten(pc.list_slice(column, 0, 1))  # none for an empty list
    there = pc.fill_null(pc.greater(lengths, 0), False)
    content = pc.struct_field(first, "content")
    question = pc.replace_with_mask(pa.nulls(len(column), pa.string()), there, content)
    return question, lengths.cast(pa.int64())


def _question_text(value: Any) -> tuple[str | None, int | None]:
    """The text of a question, and how many chat messages it is; no number for text."""
    if isinstance(value, str):
        return _whole(value), None
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return None, None
    content = value[0].get("content") if value else None
    return (_whole(content) if isinstance(content, str) else None), len(value)


def _answer(column: Column, list_is_a_set: bool) -> tuple[pa.Array, pa.Array] | None:
    """The text of each answer, and the reason why it cannot be used or null. None if the type holds no answers."""
    if isinstance(column, pa.Array):
        plain = _plain_text(column, numbers=True)
        if plain is not None:
            return plain, pa.nulls(len(column), pa.string())
        if not _looked_at_one_by_one(column.type):
            return None
        column = column.to_pylist()
    texts = [_answer_text(value, list_is_a_set) for value in column]
    return pa.array([text for text, _ in texts], pa.string()), pa.array([reason for _, reason in texts], pa.string())


def _answer_text(value: Any, list_is_a_set: bool = False) -> tuple[str | None, str | None]:
    """An answer as text, and why it cannot be used. A list, of which any answer is right, becomes a list in JSON."""
    if value is None:
        return None, None
    if isinstance(value, str):
        return _whole(value), None
    if isinstance(value, Decimal):
        return str(value), None
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value)), None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value), None
    if isinstance(value, list):
        texts = [_answer_text(each)[0] for each in value if not isinstance(each, (list, dict, bool))]
        whole = [text for text in texts if text is not None]
        if len(whole) == len(value) > 0:
            return (", ".join(whole) if list_is_a_set else json.dumps(whole, ensure_ascii=False)), None
    fault = fault_of(value)
    reason = "answer_of_another_kind" if fault is None else fault.reason
    return _whole(json.dumps(value, ensure_ascii=False, default=str)), reason


def _whole(text: str) -> str:
    """A text that can be written as UTF-8. JSON can hold half of a character (a lone surrogate)."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _looked_at_one_by_one(kind: pa.DataType) -> bool:
    tests = (pa.types.is_nested, pa.types.is_boolean, pa.types.is_decimal)
    return any(test(kind) for test in tests)


def _plain_text(column: pa.Array, numbers: bool = False) -> pa.Array | None:
    """A column of texts, or of numbers too, as text; None if its type is another."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if any(test(kind) for test in texts) or (numbers and (pa.types.is_integer(kind) or pa.types.is_floating(kind))):
        return column.cast(pa.string())
    return None


def _optional(batch: Batch, names: tuple[str, ...]) -> pa.Array | None:
    """A column as text; None if it is absent or its type holds no text."""
    found = _find(batch, names)
    if isinstance(found, pa.Array):
        return _plain_text(found, numbers=True)
    if found is None:
        return None
    return pa.array(
        [None if isinstance(value, (list, dict)) else _answer_text(value)[0] for value in found], pa.string()
    )


def _missing(source: Source, place: str, batch: Batch) -> str:
    """The error message for rows that lack a column of the source."""
    if not source.own:
        return f"{place} does not look like {source.name}: {_expected(source, batch)}"
    option, name = next(
        (option, names[0])
        for option, names in (("--question", source.question), ("--answer", source.answer))
        if _find(batch, names) is None
    )
    there = column_names(batch, fields=True)
    close = difflib.get_close_matches(name, there, 1)
    lower = [each for each in there if each.lower() == name.lower()]
    hint = "; did you mean " + (lower or close)[0] + "?" if lower or close else "."
    return f"{place} has no column {name!r} ({option}){hint} It has the columns {_listed(column_names(batch))}."


def _expected(source: Source, batch: Batch) -> str:
    paths = " and ".join(" or ".join(names) for names in (source.question, source.answer))
    return f"it has the columns {_listed(column_names(batch))}; the columns must be {paths}."


def _listed(names: Sequence[str], at_most: int = 30) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return (", ".join(names[:at_most]) or "none") + more


def _type(column: Column) -> str:
    if isinstance(column, pa.Array):
        return str(column.type)
    return str(pa.infer_type([value for value in column if value is not None][:1]))


def _find(batch: Batch, names: tuple[str, ...]) -> Column | None:
    """The first of these columns that exists; ``a.b`` is the field b of the mapping a."""
    for name in names:
        found = _rows_column(batch, name) if isinstance(batch, list) else _table_column(batch, name)
        if found is not None:
            return found
    return None


def _table_column(table: pa.Table, name: str) -> pa.Array | None:
    if name in table.column_names:
        return _in_one(table.column(name))
    root, *fields = name.split(".")
    if root not in table.column_names:
        return None
    array = _in_one(table.column(root))
    for part in fields:
        if not pa.types.is_struct(array.type) or array.type.get_field_index(part) < 0:
            return None
        array = pc.struct_field(array, part)
    return array


def _in_one(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return pa.concat_arrays(whole.chunks) if isinstance(whole, pa.ChunkedArray) else whole


def _rows_column(rows: list[dict[str, Any]], name: str) -> list[Any] | None:
    if any(name in row for row in rows):
        return [row.get(name) for row in rows]
    root, *fields = name.split(".")
    if not fields:
        return None
    values = [row.get(root) for row in rows]
    for part in fields:
        if not any(isinstance(value, dict) and part in value for value in values):
            return None
        values = [value.get(part) if isinstance(value, dict) else None for value in values]
    return values


def sha256(file: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
