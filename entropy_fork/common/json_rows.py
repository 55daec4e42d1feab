"""Rows of a JSON file, one at a time. An error names the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entropy_fork.common.errors import EntropyForkError


def json_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file with one JSON object a line. A file that ends in ``.json`` may be one list of objects instead.

    Raises:
        EntropyForkError: a line is not JSON, or not an object.
        OSError: the file cannot be read.
    """
    if file.suffix.lower() == ".json" and (whole := _whole(file)) is not None:
        for number, row in enumerate(whole):
            yield _checked(row, f"{file}, entry {number} (from 0),")
        return
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                raise EntropyForkError(f"{file} line {number} is no UTF-8 text ({error.reason})") from None
            except (ValueError, RecursionError) as error:
                hint = ""
                if number == 1 and file.suffix.lower() != ".json" and line.strip() == b"[":
                    hint = ". If the file is one JSON list, name it .json"
                raise EntropyForkError(_no_json(file, number, error) + hint) from None
            yield _checked(row, f"{file} line {number}")


def _whole(file: Path) -> list[Any] | None:
    """The entries of a file that is one JSON value; None if it has a value a line."""
    try:
        whole = json.loads(file.read_bytes())
    except UnicodeDecodeError as error:
        raise EntropyForkError(f"{file} is no UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" or not error.doc.strip():
            return None
        raise EntropyForkError(_no_json(file, error.lineno, error)) from None
    except (ValueError, RecursionError) as error:
        raise EntropyForkError(_no_json(file, 1, error)) from None
    return whole if isinstance(whole, list) else [whole]


def _no_json(file: Path, line: int, error: Exception) -> str:
    what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return f"{file} line {line} is not JSON ({what})"


def _checked(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise EntropyForkError(f"{where} is no JSON object with columns but a {type(row).__name__}")
    return row
