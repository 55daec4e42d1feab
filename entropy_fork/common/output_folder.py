"""What commands that fill a folder share: files are whole, one process writes at a time, and nothing is mixed."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from entropy_fork.common.errors import EntropyForkError

#: A checkpoint's folder has this file while a run writes it, and keeps it if the run is killed (``verl/guards/``).
UNFINISHED = "unfinished"

#: A checkpoint's folder has this file beside ``actor``: what the run trains on (``verl/guards/resume.py`` writes it).
SELECTION_FILE = "entropy_fork.json"

#: verl's, in ``trainer.default_local_dir``: the step of the newest checkpoint, written after the checkpoint.
LATEST = "latest_checkpointed_iteration.txt"


def write_whole(file: Path, text: str) -> None:
    """Write a file under another name first and rename it, so that nobody sees it half-written.

    What UTF-8 cannot express (half a surrogate pair, from JSON or from the name of a folder) becomes a question mark.
    """
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as temporary:
            temporary.write(text)
        os.chmod(name, 0o644)
        os.replace(name, file)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def lock(file: IO[Any], folder: Path) -> None:
    """Lock a file of ``folder`` until the file is closed, so that no second process writes there.

    Raises:
        EntropyForkError: another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise EntropyForkError(f"another process is writing to {folder}: wait for it, or end it") from error
    except OSError:
        pass  # the file systems of some clusters have no locks


def refuse_other(folder: Path, what: str, there: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare what a folder holds with what is asked for now. Both are dicts that JSON can write.

    Raises:
        EntropyForkError: they differ; the message has a line for each difference.
    """
    there, now = _flat(there), _flat(json.loads(json.dumps(now)))
    different = [
        f"  {name}: {there.get(name)!r} there, {now.get(name)!r} now"
        for name in dict.fromkeys([*there, *now])
        if there.get(name) != now.get(name)
    ]
    if different:
        raise EntropyForkError(
            f"{folder} holds {what}, and the two must not be mixed:\n"
            + "\n".join(different)
            + "\nRepeat what was asked for there, or choose another folder with --output."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
