"""Pack the tokens of some hundred answers for the page.

The page must open fast with 800,000 tokens, so an answer is a few compressed columns of numbers until it is chosen.
What the slider for ρ shows is computed here, by ``core/selection.py`` itself: for each token and score the first stop
of the slider at which the token is kept. A larger ρ keeps all that a smaller one keeps, so one byte per token and score
is enough. The value of the score is not stored: it is between the thresholds of two stops, which each pool has.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entropy_fork.analysis.token_scores import ALWAYS, each_score, tokens_of, unit_of
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.core.observed import rank_correlation, sample_of
from entropy_fork.core.rule import BLIND, Selector
from entropy_fork.core.scores import SCORES, Score
from entropy_fork.core.scoring import Tokens
from entropy_fork.core.selection import select_tokens
from entropy_fork.tokens.store import OPTIONAL, AnswerTokens, parts, read_manifest, read_part

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
        num_kept: how many are kept at each of :data:`RATIOS`, exactly ceil(ρN), by any score.
        by_score: for each score of the folder what the slider shows.
    """

    step: int | None
    num_tokens: int
    num_kept: list[int]
    by_score: list[SliderScore]


@dataclass(frozen=True)
class SliderScore:
    """A score in a pool.

    Attributes:
        threshold: float32, shape (stops + 1,): the highest value in the pool, then τ at each of :data:`RATIOS`.
        shared: how many of the kept tokens would be kept by entropy too, at each of :data:`RATIOS`.
        correlation: Spearman's rank correlation with the entropy; None if all values are equal.
    """

    threshold: np.ndarray
    shared: np.ndarray
    correlation: float | None


@dataclass(frozen=True)
class Folder:
    """A folder of tokens as the page shows it.

    Attributes:
        name: in the page.
        answers: that the page shows.
        manifest: of the folder.
    """

    name: str
    answers: Sequence[AnswerTokens]
    manifest: Mapping[str, Any]


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
    names = ("token_ids", "entropy", "log_prob", "rank", "selected", *OPTIONAL)
    columns = {name: getattr(answer, name) for name in names if getattr(answer, name) is not None}
    copies: dict[str, Any] = {name: np.array(values) for name, values in columns.items()}
    return replace(answer, **copies, pieces=list(answer.pieces))


def tokens_shown(answers: Sequence[AnswerTokens]) -> Tokens:
    """The tokens of some answers for the scores of ``core/``, with the fields that every answer has."""
    with_tokens = [answer for answer in answers if len(answer.entropy)]
    known = [name for name in OPTIONAL if all(getattr(answer, name) is not None for answer in with_tokens)]
    fields = {
        name: np.concatenate([getattr(answer, name) for answer in with_tokens] or [np.zeros(0, dtype=np.float32)])
        for name in (*ALWAYS, *known)
    }
    return tokens_of(
        fields,
        [answer.answer for answer in answers],
        [answer.step for answer in answers],
        [len(answer.entropy) for answer in answers],
    )


def pools_of(
    answers: Sequence[AnswerTokens], values: Sequence[np.ndarray]
) -> Iterator[tuple[SliderPool, list[int], list[np.ndarray]]]:
    """A folder's answers by pool: one per step where there are steps.

    Args:
        answers: of the folder.
        values: for each score of the folder its values: float, shape (tokens of all answers,). The entropy comes first.

    Yields:
        the pool; the places of its answers; and for each of these answers, uint8, shape (scores, tokens): the index in
        :data:`RATIOS` of the first ρ that keeps the token by that score.

    Raises:
        EntropyForkError: an entropy is not finite.
    """
    ends = np.cumsum([len(answer.entropy) for answer in answers], dtype=np.int64)
    for step in sorted({answer.step for answer in answers}, key=lambda step: -1 if step is None else step):
        members = [place for place, answer in enumerate(answers) if answer.step == step]
        places = np.concatenate([np.arange(ends[n] - len(answers[n].entropy), ends[n]) for n in members])
        yield _pool([answers[place] for place in members], step, members, [one[places] for one in values])


def _pool(
    answers: Sequence[AnswerTokens], step: int | None, members: list[int], values: Sequence[np.ndarray]
) -> tuple[SliderPool, list[int], list[np.ndarray]]:
    lengths = torch.tensor([len(answer.entropy) for answer in answers])
    num_tokens = int(lengths.sum())
    everything = torch.ones(num_tokens, dtype=torch.bool)
    sample = sample_of(everything, lengths, torch.arange(len(answers))).numpy()
    first = np.zeros((len(values), num_tokens), dtype=np.uint8)
    num_kept: list[int] = []
    by_score = []
    try:
        for place, score in enumerate(values):
            selections = []
            for ratio in RATIOS:
                selection = select_tokens(torch.from_numpy(score), everything, lengths, Selector(ratio))
                first[place] += ~selection.kept.numpy()
                selections.append((selection.num_kept, selection.threshold))
            num_kept, threshold = map(list, zip(*selections, strict=True))
            shared = np.bincount(np.maximum(first[place], first[0]), minlength=len(RATIOS)).cumsum()
            correlation = rank_correlation(*(torch.from_numpy(one[sample]) for one in (score, values[0])))
            by_score.append(
                SliderScore(
                    np.array([score.max(), *threshold] if num_tokens else [0.0] * (len(RATIOS) + 1), dtype=np.float32),
                    shared,
                    None if math.isnan(correlation) else correlation,
                )
            )
    except ValueError as error:
        names = ", ".join(str(answer.answer) for answer in answers if not np.isfinite(answer.entropy).all())
        raise EntropyForkError(f"answers {names} cannot be shown: {error}") from error
    pool = SliderPool(step, num_tokens, num_kept, by_score)
    return pool, members, np.split(first, np.cumsum(lengths.numpy())[:-1], axis=1)


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


def pack(answer: AnswerTokens, numbers: np.ndarray, first: np.ndarray, with_advantage: bool = False) -> str:
    """The columns of an answer, one after the other, compressed, in base64. ``page.js: unpack`` reads them.

    uint32, little endian: number in the vocabulary; entropy and negative log-prob in :data:`UNIT`; rank + 1, or 0 if
    the rank is not known. int32, if the folder has advantages: the advantage in :data:`UNIT`. uint8: ``DROPPED``,
    ``SELECTED`` or ``UNKNOWN``; then, for each score of the folder, the index of the first ρ that keeps the token.

    Args:
        answer: the answer with its columns.
        numbers: uint32, shape (tokens,), see :class:`Vocabulary`.
        first: uint8, shape (scores, tokens), see :func:`pools_of`.
        with_advantage: whether the folder has advantages.
    """
    count = len(numbers)
    rank = np.zeros(count) if answer.rank is None else answer.rank.astype(np.int64) + 1
    selected = np.full(count, UNKNOWN) if answer.selected is None else answer.selected
    advantage = np.zeros(count) if answer.advantage is None else answer.advantage.astype(np.float64)
    columns = [
        numbers.astype("<u4"),
        *(np.clip(np.rint(values / UNIT), 0, 2**32 - 1).astype("<u4") for values in _doubles(answer)),
        rank.astype("<u4"),
        *([np.clip(np.rint(advantage / UNIT), -(2**31), 2**31 - 1).astype("<i4")] if with_advantage else []),
        selected.astype(np.uint8),
        first.astype(np.uint8),
    ]
    return _compressed(columns)


def _doubles(answer: AnswerTokens) -> tuple[np.ndarray, np.ndarray]:
    return answer.entropy.astype(np.float64), -answer.log_prob.astype(np.float64)


def pack_pool(pool: SliderPool) -> str:
    """What the slider shows of each score, compressed, in base64. ``page.js: tablesOf`` reads it.

    Little endian: for each score float32, shape (stops + 1,), the thresholds of :class:`SliderScore`; then for each
    score int32, shape (stops,), by how much ``shared`` grows from the stop before.
    """
    grown = [np.diff(one.shared, prepend=0).astype("<i4") for one in pool.by_score]
    return _compressed([*(one.threshold.astype("<f4") for one in pool.by_score), *grown])


def _compressed(columns: Sequence[np.ndarray]) -> str:
    return base64.b64encode(zlib.compress(b"".join(column.tobytes() for column in columns))).decode("ascii")


def packed_folders(folders: Sequence[Folder], named: Sequence[Score] = ()) -> dict[str, Any]:
    """Everything that ``page.js`` gets about the answers, ready for JSON.

    Args:
        folders: what the page shows.
        named: scores that the user asked for. Where a folder has the first of them, it is chosen at first.

    Raises:
        EntropyForkError: an entropy is not finite, a score that the user asked for fails, or no folder allows it.
    """
    vocabulary, prompts = Vocabulary(), dict[str, int]()
    found: dict[str, Any] = {"ratios": RATIOS, "unit": UNIT, "folders": [], "scores": [], "pools": [], "answers": []}
    by_folder: list[dict[str, np.ndarray]] = []
    missing: list[dict[str, str]] = []
    with_advantage = []
    for folder in folders:
        left_out: dict[str, str] = {}
        tokens = tokens_shown(folder.answers)
        by_folder.append({score.name: values.numpy() for score, values in each_score(tokens, named, left_out)})
        missing.append(left_out)
        with_advantage.append("advantage" in tokens.fields)
    for score in named:
        if not any(score.name in values for values in by_folder):
            raise EntropyForkError(f"--score {score.name} cannot be used: it {missing[0][score.name]}")
    every = [score for score in dict.fromkeys([*SCORES.values(), *named]) if any(score.name in v for v in by_folder)]
    place_of = {score.name: place for place, score in enumerate(every)}
    found["scores"] = [_described(score, [v[score.name] for v in by_folder if score.name in v]) for score in every]
    for number, (folder, values) in enumerate(zip(folders, by_folder, strict=True)):
        run = RunScore.of(folder.manifest)
        about = run.sentence
        if run.name is not None and run.name not in values:
            why = missing[number].get(run.name, f"needs --score {run.name}, as code of yours runs only if you name it")
            about += f" Its score is not shown: it {why}."
        chosen = next((name for name in (*(one.name for one in named), run.name) if name in values), "entropy")
        found["folders"].append(
            {
                "name": folder.name,
                "scores": [place_of[name] for name in values],
                "chosen": place_of[chosen],
                "own": place_of[run.name] if run.name in values else None,
                "run": about,
                "advantage": with_advantage[number],
            }
        )
        for pool, members, firsts in pools_of(folder.answers, list(values.values())):
            place = len(found["pools"])
            found["pools"].append(
                {
                    "step": pool.step,
                    "num_tokens": pool.num_tokens,
                    "num_kept": pool.num_kept,
                    "correlation": [_rounded(one.correlation) for one in pool.by_score],
                    "data": pack_pool(pool),
                    "folder": number,
                }
            )
            for member, first in zip(members, firsts, strict=True):
                answer = folder.answers[member]
                found["answers"].append(
                    {
                        "number": member + 1,
                        "pool": place,
                        "prompt": prompts.setdefault(answer.prompt, len(prompts)),
                        "source": answer.data_source,
                        "truth": answer.ground_truth,
                        "score": _rounded(answer.score),
                        "truncated": answer.truncated,
                        "tokens": len(answer.entropy),
                        "entropy": round(float(answer.entropy.mean()), 4) if len(answer.entropy) else 0.0,
                        "data": pack(answer, vocabulary.numbers(answer), first, with_advantage[number]),
                    }
                )
    return {**found, "prompts": list(prompts), "vocabulary": vocabulary.to_json()}


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)


@dataclass(frozen=True)
class RunScore:
    """What the manifest of a training run says about its score. It is text: nothing that it names is imported.

    Attributes:
        name: of the score that the run ranked its tokens by; None if there is no run, or it used no score.
        sentence: about the run; empty if there is no run, or if an older version wrote the manifest.
    """

    name: str | None
    sentence: str

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> RunScore:
        """Read a manifest of ``entropy_fork/tokens/store.py``."""
        said = {key: manifest.get(key) for key in ("score", "select", "where", "use", "control")}
        if manifest.get("source") != "training" or not isinstance(said["score"], str):
            return cls(None, "")
        words = ", ".join(f"{key}={value}" for key, value in said.items() if value not in (None, "", "none"))
        name = None if said["select"] in BLIND else said["score"]
        return cls(name, f"The run's rule: {words}.")


def _described(score: Score, values: Sequence[np.ndarray]) -> dict[str, Any]:
    """A score for the page: its name, sentence and unit, and the values without and with full colour."""
    low, full = _colours(score, values)
    return {"name": score.name, "sentence": score.sentence, "unit": unit_of(score), "low": low, "full": full}


def _colours(score: Score, parts: Sequence[np.ndarray]) -> tuple[float, float]:
    """The value up to which a token has no colour, and the one from which it has the full colour.

    For the entropy 0, and 1 nat, or more if over 1% of the tokens exceed 1. For another score 0, or its lowest value if
    it is hardly ever above 0; and the value that 1% of the tokens exceed.
    """
    values = np.concatenate(parts)
    if not values.size:
        return 0.0, 1.0
    high = float(np.quantile(values, 0.99))
    if score.name == "entropy":
        return 0.0, max(1.0, round(high, 1))
    low = 0.0 if high > 0 else float(values.min())
    return _short(low), _short(high)


def _short(value: float) -> float:
    """Three digits."""
    return float(f"{value:.3g}")
