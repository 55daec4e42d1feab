"""Reads the first row of each data file of a run, and the data sources of its rows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

#: the keys with data files
FILE_KEYS = ("train_files", "val_files")

#: of so many lines of a JSON file the data source is read
LINES = 10_000


@dataclass(frozen=True)
class Rows:
    """What is known of the rows of one data file.

    Attributes:
        key: ``train_files`` or ``val_files``.
        path: the file.
        first: its first row; None where it has no row.
        sources: the values of ``data_source``, each once.
    """

    key: str
    path: str
    first: dict[str, Any] | None
    sources: tuple[str, ...]


def files_of(config: DictConfig, key: str) -> list[str]:
    """The files of a key, with ``~`` resolved. Empty where there is none."""
    given: Any = OmegaConf.select(config, f"data.{key}", default=None)
    each = list(given) if isinstance(given, (list, ListConfig)) else [given]
    return [os.path.expanduser(str(file)) for file in each if file is not None and str(file).strip()]


def read_rows(config: DictConfig) -> list[Rows]:
    """The rows of each local file that can be read. What cannot be read is left out: other checks name it."""
    found = []
    for key in FILE_KEYS:
        for path in files_of(config, key):
            if "://" in path or not os.path.isfile(path):
                continue
            try:
                if path.endswith(".parquet"):
                    found.append(Rows(key, path, *_parquet(path)))
                elif path.endswith((".json", ".jsonl")):
                    found.append(Rows(key, path, *_json(path)))
            except (OSError, ValueError, KeyError):
                continue
    return found


def _parquet(path: str) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    wanted = [name for name in file.schema_arrow.names if name not in ("images", "videos", "audios")]
    first = next((batch.to_pylist()[0] for batch in file.iter_batches(1, columns=wanted) if batch.num_rows), None)
    sources: tuple[str, ...] = ()
    if "data_source" in wanted:
        each = pc.unique(file.read(columns=["data_source"]).column("data_source")).to_pylist()
        sources = tuple(str(source) for source in each if source is not None)
    return first, sources


def _json(path: str) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    with open(path, encoding="utf-8") as file:
        rows = list(islice(_lines(file.read() if path.endswith(".json") else file), LINES))
    sources = dict.fromkeys(str(row["data_source"]) for row in rows if row.get("data_source") is not None)
    return (rows[0] if rows else None), tuple(sources)


def _lines(text: Any) -> Iterator[dict[str, Any]]:
    """The rows of JSON lines, or of one list of objects."""
    if isinstance(text, str):
        if text.lstrip().startswith("["):
            yield from (row for row in json.loads(text) if isinstance(row, dict))
            return
        text = text.splitlines()
    for line in text:
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("a line that is no object")
            yield row
