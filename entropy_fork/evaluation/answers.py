"""Every answer on disk as soon as it is there, so that a second call goes on where the first one stopped.

``answers.jsonl`` has one line per answer. ``manifest.json`` says what they are answers of: a call with another model,
other questions or other sampling settings is refused, because a mean over a mixture means nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from entropy_fork.verl.errors import EntropyForkError

ANSWERS, MANIFEST = "answers.jsonl", "manifest.json"


@dataclass(frozen=True)
class Record:
    """One scored answer.

    Attributes:
        question: index of the question over all files, in order.
        sample: number of the answer to that question, from 0.
        seed: what its tokens were drawn with.
        tokens: its length, the end token included.
        truncated: whether it ended because of the length limit.
        score: what the reward gave, 1 for a right answer.
        boxed: whether it has a box at all.
        text: the answer without special tokens, as the reward saw it.
        above: with two temperatures, how many of its tokens were drawn above the threshold.
    """

    question: int
    sample: int
    seed: int
    data_source: str
    tokens: int
    truncated: bool
    score: float
    boxed: bool
    text: str
    above: int | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.question, self.sample


class AnswerStore:
    """The answers in one folder, open for one process at a time.

    ``records`` has them by (question, sample), without their texts: those of a benchmark fill a machine's memory.

    Args:
        folder: made if it is not there.
        identity: what all answers have in common, as a dict of what JSON can write (nested dicts allowed).
        notes: further facts for the manifest, which are not compared.

    Raises:
        EntropyForkError: the folder holds something else, answers of another identity, or is in use.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], notes: dict[str, Any] | None = None):
        self.folder = folder
        self.records: dict[tuple[int, int], Record] = {}
        manifest = folder / MANIFEST
        if folder.is_dir() and any(folder.iterdir()) and not manifest.is_file():
            raise EntropyForkError(f"{folder} holds no evaluation but other files: choose another folder with --output")
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / ANSWERS).open("a+b")
        try:
            self._lock()
            self._read()
            if self.records:
                self._compare(json.loads(manifest.read_text())["identity"], json.loads(json.dumps(identity)))
            write_whole(manifest, json.dumps({"identity": identity, **(notes or {})}, indent=2) + "\n")
        except BaseException:
            self.close()
            raise

    def _compare(self, there: dict[str, Any], now: dict[str, Any]) -> None:
        there, now = _flat(there), _flat(now)
        different = [
            f"  {name}: {there.get(name)!r} there, {now.get(name)!r} now"
            for name in dict.fromkeys([*there, *now])
            if there.get(name) != now.get(name)
        ]
        if different:
            raise EntropyForkError(
                f"{self.folder} holds answers of another evaluation, and the two must not be mixed:\n"
                + "\n".join(different)
                + "\nRepeat what was asked for there, or choose another folder with --output."
            )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EntropyForkError(f"another process is writing to {self.folder}: wait for it, or end it") from error
        except OSError:
            pass  # file systems of some clusters have no locks

    def _read(self) -> None:
        """Take up what is there, and cut off a last line that a killed process did not finish."""
        self._file.seek(0)
        content = self._file.read()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            self._file.truncate(complete)
        names = {field.name for field in fields(Record)}
        for number, line in enumerate(content[:complete].splitlines(), start=1):
            try:
                values = json.loads(line)
                record = Record(**{name: values[name] for name in names & values.keys()})
            except (ValueError, KeyError, TypeError) as error:
                raise EntropyForkError(
                    f"line {number} of {self.folder / ANSWERS} is no answer ({error!r}): delete the line"
                ) from error
            self._remember(record)

    def _remember(self, record: Record) -> None:
        self.records[record.key] = replace(record, text="")

    def append(self, records: Iterable[Record]) -> None:
        """Keep these answers; they are in the file when this returns."""
        records = list(records)
        lines = [json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records]
        self._file.write("".join(lines).encode("utf-8", errors="replace"))
        self._file.flush()
        for record in records:
            self._remember(record)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_whole(file: Path, text: str) -> None:
    """Write a file under another name first, so that it is never seen half-written."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as temporary:
            temporary.write(text)
        os.chmod(name, 0o644)
        os.replace(name, file)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
