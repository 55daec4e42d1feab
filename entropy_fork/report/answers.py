"""The tokens of some hundred answers, packed for the page.

The page must open fast with 800,000 tokens, so an answer is a few compressed columns of numbers until it is chosen.
What the slider for ρ shows is decided here, by ``core/selection.py`` itself: for each token the first of the slider's
stops at which it is kept. A larger ρ keeps what a smaller one keeps, so one byte says it for all stops.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.core.rule import Selector
from entropy_fork.core.selection import select_tokens
from entropy_fork.tokens.store import AnswerTokens, parts, read_manifest, read_part

#: the stops of the slider
RATIOS = [percent / 100 for percent in range(1, 101)]

#: entropies and log-probs are sent in units of this many nats, which is also what the page shows of them
UNIT = 1e-4

#: how a token was treated by whatever wrote the folder
DROPPED, SELECTED, UNKNOWN = 0, 1, 2


@dataclass(frozen=True)
class Pool:
    """Tokens among which the slider keeps a share: those of a folder that are in the page, or of one of its steps.

    Attributes:
        step: of training; None for a whole folder.
        num_tokens: in the page.
        num_kept: at each of :data:`RATIOS`, exactly ceil(ρN).
        threshold: τ in nats at each of them.
    """

    step: int | None
    num_tokens: int
    num_kept: list[int]
    threshold: list[float]


def chosen_answers(folder: Path, limit: int) -> list[AnswerTokens]:
    """At most ``limit`` answers of a folder, evenly spread over it; one part is in memory at a time.

    Raises:
        EntropyForkError: ``folder`` holds no answers.
    """
    read_manifest(folder)
    numbers = parts(folder)
    counts = [_answers_in(folder, number) for number in numbers]
    total = sum(counts)
    if total == 0:
        raise EntropyForkError(f"{folder} holds no answers yet: nothing to show")
    wanted = np.unique(np.linspace(0, total - 1, min(limit, total)).round().astype(int))
    found, start = [], 0
    for number, count in zip(numbers, counts, strict=True):
        inside = wanted[(wanted >= start) & (wanted < start + count)] - start
        if inside.size:
            answers = read_part(folder, number)
            found += [_small(answers[place]) for place in inside]
        start += count
    return found


def _answers_in(folder: Path, number: int) -> int:
    import pyarrow.parquet as pq

    return pq.ParquetFile(folder / "answers" / f"part-{number:05d}.parquet").metadata.num_rows


def _small(answer: AnswerTokens) -> AnswerTokens:
    """A copy that does not hold on to the arrays of its whole part."""
    names = ("token_ids", "entropy", "log_prob", "rank", "selected")
    columns = {name: getattr(answer, name) for name in names if getattr(answer, name) is not None}
    copies: dict[str, Any] = {name: np.array(values) for name, values in columns.items()}
    return replace(answer, **copies, pieces=list(answer.pieces))


def pools_of(answers: Sequence[AnswerTokens]) -> Iterator[tuple[Pool, list[int], list[np.ndarray]]]:
    """A folder's answers by pool: one per step where there are steps.

    Yields:
        the pool; the places of its answers; and of each of these, uint8, shape (tokens,): the index in :data:`RATIOS`
        of the first ρ that keeps the token.

    Raises:
        EntropyForkError: an entropy is not finite.
    """
    for step in sorted({answer.step for answer in answers}, key=lambda step: -1 if step is None else step):
        members = [place for place, answer in enumerate(answers) if answer.step == step]
        yield _pool([answers[place] for place in members], step, members)


def _pool(
    answers: Sequence[AnswerTokens], step: int | None, members: list[int]
) -> tuple[Pool, list[int], list[np.ndarray]]:
    entropy = torch.from_numpy(np.concatenate([answer.entropy for answer in answers]))
    lengths = torch.tensor([len(answer.entropy) for answer in answers])
    everything = torch.ones(entropy.shape, dtype=torch.bool)
    first = np.zeros(entropy.numel(), dtype=np.uint8)
    num_kept, threshold = [], []
    try:
        for ratio in RATIOS:
            selection = select_tokens(entropy, everything, lengths, Selector(ratio))
            first += ~selection.kept.numpy()
            num_kept.append(selection.num_kept)
            threshold.append(selection.threshold)
    except ValueError as error:
        names = ", ".join(str(answer.answer) for answer in answers if not np.isfinite(answer.entropy).all())
        raise EntropyForkError(f"answers {names} of the tokens to show: {error}") from error
    if not entropy.numel():  # all answers are empty; NaN is no JSON
        threshold = [0.0] * len(RATIOS)
    pool = Pool(step, entropy.numel(), num_kept, threshold)
    return pool, members, np.split(first, np.cumsum(lengths.numpy())[:-1])


class Vocabulary:
    """The distinct tokens of the page: (id, piece), each sent once."""

    def __init__(self) -> None:
        self.number_of: dict[tuple[int, str], int] = {}

    def numbers(self, answer: AnswerTokens) -> np.ndarray:
        """Number of each token of an answer, uint32, shape (tokens,)."""
        pairs = zip(answer.token_ids.tolist(), answer.pieces, strict=True)
        return np.array([self.number_of.setdefault(pair, len(self.number_of)) for pair in pairs], dtype=np.uint32)

    def to_json(self) -> dict[str, list[Any]]:
        """Ids and texts of its tokens, by number."""
        return {"ids": [number for number, _ in self.number_of], "pieces": [piece for _, piece in self.number_of]}


def pack(answer: AnswerTokens, numbers: np.ndarray, first: np.ndarray) -> str:
    """An answer's columns behind one another (as ``page.js: unpack`` reads them), compressed, in base64.

    uint32 little endian: number in the vocabulary; entropy and negative log-prob in :data:`UNIT`; rank + 1, 0 where it
    is not known. uint8: index of the first ρ that keeps the token; ``DROPPED``, ``SELECTED`` or ``UNKNOWN``.

    Args:
        answer: its columns.
        numbers: uint32, shape (tokens,), see :class:`Vocabulary`.
        first: uint8, shape (tokens,), see :func:`pools_of`.
    """
    count = len(numbers)
    rank = np.zeros(count) if answer.rank is None else answer.rank.astype(np.int64) + 1
    selected = np.full(count, UNKNOWN) if answer.selected is None else answer.selected
    columns = [
        numbers.astype("<u4"),
        *(np.clip(np.rint(values / UNIT), 0, 2**32 - 1).astype("<u4") for values in _doubles(answer)),
        rank.astype("<u4"),
        first.astype(np.uint8),
        selected.astype(np.uint8),
    ]
    return base64.b64encode(zlib.compress(b"".join(column.tobytes() for column in columns))).decode("ascii")


def _doubles(answer: AnswerTokens) -> tuple[np.ndarray, np.ndarray]:
    return answer.entropy.astype(np.float64), -answer.log_prob.astype(np.float64)


def packed_folders(folders: Sequence[tuple[str, Sequence[AnswerTokens]]]) -> dict[str, Any]:
    """All that ``page.js`` knows of answers, ready for JSON.

    Args:
        folders: of each its name in the page and its answers.
    """
    vocabulary, prompts = Vocabulary(), dict[str, int]()
    found: dict[str, Any] = {"ratios": RATIOS, "unit": UNIT, "folders": [], "pools": [], "answers": []}
    for folder, (name, answers) in enumerate(folders):
        found["folders"].append(name)
        for pool, members, firsts in pools_of(answers):
            number = len(found["pools"])
            found["pools"].append({**vars(pool), "folder": folder})
            for place, first in zip(members, firsts, strict=True):
                answer = answers[place]
                found["answers"].append(
                    {
                        "number": place + 1,
                        "pool": number,
                        "prompt": prompts.setdefault(answer.prompt, len(prompts)),
                        "source": answer.data_source,
                        "truth": answer.ground_truth,
                        "score": None
                        if answer.score is None or not math.isfinite(answer.score)
                        else round(answer.score, 4),
                        "truncated": answer.truncated,
                        "tokens": len(answer.entropy),
                        "entropy": round(float(answer.entropy.mean()), 4) if len(answer.entropy) else 0.0,
                        "data": pack(answer, vocabulary.numbers(answer), first),
                    }
                )
    return {
        **found,
        "prompts": list(prompts),
        "vocabulary": vocabulary.to_json(),
        "full": _full_colour([answer.entropy for _, answers in folders for answer in answers]),
    }


def _full_colour(entropies: Sequence[np.ndarray]) -> float:
    """The entropy from which on a token has the full colour: 1 nat, or what only one in a hundred exceeds."""
    values = np.concatenate(entropies)
    return max(1.0, round(float(np.quantile(values, 0.99)), 1)) if values.size else 1.0
