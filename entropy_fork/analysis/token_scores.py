"""The scores of tokens on disk: which ones their columns allow, and how far each agrees with the entropy.

What a score is, and which there are: ``core/scores.py``. The tokens of a folder have the fields that the folder has
columns for. The tokens of one step of training are seen together by a score that looks at several tokens; so are all
tokens of a folder without steps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entropy_fork.analysis.order_statistics import PERCENTILES, percentile_ranks
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.core.observed import rank_correlation, sample_of
from entropy_fork.core.randomness import seed_of
from entropy_fork.core.rule import Selector
from entropy_fork.core.scores import SCORES, Score, score_of
from entropy_fork.core.scoring import Tokens, needed_fields, try_out
from entropy_fork.core.selection import select_tokens
from entropy_fork.tokens.store import OPTIONAL, known_columns, parts, read_answer_columns, read_columns

#: the fields of the scores that every folder has, and those that a folder may have
ALWAYS = ("entropy", "log_prob")
FIELDS_ON_DISK = (*ALWAYS, *OPTIONAL)

#: the seed of ``random``: the same numbers in every report and every analysis
SEED = 0

#: the unit of each built-in score; empty if it has none
UNITS: Mapping[str, str] = {
    "entropy": "nats",
    "surprisal": "nats",
    "covariance": "nats",
    "gradient": "",
    "open_gradient": "nats",
    "gradient_norm": "",
    "rsi": "",
    "omega": "nats",
    "mismatch": "nats",
    "position": "tokens",
    "random": "",
}

#: ρ of the overlap with the entropy, if no other is asked for
TOP = 0.2
#: how many words of highest mean a score has
NUM_WORDS = 10


def unit_of(score: Score) -> str:
    """The unit of a score; empty if it has none, or if it is a user's own."""
    return UNITS.get(score.name, "")


def named_scores(names: Sequence[str], known: Sequence[str] = FIELDS_ON_DISK) -> list[Score]:
    """The scores of these names, each tried out on a made-up batch.

    A user's own module is found where Python finds it, or in the folder that the command is run in.

    Args:
        names: built-in names, or import paths of a user's own, ``package.module:function``.
        known: the fields that the tokens have, beside those that follow from an answer's length and number.

    Raises:
        EntropyForkError: there is no such score, it cannot be used, or it reads a field that is not known.
    """
    found = []
    for name in dict.fromkeys(names):
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())  # where a run would find it
        try:
            score = score_of(name)
            if score.is_own:
                try_out(score)
        except ValueError as error:
            raise EntropyForkError(f"--score {name} cannot be used: {error}") from error
        if missing := lacking(score, known):
            raise EntropyForkError(f"--score {name} cannot be used: it {missing}")
        found.append(score)
    return found


def lacking(score: Score, known: Sequence[str]) -> str:
    """What a score lacks, as the end of a sentence about it; empty if it lacks nothing.

    Args:
        score: the score.
        known: the fields that the tokens have.
    """
    missing = [name for name in needed_fields(score, None) if name not in known]
    if not missing:
        return ""
    return (
        f"reads {', '.join(missing)}, which these tokens do not have. A training run with entropy_fork.dump_every "
        f"writes what its batches have"
    )


def tokens_of(
    fields: Mapping[str, np.ndarray], answers: Sequence[int], steps: Sequence[int | None], lengths: Sequence[int]
) -> Tokens:
    """Tokens for the scores of ``core/``.

    Args:
        fields: those of :data:`FIELDS_ON_DISK` that are known: float32, each of shape (tokens,).
        answers: the number of each answer.
        steps: the step of each answer.
        lengths: the number of tokens of each answer.
    """
    seeds = [seed_of(SEED, step, answer) for step, answer in zip(steps, answers, strict=True)]
    return Tokens(
        {name: torch.from_numpy(values) for name, values in fields.items()},
        torch.ones(int(sum(lengths)), dtype=torch.bool),
        torch.tensor(lengths, dtype=torch.int64),
        torch.tensor(seeds, dtype=torch.int64),
        torch.tensor([-1 if step is None else step for step in steps], dtype=torch.int64),
    )


def each_score(
    tokens: Tokens, named: Sequence[Score], left_out: dict[str, str] | None = None
) -> Iterator[tuple[Score, Tensor]]:
    """Every score that these tokens allow, the entropy first: the built-in ones, then the user's own.

    Args:
        tokens: see :func:`tokens_of`.
        named: scores that the user asked for by name.
        left_out: gets, for each score that is left out, the reason.

    Yields:
        The score, and its value for each token: float, shape (tokens,).

    Raises:
        EntropyForkError: a score that the user asked for fails on these tokens.
    """
    for score in dict.fromkeys([*SCORES.values(), *named]):
        reason = lacking(score, list(tokens.fields))
        if not reason:
            try:
                yield score, tokens.score(score)
                continue
            except ValueError as error:
                if score in named:
                    raise EntropyForkError(f"--score cannot be used on these tokens: {error}") from error
                reason = str(error)
        if left_out is not None:
            left_out[score.name] = reason


def read_tokens(folder: Path) -> tuple[Tokens, np.ndarray]:
    """All tokens of a folder, in memory: four bytes per token and column.

    Returns:
        The tokens, and their ids: int32, shape (tokens,).
    """
    names = [*ALWAYS, *known_columns(folder, OPTIONAL)]
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("token_id", *names)}
    rows: list[tuple[int, int | None, int]] = []
    for number in parts(folder):
        here = list(zip(*read_answer_columns(folder, number, "answer", "step", "tokens"), strict=True))
        if not sum(length for _, _, length in here):
            continue  # it has nothing to read, and may lack a column
        for name, values in zip(columns, read_columns(folder, number, *columns), strict=True):
            columns[name].append(values)
        rows += here
    flat = {name: np.concatenate(values) for name, values in columns.items() if values}
    token_id = flat.pop("token_id", np.zeros(0, dtype=np.int32))
    return tokens_of(flat, *([row[place] for row in rows] for place in range(3))), token_id  # type: ignore[arg-type]


def summarise_scores(
    folder: Path, pieces: Mapping[int, str], min_count: int, named: Sequence[Score] = (), top_ratio: float = TOP
) -> dict[str, Any]:
    """Each score of the tokens of a folder, beside the entropy.

    Args:
        folder: of tokens, complete, with finite entropies.
        pieces: the text of each token id.
        min_count: how often a token must have been seen to be among the words of highest mean.
        named: scores that the user asked for by name.
        top_ratio: ρ: how many of the tokens with the highest score are compared with as many of highest entropy.

    Returns:
        ``scores``: for each its score (the name), sentence, unit, mean, percentiles (q → the smallest value that at
        least q% of the tokens do not exceed), threshold (the lowest value in the top ρ), overlap_with_entropy (the
        share of the top ρ that is also in the entropy's top ρ), rank_correlation_with_entropy (Spearman's; None if all
        values are equal; of at most 131,072 tokens) and words (of highest mean). ``scores_top_ratio``: ρ.
        ``scores_left_out``: the reason for each score that is not there.

    Raises:
        EntropyForkError: a score that the user asked for fails on these tokens.
    """
    tokens, token_id = read_tokens(folder)
    found: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    if token_id.size:
        sample = sample_of(tokens.eligible, tokens.lengths, tokens.seeds)
        often = np.bincount(token_id)
        of_entropy: tuple[Tensor, Tensor] | None = None
        for score, values in each_score(tokens, named, left_out):
            top = select_tokens(values, tokens.eligible, tokens.lengths, Selector(top_ratio))
            of_entropy = of_entropy or (top.kept, values[sample])  # the entropy comes first
            correlation = rank_correlation(values[sample], of_entropy[1])
            found.append(
                {
                    "score": score.name,
                    "sentence": score.sentence,
                    "unit": unit_of(score),
                    "mean": float(values.double().mean()),
                    "percentiles": _percentiles(values),
                    "threshold": top.threshold,
                    "overlap_with_entropy": int((top.kept & of_entropy[0]).count_nonzero()) / top.num_kept,
                    "rank_correlation_with_entropy": None if np.isnan(correlation) else correlation,
                    "words": _words(token_id, values.numpy(), often, pieces, min_count),
                }
            )
    return {"scores_top_ratio": top_ratio, "scores": found, "scores_left_out": left_out}


def _percentiles(values: Tensor) -> dict[str, float]:
    ordered = np.sort(values.numpy())
    ranks = percentile_ranks(ordered.size, PERCENTILES)
    return {str(q): float(value) for q, value in zip(PERCENTILES, ordered[ranks], strict=True)}


def _words(
    token_id: np.ndarray, values: np.ndarray, often: np.ndarray, pieces: Mapping[int, str], min_count: int
) -> list[dict[str, Any]]:
    """The tokens of highest mean, of those that were seen often; of equal ones the lower id comes first."""
    sums = np.bincount(token_id, weights=values)
    seen = np.flatnonzero(often >= max(1, min_count))
    means = sums[seen] / often[seen]
    order = np.argsort(-means, kind="stable")[:NUM_WORDS]
    return [
        {
            "token_id": int(seen[place]),
            "piece": pieces[int(seen[place])],
            "tokens": int(often[seen[place]]),
            "mean": float(means[place]),
        }
        for place in order
    ]
