"""Statistics of the tokens of one folder (arXiv 2506.01939, section 3), computed one part at a time.

Sums and counts are kept per entropy bin, token, place in the answer and kind of text, so that their memory does not
grow with the number of tokens. Percentiles are exact (``order_statistics.py``). What is said about other scores than
the entropy needs all tokens in memory (``token_scores.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from entropy_fork.analysis.order_statistics import PERCENTILES, order_statistics, percentile_ranks
from entropy_fork.analysis.parts_of_text import KINDS, SECTIONS, kinds_of_tokens, sections_of_tokens
from entropy_fork.analysis.texts import check_complete
from entropy_fork.analysis.token_scores import TOP, summarise_scores
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.core.scores import Score
from entropy_fork.tokens.store import AnswerTokens, parts, read_columns, read_manifest, read_part

#: The shares of tokens below these entropies (nats) are counted. The paper gives the first one.
BELOW = (0.01, 0.1, 0.5, 1.0)
BIN_WIDTH = 0.05
#: the paper's tables have tokens "seen more than 100 times"
MIN_COUNT, NUM_TOKENS, POSITION_BINS = 101, 100, 50

#: the paper's numbers for Qwen3-8B on its answers to AIME questions, T = 1 (section 3)
PAPER = {"share_below_0.01": 0.5064, "percentile_80": 0.672}


@dataclass
class Sums:
    """Counts of tokens and forks and sums of entropy, per index; the arrays grow when they need to."""

    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0))
    entropy: np.ndarray = field(default_factory=lambda: np.zeros(0))
    forks: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def add(self, index: np.ndarray, entropy: np.ndarray, selected: np.ndarray | None) -> None:
        """Count tokens at ``index`` (int, shape (tokens,)); ``selected`` None counts no fork."""
        for name, weights in (("tokens", None), ("entropy", entropy), ("forks", selected)):
            if name == "forks" and weights is None:
                continue
            more = np.bincount(index, weights=None if weights is None else weights.astype(np.float64))
            there = np.pad(getattr(self, name), (0, max(0, len(more) - len(getattr(self, name)))))
            there[: len(more)] += more
            setattr(self, name, there)

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """tokens, mean_entropy (nats) and fork_share at these indices; None without tokens, or without a selection.

        Args:
            indices: int, shape (n,): the positions, kinds, steps, … to read.
        """
        found = []
        for index in indices:
            tokens = self.tokens[index] if index < len(self.tokens) else 0.0
            forks = self.forks[index] if index < len(self.forks) else None
            found.append(
                {
                    "tokens": int(tokens),
                    "mean_entropy": float(self.entropy[index] / tokens) if tokens else None,
                    "fork_share": float(forks / tokens) if tokens and forks is not None else None,
                }
            )
        return found


def summarise(
    folder: Path,
    min_count: int = MIN_COUNT,
    num_tokens: int = NUM_TOKENS,
    position_bins: int = POSITION_BINS,
    advance: Callable[[], None] = lambda: None,
    scores: Sequence[Score] = (),
    scores_top_ratio: float = TOP,
) -> dict[str, Any]:
    """Summarise one folder, as a dict that JSON can write.

    Args:
        folder: of tokens, complete.
        min_count: how often a token must have been seen to be in the tables of highest and lowest mean entropy.
        num_tokens: rows of each of these tables. With fewer than twice as many tokens, each table has half of them, so
            that no token is in both.
        position_bins: number of bins into which an answer is divided.
        advance: called after each part.
        scores: scores that the user asked for, beside the built-in ones.
        scores_top_ratio: ρ of the overlap between a score and the entropy.

    Returns:
        manifest; answers, tokens, mean_entropy; share_below (nats → share); percentiles (q → nats, the smallest entropy
        that at least q% of tokens do not exceed); histogram (edges, counts); highest, lowest (tokens by mean entropy);
        positions, kinds, sections, cells (kind × section), steps: tokens, mean_entropy and fork_share of each; and what
        :func:`~entropy_fork.analysis.token_scores.summarise_scores` returns.

    Raises:
        EntropyForkError: it is not a folder of tokens, it is unfinished, an entropy is not finite, or one of ``scores``
            fails.
    """
    manifest = read_manifest(folder)
    check_complete(folder, manifest)
    histogram, by_token, by_position, by_cell, by_step = (Sums() for _ in range(5))
    below = np.zeros(len(BELOW), dtype=np.int64)
    pieces: dict[int, str] = {}
    answers, highest = 0, -np.inf
    for number in parts(folder):
        for answer in read_part(folder, number):
            answers += 1
            entropy, selected = answer.entropy, answer.selected
            if not len(entropy):
                continue
            if not np.isfinite(entropy).all():
                raise EntropyForkError(
                    f"answer {answer.answer} in {folder} has an entropy that is not finite, because its "
                    f"model's logits were not finite: did its training diverge?"
                )
            below += [np.count_nonzero(entropy < edge) for edge in BELOW]
            highest = max(highest, float(entropy.max()))
            histogram.add(np.floor(np.maximum(entropy, 0) / BIN_WIDTH).astype(np.int64), entropy, selected)
            by_token.add(answer.token_ids, entropy, selected)
            by_position.add(np.arange(len(entropy)) * position_bins // len(entropy), entropy, selected)
            by_cell.add(_cells(answer), entropy, selected)
            if answer.step is not None:
                by_step.add(np.full(len(entropy), answer.step), entropy, selected)
            _remember(pieces, answer)
        advance()
    tokens = int(histogram.tokens.sum())
    seen_often = int(np.count_nonzero(by_token.tokens >= max(1, min_count)))
    num_highest, num_lowest = min(num_tokens, seen_often - seen_often // 2), min(num_tokens, seen_often // 2)
    cells, steps = _by_cell(by_cell), np.flatnonzero(by_step.tokens)
    return {
        "manifest": manifest,
        "answers": answers,
        "tokens": tokens,
        "mean_entropy": float(histogram.entropy.sum() / tokens) if tokens else None,
        "max_entropy": highest if tokens else None,
        "share_below": {
            str(edge): int(count) / tokens if tokens else None for edge, count in zip(BELOW, below, strict=True)
        },
        "percentiles": _percentiles(folder, tokens),
        "histogram": {
            "edges": [round(edge * BIN_WIDTH, 6) for edge in range(len(histogram.tokens) + 1)],
            "tokens": histogram.tokens.astype(int).tolist(),
        },
        "min_count": min_count,
        "seen_often": seen_often,
        "highest": _by_mean(by_token, pieces, min_count, num_highest, sign=-1),
        "lowest": _by_mean(by_token, pieces, min_count, num_lowest, sign=1),
        "positions": [
            {"from": place / position_bins, "to": (place + 1) / position_bins, **row}
            for place, row in enumerate(by_position.rows(range(position_bins)))
        ],
        **cells,
        "steps": [{"step": int(step), **row} for step, row in zip(steps, by_step.rows(steps), strict=True)],
        **summarise_scores(folder, pieces, min_count, scores, scores_top_ratio),
    }


def _percentiles(folder: Path, tokens: int) -> dict[str, float]:
    def entropies() -> Iterator[np.ndarray]:
        for number in parts(folder):
            yield read_columns(folder, number, "entropy")[0]

    if not tokens:
        return {}
    found = order_statistics(entropies, percentile_ranks(tokens, PERCENTILES))
    return {str(q): float(value) for q, value in zip(PERCENTILES, found, strict=True)}


def _cells(answer: AnswerTokens) -> np.ndarray:
    kinds, sections = kinds_of_tokens(answer.pieces), sections_of_tokens(answer.pieces, answer.prompt)
    return sections.astype(np.int64) * len(KINDS) + kinds


def _by_cell(by_cell: Sums) -> dict[str, list[dict[str, Any]]]:
    """Rows per kind, per section, and per pair of both, without those that have no token."""

    def summed(axis: int) -> Sums:
        def over(values: np.ndarray) -> np.ndarray:
            whole = np.pad(values, (0, len(KINDS) * len(SECTIONS) - len(values)))
            return whole.reshape(len(SECTIONS), len(KINDS)).sum(axis)

        forks = over(by_cell.forks) if len(by_cell.forks) else by_cell.forks
        return Sums(over(by_cell.tokens), over(by_cell.entropy), forks)

    def named(sums: Sums, names: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
        rows = [name | row for name, row in zip(names, sums.rows(range(len(names))), strict=True)]
        return [row for row in rows if row["tokens"]]

    return {
        "kinds": named(summed(0), [{"kind": kind} for kind in KINDS]),
        "sections": named(summed(1), [{"section": section} for section in SECTIONS]),
        "cells": named(by_cell, [{"section": section, "kind": kind} for section in SECTIONS for kind in KINDS]),
    }


def _remember(pieces: dict[int, str], answer: AnswerTokens) -> None:
    ids, first = np.unique(answer.token_ids, return_index=True)
    for token_id, place in zip(ids.tolist(), first.tolist(), strict=True):
        pieces.setdefault(token_id, answer.pieces[place])


def _by_mean(sums: Sums, pieces: dict[int, str], min_count: int, num_tokens: int, sign: int) -> list[dict[str, Any]]:
    """The tokens of highest (sign −1) or lowest (+1) mean entropy, of those that were seen often.

    If two tokens have equal means, the lower id comes first among the highest, and the higher id among the lowest. So
    one order is the reverse of the other.
    """
    often = np.flatnonzero(sums.tokens >= max(1, min_count))
    means = sums.entropy[often] / sums.tokens[often]
    order = often[np.lexsort((-sign * often, sign * means))][:num_tokens]
    return [
        {"token_id": int(token_id), "piece": pieces[int(token_id)], **row}
        for token_id, row in zip(order, sums.rows(order), strict=True)
    ]
