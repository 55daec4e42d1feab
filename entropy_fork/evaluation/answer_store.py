"""Every answer is written to disk when it is finished, so that a second call continues where the first one stopped.

``answers.jsonl`` has one line per answer. ``manifest.json`` says which model, questions and sampling settings they
belong to. A call with others is refused, because a mean over a mixture means nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.output_folder import lock, refuse_other, write_whole

ANSWERS, MANIFEST = "answers.jsonl", "manifest.json"


class StoredAnswer(Protocol):
    """What an :class:`AnswerStore` keeps: a dataclass whose values JSON can write."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def key(self) -> tuple[int, int]:
        """(question, sample)."""
        ...

    def without_content(self) -> Any:
        """The same without its long fields: all answers of a benchmark would fill a machine's memory."""
        ...


@dataclass(frozen=True)
class ScoredAnswer:
    """One scored answer.

    Attributes:
        question: index of the question over all files, in order.
        sample: number of the answer among those to this question, from 0.
        seed: the seed that its tokens were drawn with.
        data_source: the benchmark of the question.
        tokens: its length in tokens, the end token included.
        truncated: whether the length limit ended it.
        score: what the reward gave, 1 for a right answer.
        boxed: whether it has a box that can be read.
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
        """Question and number of the answer, by which an :class:`AnswerStore` finds it."""
        return self.question, self.sample

    def without_content(self) -> ScoredAnswer:
        """The same without its text, as an :class:`AnswerStore` keeps it in memory."""
        return replace(self, text="")


R = TypeVar("R", bound=StoredAnswer)


class AnswerStore(Generic[R]):
    """The answers in one folder, open for one process at a time.

    ``records`` has the answers by (question, sample), without their content; :meth:`whole` reads it from disk.

    Args:
        folder: made if it does not exist.
        identity: what all answers have in common, as a dict that JSON can write (nested dicts allowed).
        notes: further facts for the manifest, which are not compared.
        kind: the class of the answers.

    Raises:
        EntropyForkError: the folder holds something else, answers of another identity, or is in use.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        notes: dict[str, Any] | None = None,
        kind: type[R] = ScoredAnswer,  # type: ignore[assignment]
    ):
        self.folder = folder
        self.records: dict[tuple[int, int], R] = {}
        self._kind = kind
        self._places: dict[tuple[int, int], int] = {}
        manifest = folder / MANIFEST
        if folder.is_dir() and any(folder.iterdir()) and not manifest.is_file():
            raise EntropyForkError(f"{folder} has files of something else: choose another folder with --output")
        if manifest.is_file() and not is_evaluation(manifest.parent):
            raise EntropyForkError(f"{manifest} is not of an evaluation: choose another folder with --output")
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / ANSWERS).open("a+b")
        try:
            lock(self._file, folder)
            self._read()
            if self.records:
                there = json.loads(manifest.read_text())
                refuse_other(
                    folder, "answers of another evaluation", *_with_paths(there["identity"], there, identity, notes)
                )
            write_whole(manifest, json.dumps({"identity": identity, **(notes or {})}, indent=2) + "\n")
        except BaseException:
            self.close()
            raise

    def whole(self, key: tuple[int, int]) -> R:
        """An answer with its content."""
        self._file.seek(self._places[key])
        return _parsed(
            self._file.readline(), self._kind, f"the line at byte {self._places[key]} of {self.folder / ANSWERS}"
        )

    def _read(self) -> None:
        """Read the answers on disk, and cut off a last line that a killed process did not finish."""
        self._file.seek(0)
        place = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                self._file.truncate(place)
                break
            self._remember(_parsed(line, self._kind, f"line {number} of {self.folder / ANSWERS}"), place)
            place += len(line)
        self._file.seek(0, 2)

    def _remember(self, record: R, place: int) -> None:
        self.records[record.key] = record.without_content()
        self._places[record.key] = place

    def append(self, records: Iterable[R]) -> None:
        """Add these answers to the file; they are in it when this returns."""
        place = self._file.seek(0, 2)
        for record in records:
            line = (json.dumps(asdict(record), ensure_ascii=False) + "\n").encode("utf-8", errors="replace")
            self._file.write(line)
            self._remember(record, place)
            place += len(line)
        self._file.flush()

    def close(self) -> None:
        """Close the file. Everything that was added is in it already."""
        self._file.close()

    def __enter__(self) -> AnswerStore[R]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_answers(folder: Path) -> tuple[dict[str, Any], list[ScoredAnswer]]:
    """The manifest and the answers of a folder, without their texts. Nothing is locked or changed.

    Raises:
        EntropyForkError: the folder is no evaluation, or cannot be read.
    """
    manifest = folder / MANIFEST
    if not is_evaluation(manifest.parent):
        raise EntropyForkError(_what_else(folder))
    records = []
    try:
        with (folder / ANSWERS).open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):  # a killed process may have left a part of the last one
                    records.append(
                        _parsed(line, ScoredAnswer, f"line {number} of {folder / ANSWERS}").without_content()
                    )
    except OSError as error:
        raise EntropyForkError(f"{folder / ANSWERS} cannot be read: {error}") from error
    return json.loads(manifest.read_text(encoding="utf-8")), records


def _parsed(line: bytes, kind: type[R], where: str) -> R:
    """An answer from its line."""
    try:
        values = json.loads(line)
        return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})
    except (ValueError, KeyError, TypeError) as error:
        raise EntropyForkError(f"{where} is not an answer ({error!r}): delete the line") from error


def _what_else(folder: Path) -> str:
    """Why a folder is no evaluation, and what it may be."""
    if not folder.is_dir():
        return f"there is no folder {folder}: name a folder of 'entropy-fork evaluate'"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    if isinstance(manifest, dict) and "source" in manifest and "temperature" in manifest:
        return f"{folder} is of 'entropy-fork analyze', not of 'entropy-fork evaluate': write 'entropy-fork compare'"
    return f"{folder} is no folder of 'entropy-fork evaluate'"


def is_evaluation(folder: Path) -> bool:
    """Whether a store of answers wrote the folder's manifest. Folders of data and of tokens have one, too."""
    try:
        there = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(there, dict) and isinstance(there.get("identity"), dict) and "format" not in there


def _with_paths(
    there: dict[str, Any], manifest: dict[str, Any], now: dict[str, Any], notes: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both identities. Where the models differ, each checksum gets the model's folder behind it, if it is known."""
    if there.get("model") == now.get("model"):
        return there, now
    named = []
    for identity, beside in ((there, manifest), (now, notes or {})):
        model = beside.get("model")
        path = model.get("path") if isinstance(model, dict) else beside.get("model_path")
        named.append(identity if path is None else {**identity, "model": f"{identity.get('model')} ({path})"})
    return named[0], named[1]
