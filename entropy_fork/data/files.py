"""Local data files, a batch of rows at a time: parquet, JSON lines, JSON and CSV.

JSON and CSV are read by Python, row by row: a column may hold values of several kinds, and an error names the line.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.json_rows import json_rows
from entropy_fork.data.sources import Source

#: rows: a table of Arrow's, or what JSON and CSV hold
Batch: TypeAlias = "pa.Table | list[dict[str, Any]]"

#: what kind of file a suffix means
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}

#: characters of one cell of a CSV file; csv's own limit is 131,072
_LONGEST_CELL = 2**31 - 1


def files_at(source: Source, path: Path) -> list[Path]:
    """The files of a source at a path. In a repository with several data sets, only its own.

    Raises:
        EntropyForkError: there is no file, or none that can be read, or several kinds of them.
    """
    if not path.exists():
        raise EntropyForkError(f"there is no file or folder {path}")
    if path.is_file():
        found = [path]
    elif source.file is not None and (path / source.file).is_file():
        found = [path / source.file]
    else:
        found = sorted(file for file in path.rglob("*") if _kind(file) and file.is_file())
        found = [file for file in found if not any(p.startswith(".") for p in file.relative_to(path).parts)]
        if source.config is not None:
            found = [file for file in found if source.config in str(file.relative_to(path))] or found
        if source.test_split is not None:  # a download has both splits, train-00000-of-00001.parquet beside test-…
            found = [file for file in found if file.name.startswith(source.split)] or found
    if not found or any(_kind(file) is None for file in found):
        raise EntropyForkError(f"{path} has no file that can be read: write files that end in {', '.join(KINDS)}")
    if len({_kind(file) for file in found}) > 1:
        names = ", ".join(str(file.relative_to(path)) for file in found[:4])
        raise EntropyForkError(f"{path} holds files of several kinds ({names}, …): name one of them")
    return found


def _kind(file: Path) -> str | None:
    return KINDS.get(file.suffix.lower())


def number_of_rows(file: Path) -> int | None:
    """How many rows a parquet file has; None for other files, which say so only when they were read.

    Raises:
        EntropyForkError: it is no parquet file.
    """
    if _kind(file) != "parquet":
        return None
    try:
        return int(pq.read_metadata(file).num_rows)
    except (OSError, ValueError) as error:
        raise EntropyForkError(why_unreadable(file, error)) from None


def read_file(file: Path, rows: int, columns: Iterable[str]) -> Iterator[Batch]:
    """The rows of a file.

    Args:
        file: its suffix says how it is read.
        rows: how many rows a batch has at most.
        columns: what is needed of a parquet file, if it is there; ``a.b`` needs ``a``. Other columns of a table may be
            missing.

    Raises:
        EntropyForkError: it cannot be read; the message says why, and the line in JSON and CSV.
    """
    kind = _kind(file)
    try:
        if kind == "parquet":
            yield from _parquet(file, rows, columns)
        else:
            yield from _in_batches(_csv(file) if kind == "csv" else json_rows(file), rows)
    except EntropyForkError:
        raise
    except UnicodeDecodeError as error:
        raise EntropyForkError(f"{file} is no UTF-8 text ({error.reason} at byte {error.start})") from None
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors are ValueErrors as well
        raise EntropyForkError(why_unreadable(file, error)) from None


def _parquet(file: Path, rows: int, columns: Iterable[str]) -> Iterator[pa.Table]:
    with pq.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        needed = [name for name in names if any(name in (each, each.split(".")[0]) for each in columns)]
        for batch in parquet.iter_batches(rows, columns=needed):
            columns_read = dict(zip(batch.schema.names, batch.columns, strict=True))
            # The others are there with their names only, for messages.
            yield pa.table(
                [columns_read.get(field.name, _nothing(field.type, len(batch))) for field in parquet.schema_arrow],
                names=names,
            )


def _nothing(kind: pa.DataType, length: int) -> pa.Array:
    return pa.nulls(length, kind if pa.types.is_struct(kind) else pa.null())


def _in_batches(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _csv(file: Path) -> Iterator[dict[str, Any]]:
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            try:
                header = next(reader, [])
                if twice := [name for name in header if header.count(name) > 1]:
                    raise EntropyForkError(f"{file} has two columns of the name {twice[0]!r}")
                for cells in reader:
                    if len(cells) > len(header):
                        raise EntropyForkError(
                            f"{file} line {reader.line_num} has {len(cells)} cells, and the first line names "
                            f"{len(header)} columns: put a text with commas between double quotes"
                        )
                    if cells:
                        yield {name: cell or None for name, cell in zip(header, cells, strict=False)}
            except csv.Error as error:
                raise EntropyForkError(f"{file} line {reader.line_num} is not CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def column_names(batch: Batch, fields: bool = False) -> list[str]:
    """The names of the columns of some rows.

    Args:
        batch: the rows.
        fields: give also the fields of mappings, as ``a.b``.
    """
    if isinstance(batch, list):
        names = list(dict.fromkeys(name for row in batch for name in row))
        inner = [f"{name}.{part}" for row in batch[:100] for name, value in row.items() if isinstance(value, dict)
                 for part in value]  # fmt: skip
    else:
        names = list(batch.column_names)
        inner = [f"{each.name}.{part.name}" for each in batch.schema if pa.types.is_struct(each.type)
                 for part in each.type.fields]  # fmt: skip
    return [*names, *dict.fromkeys(inner)] if fields else names


def why_unreadable(place: Path | str, error: Exception) -> str:
    """The error message for a file that cannot be read, in one line."""
    return f"{place} cannot be read ({first_line(error.__cause__ or error)})"


def first_line(error: BaseException) -> str:
    """What an error says, without what follows its first line."""
    lines: Sequence[str] = f"{type(error).__name__}: {str(error).strip()}".splitlines()
    return lines[0]
