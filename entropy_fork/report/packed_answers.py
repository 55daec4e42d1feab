"""Pack the tokens of some hundred answers for the page.

The page must open fast with 800,000 tokens, so an answer is a few compressed columns of numbers until it is chosen.
What the slider for ρ shows is computed here, by ``core/selection.py`` itself: for each token the first stop of the
slider at which it is kept. A larger ρ keeps all that a smaller one keeps, so one byte per token is enough.
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

#: entropies and log-probs are stored as multiples of this many nats; the page shows no more digits
UNIT = 1e-4

#: what the writer of the folder did with a token
DROPPED, SELECTED, UNKNOWN = 0, 1, 2


@dataclass(frozen=True)
class SliderPool:
    """The tokens among which the slider keeps a share: those of a folder that the page has, or of one step of it.

    Attributes:
        step: step of training; None for a whole folder.
        num_tokens: how many of the pool's tokens the page has.
        num_kept: how many are kept at each of :data:`RATIOS`, exactly ceil(ρN).
        threshold: τ in nats at each of :data:`RATIOS`.
    """

    step: int | None
    num_tokens: int
    num_kept: list[int]
    threshold: list[float]


def chosen_answers(folder: Path, limit: int) -> list[AnswerTokens]:
    """At most ``limit`` answers of a folder, evenly spread. One part is in memory at a time.

    Raises:
        EntropyForkError: ``folder`` has no answers.
    """
    read_manifest(folder)
    numbers = parts(folder)
    counts = [_answers_in(folder, number) for number in numbers]
    total = sum(counts)
    if total == 0:
        raise EntropyForkError(f"{folder} has no answers yet, so there is nothing to show")
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
    """A copy that does not keep the arrays of the whole part in memory."""
    names = ("token_ids", "entropy", "log_prob", "rank", "selected")
    columns = {name: getattr(answer, name) for name in names if getattr(answer, name) is not None}
    copies: dict[str, Any] = {name: np.array(values) for name, values in columns.items()}
    return replace(answer, **copies, pieces=list(answer.pieces))


def pools_of(answers: Sequence[AnswerTokens]) -> Iterator[tuple[SliderPool, list[int], list[np.ndarray]]]:
    """A folder's answers by pool: one per step where there are steps.

    Yields:
        the pool; the places of its answers; and for each of these answers, uint8, shape (tokens,): the index in
        :data:`RATIOS` of the first ρ that keeps the token.

    Raises:
        EntropyForkError: an entropy is not finite.
    """
    for step in sorted({answer.step for answer in answers}, key=lambda step: -1 if step is None else step):
        members = [place for place, answer in enumerate(answers) if answer.step == step]
        yield _pool([answers[place] for place in members], step, members)


def _pool(
    answers: Sequence[AnswerTokens], step: int | None, members: list[int]
) -> tuple[SliderPool, list[int], list[np.ndarray]]:
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
        raise EntropyForkError(f"answers {names} cannot be shown: {error}") from error
    if not entropy.numel():  # all answers are empty; JSON has no NaN
        threshold = [0.0] * len(RATIOS)
    pool = SliderPool(step, entropy.numel(), num_kept, threshold)
    return pool, members, np.split(first, np.cumsum(lengths.numpy())[:-1])


class Vocabulary:
    """The distinct tokens of the page, as (id, piece). Each one is stored once."""

    def __init__(self) -> None:
        self.number_of: dict[tuple[int, str], int] = {}

    def numbers(self, answer: AnswerTokens) -> np.ndarray:
        """The number of each token of an answer, uint32, shape (tokens,)."""
        pairs = zip(answer.token_ids.tolist(), answer.pieces, strict=True)
        return np.array([self.number_of.setdefault(pair, len(self.number_of)) for pair in pairs], dtype=np.uint32)

    def to_json(self) -> dict[str, list[Any]]:
        """Ids and texts of its tokens, by number."""
        return {"ids": [number for number, _ in self.number_of], "pieces": [piece for _, piece in self.number_of]}


def pack(answer: AnswerTokens, numbers: np.ndarray, first: np.ndarray) -> str:
    """The columns of an answer, one after the other, compressed, in base64. ``page.js: unpack`` reads them.

    uint32, little endian: number in the vocabulary; entropy and negative log-prob in :data:`UNIT`; rank + 1, or 0 if
    the rank is not known. uint8: index of the first ρ that keeps the token; ``DROPPED``, ``SELECTED`` or ``UNKNOWN``.

    Args:
        answer: the answer with its columns.
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
    """Everything that ``page.js`` gets about the answers, ready for JSON.

    Args:
        folders: for each folder its name in the page and its answers.
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
    """The entropy (nats) at which a token gets the full colour: 1, or more if over 1% of the tokens exceed 1."""
    values = np.concatenate(entropies)
    return max(1.0, round(float(np.quantile(values, 0.99)), 1)) if values.size else 1.0
