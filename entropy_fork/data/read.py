"""Read the rows of a source, from the hub or from local files, as batches of text columns.

``datasets`` loads them. ``huggingface_hub`` turns a branch into the commit that the manifest names. All work per row is
done on Arrow columns, because DAPO-Math-17K has 1.79M rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.data.sources import Source

BATCH_ROWS = 50_000

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
"""How ``datasets`` reads a file, by its suffix."""

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
        raise EntropyForkError(f"cannot load {source.hub} from the hub ({_first_line(error)}). {instead}") from None
    origin = {"hub": source.hub, "config": source.config, "split": source.split, "revision": commit}
    return SourceRows(_columns(source, source.hub, data.with_format("arrow")), len(data), origin)


def from_files(source: Source, path: Path) -> SourceRows:
    """Read local parquet, JSON lines or JSON files.

    Args:
        source: the data set, with the names of its columns.
        path: a file, or a folder such as the download of a hub repository.

    Raises:
        EntropyForkError: there is nothing that can be read.
    """
    import datasets

    files = _files(source, path)
    builder = BUILDERS[files[0].suffix]
    try:
        total = sum(pq.read_metadata(file).num_rows for file in files) if builder == "parquet" else None
        # Streaming: no second copy of the data in the cache.
        data = datasets.load_dataset(builder, data_files=[str(file) for file in files], split="train", streaming=True)
    except Exception as error:  # what datasets and pyarrow raise for a broken file depends on the break
        raise _unreadable(path, error) from None
    origin = {"files": [{"name": file.name, "sha256": sha256(file)} for file in files]}
    return SourceRows(_columns(source, str(path), data.with_format("arrow")), total, origin)


def _files(source: Source, path: Path) -> list[Path]:
    """The files of a source at a path. In a repository with several data sets, only its own."""
    if not path.exists():
        raise EntropyForkError(f"there is no file or folder {path}")
    if path.is_file():
        found = [path]
    elif source.file is not None and (path / source.file).is_file():
        found = [path / source.file]
    else:
        found = sorted(file for file in path.rglob("*") if file.suffix in BUILDERS and file.is_file())
        found = [file for file in found if not any(p.startswith(".") for p in file.relative_to(path).parts)]
        if source.config is not None:
            found = [file for file in found if source.config in str(file.relative_to(path))] or found
    if not found or any(file.suffix not in BUILDERS for file in found):
        raise EntropyForkError(f"{path} has no file that can be read: --from takes {', '.join(BUILDERS)}")
    if len({BUILDERS[file.suffix] for file in found}) > 1:
        names = ", ".join(str(file.relative_to(path)) for file in found[:4])
        raise EntropyForkError(f"{path} holds files of several kinds ({names}, …): write --from with one of them")
    return found


def _columns(source: Source, place: str, data: Any) -> Iterator[pa.Table]:
    batches = data.iter(batch_size=BATCH_ROWS)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:  # broken rows surface here, while streaming
            raise _unreadable(place, error) from None
        yield text_columns(source, place, batch)


def _unreadable(place: Path | str, error: Exception) -> EntropyForkError:
    return EntropyForkError(f"{place} cannot be read ({_first_line(error.__cause__ or error)})")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def text_columns(source: Source, place: str, table: pa.Table) -> pa.Table:
    """Bring a batch of a source's rows to the columns :data:`COLUMNS`.

    Args:
        source: the data set.
        place: where the rows come from, for errors.
        table: a batch of its rows, with the columns of the source.

    Raises:
        EntropyForkError: a column of the source is missing, or its type holds no text.
    """
    question, chat = _question(source, place, table)
    answer = _text(_column(source, place, table, source.answer), numbers=True)
    if question is None or answer is None:
        wrong = source.question if question is None else source.answer
        raise EntropyForkError(
            f"{place}: the column {' or '.join(wrong)} of {source.name} holds no text; its type is "
            f"{_column(source, place, table, wrong).type}. {_expected(source, table)}"
        )
    identifier = _optional(table, source.identifier)

    reason = pa.nulls(len(table), pa.string())
    for column, (wanted, why) in source.only.items():
        if (value := _optional(table, (column,))) is not None:
            other = pc.not_equal(pc.utf8_lower(value), wanted)
            reason = pc.if_else(pc.fill_null(other, False), why, reason)
    if chat is not None:
        reason = pc.if_else(pc.fill_null(chat, True), reason, "not_one_message")
        if source.instructed:
            instructed = pc.and_(pc.starts_with(question, source.prefix), pc.ends_with(question, source.suffix))
            reason = pc.coalesce(reason, pc.if_else(pc.fill_null(instructed, True), None, "other_instruction"))
        # Sliced by length, where the text is there: Arrow's trim functions take sets of characters.
        for text, has, cut in (
            (source.prefix, pc.starts_with, {"start": len(source.prefix)}),
            (source.suffix, pc.ends_with, {"start": 0, "stop": -len(source.suffix)}),
        ):
            if text:
                question = pc.if_else(has(question, text), pc.utf8_slice_codeunits(question, **cut), question)
    if source.context is not None and (context := _optional(table, (source.context,))) is not None:
        context = pc.utf8_trim_whitespace(pc.fill_null(context, ""))
        joined = pc.binary_join_element_wise(context, question, "\n")
        question = pc.if_else(pc.equal(context, ""), question, joined)
    return pa.table(
        [question, answer, pa.nulls(len(table), pa.string()) if identifier is None else identifier, reason],
        names=list(COLUMNS),
    )


def _question(source: Source, place: str, table: pa.Table) -> tuple[pa.Array | None, pa.Array | None]:
    """The text of the question, and for chat messages whether a row has exactly one of them."""
    column = _column(source, place, table, source.question)
    if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
        return _text(column), None
    message = column.type.value_type
    if not pa.types.is_struct(message) or message.get_field_index("content") < 0:
        return None, None
    lengths = pc.list_value_length(column)
    first = pc.list_flatten(pc.list_slice(column, 0, 1))  # none for an empty list
    there = pc.fill_null(pc.greater(lengths, 0), False)
    content = _text(pc.struct_field(first, "content"))
    if content is None:
        return None, None
    return pc.replace_with_mask(pa.nulls(len(table), pa.string()), there, content), pc.equal(lengths, 1)


def _text(column: pa.Array, numbers: bool = False) -> pa.Array | None:
    """A column as text; a list of texts is joined with commas. None if its type holds no text."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        return column.cast(pa.string())
    if numbers and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return column.cast(pa.string())
    if (
        numbers
        and pa.types.is_list(kind)
        and (pa.types.is_string(kind.value_type) or pa.types.is_null(kind.value_type))
    ):
        return pc.binary_join(column.cast(pa.list_(pa.string())), ", ")
    return None


def _column(source: Source, place: str, table: pa.Table, names: tuple[str, ...]) -> pa.Array:
    found = _find(table, names)
    if found is None:
        raise EntropyForkError(f"{place} does not look like {source.name}: {_expected(source, table)}")
    return found


def _optional(table: pa.Table, names: tuple[str, ...]) -> pa.Array | None:
    """A column as text; None if it is absent or its type holds no text."""
    found = _find(table, names)
    return None if found is None else _text(found, numbers=True)


def _expected(source: Source, table: pa.Table) -> str:
    paths = " and ".join(" or ".join(names) for names in (source.question, source.answer))
    return f"it has the columns {', '.join(table.column_names)}; the columns must be {paths}."


def _find(table: pa.Table, names: tuple[str, ...]) -> pa.Array | None:
    """The first of these columns that exists; ``a.b`` is the field b of the struct column a."""
    for name in names:
        column, _, part = name.partition(".")
        if column in table.column_names:
            array = _array(table, column)
            if not part:
                return array
            if pa.types.is_struct(array.type) and array.type.get_field_index(part) >= 0:
                return pc.struct_field(array, part)
    return None


def _array(table: pa.Table, column: str) -> pa.Array:
    return table.column(column).combine_chunks()


def sha256(file: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
