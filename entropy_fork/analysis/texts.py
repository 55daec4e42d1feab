"""The texts to measure: verl's dumps, another folder of tokens, or a model's own answers (``draw_answers.py``).

A source gives the same sequence of texts each time it is read, so that an analysis can continue after a stop. Texts
that were measured already are not tokenised again, and one text is in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from entropy_fork.analysis.measure import TokenIds
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.tokens.store import (
    num_answers,
    parts,
    read_answers,
    read_columns,
    read_manifest,
    read_part,
    token_pieces,
)


@dataclass(frozen=True)
class Text:
    """A prompt and its answer before they are measured; the fields are those of ``tokens.store.AnswerTokens``."""

    answer: int
    ids: TokenIds
    prompt: str
    text: str
    pieces: Sequence[str]
    step: int | None = None
    data_source: str | None = None
    ground_truth: str | None = None
    score: float | None = None
    truncated: bool | None = None


class TextSource(Protocol):
    """Texts in a fixed order. ``kind`` is the manifest's ``source``."""

    kind: str

    def identity(self) -> dict[str, Any]:
        """Everything that decides which texts these are."""
        ...

    def __len__(self) -> int:
        """How many texts."""
        ...

    def texts(self, tokenizer: Any, start: int) -> Iterator[Text]:
        """The texts from number ``start`` on."""
        ...


class Rollouts:
    """Texts that verl writes with ``trainer.rollout_data_dir`` (or ``validation_data_dir``): a ``STEP.jsonl`` per step.

    A line has input and output as text, without special tokens, and gts, score and step
    (verl/trainer/ppo/v1/trainer_base.py: _log_rollout_data). The text is tokenised again.

    Args:
        path: the folder, or one file of it.
        steps: only these steps; empty for all.
        limit: at most this many answers of a step, the first ones; None for all.

    Raises:
        EntropyForkError: there are no such files, or verl did not write a line of them.
    """

    kind = "rollouts"

    def __init__(self, path: Path, steps: Sequence[int] = (), limit: int | None = None):
        self.path, self.steps, self.limit = path, frozenset(steps), limit
        if not path.exists():
            raise EntropyForkError(f"no folder {path}: name the run's trainer.rollout_data_dir with --rollouts")
        files = [path] if path.is_file() else list(path.glob("*.jsonl"))
        self.files = sorted(files, key=lambda file: (_number(file), file.name))
        if not self.files:
            raise EntropyForkError(f"{path} has no *.jsonl: name the run's trainer.rollout_data_dir with --rollouts")

    @cached_property
    def _scanned(self) -> tuple[str, int]:
        digest, count, found = hashlib.sha256(), 0, set()
        for step, row in self._rows():
            digest.update(json.dumps([step, row]).encode())
            found.add(step)
            count += 1
        if missing := sorted(self.steps - found):
            raise EntropyForkError(f"{self.path} has no answers of step {', '.join(map(str, missing))}: name "
                                   f"steps that were dumped with --steps")  # fmt: skip
        if not count:
            raise EntropyForkError(f"{self.path} has no answers: its files are empty")
        return digest.hexdigest(), count

    def identity(self) -> dict[str, Any]:
        """Everything that must be the same to continue a folder."""
        return {"rollouts": self._scanned[0]}

    def __len__(self) -> int:
        return self._scanned[1]

    def texts(self, tokenizer: Any, start: int) -> Iterator[Text]:
        """The answers from number ``start`` on, in the order of steps and lines."""
        for number, (step, row) in enumerate(islice(self._rows(), start, None), start=start):
            prompt, response = (_tokenised(tokenizer, row[name]) for name in ("input", "output"))
            truth, score = row.get("gts"), row.get("score")
            yield Text(
                answer=number,
                ids=TokenIds(prompt, response),
                prompt=row["input"],
                text=row["output"],
                pieces=token_pieces(tokenizer, response),
                step=step,
                data_source=row.get("data_source"),
                ground_truth=None if truth is None else str(truth),
                score=None if score is None else float(score),
            )

    def _rows(self) -> Iterator[tuple[int | None, dict[str, Any]]]:
        taken: Counter[int | None] = Counter()
        for file in self.files:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    row = _row(line, f"line {number} of {file}")
                    step = row.get("step", _number(file) if file.stem.isdecimal() else None)
                    if (self.steps and step not in self.steps) or (self.limit and taken[step] >= self.limit):
                        continue
                    taken[step] += 1
                    yield step, row


class Like:
    """The texts of another folder, token by token, for another checkpoint to measure.

    Args:
        folder: of tokens, complete.
        limit: at most this many answers, the first ones; None for all.

    Raises:
        EntropyForkError: it is not a folder of tokens, or it is unfinished.
    """

    def __init__(self, folder: Path, limit: int | None = None):
        self.folder, self.limit = folder, limit
        self.manifest = read_manifest(folder)
        check_complete(folder, self.manifest)
        self.kind = self.manifest["source"]

    def identity(self) -> dict[str, Any]:
        """Everything that must be the same to continue a folder."""
        return {"like": digest(self.folder)} | ({"limit": self.limit} if self.limit else {})

    def __len__(self) -> int:
        count = sum(num_answers(self.folder, number) for number in parts(self.folder))
        return min(count, self.limit) if self.limit else count

    def texts(self, tokenizer: Any, start: int) -> Iterator[Text]:
        """The answers of the folder from number ``start`` on.

        Raises:
            EntropyForkError: the tokens are not those of this tokenizer.
        """
        for there in islice(read_answers(self.folder), start, self.limit):
            if token_pieces(tokenizer, there.token_ids) != list(there.pieces):
                raise EntropyForkError(
                    f"the tokens of {self.folder} are not those of this model's tokenizer: checkpoints are compared on "
                    f"the same token ids, so both models must have the same tokenizer"
                )
            prompt = there.prompt_ids
            yield Text(
                answer=there.answer,
                ids=TokenIds(_tokenised(tokenizer, there.prompt) if prompt is None else prompt, there.token_ids),
                prompt=there.prompt,
                text=there.text,
                pieces=there.pieces,
                step=there.step,
                data_source=there.data_source,
                ground_truth=there.ground_truth,
                score=there.score,
                truncated=there.truncated,
            )


def check_complete(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise an EntropyForkError if an analysis was stopped before its end."""
    if not manifest.get("complete", True):
        raise EntropyForkError(f"{folder} is not finished: repeat the command 'entropy-fork analyze' that writes it")
    if not parts(folder):
        raise EntropyForkError(f"{folder} has no answers")


def digest(folder: Path) -> str:
    """sha256 of the tokens to measure and their answers. How they are cut into parts does not matter."""
    answers, tokens, lengths = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for number in parts(folder):
        answer, token_id = read_columns(folder, number, "answer", "token_id")
        answers.update(answer.astype("<i8").tobytes())
        tokens.update(token_id.astype("<i4").tobytes())
        for row in read_part(folder, number):
            lengths.update(json.dumps([row.answer, len(row.token_ids), row.prompt]).encode())
    return hashlib.sha256(answers.digest() + tokens.digest() + lengths.digest()).hexdigest()


def _tokenised(tokenizer: Any, text: str) -> np.ndarray:
    clean = text.encode("utf-8", errors="replace").decode("utf-8")
    return np.array(tokenizer(clean, add_special_tokens=False)["input_ids"], dtype=np.int32)


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise EntropyForkError(f"{where} is not JSON ({error}). Is a run still writing it? Repeat it later") from error
    wanted: tuple[tuple[str, Any], ...] = (
        ("input", str), ("output", str), ("score", (int, float, type(None))), ("step", (int, type(None))),
        ("data_source", (str, type(None))),
    )  # fmt: skip
    for name, kind in wanted:
        value = row.get(name) if isinstance(row, dict) else None
        if not isinstance(value, kind):
            raise EntropyForkError(f"{where} is not from a dump of verl's answers: {name} is {value!r}")
    return row


def _number(file: Path) -> int:
    found = re.fullmatch(r"\d+", file.stem)
    return int(found[0]) if found else -1
