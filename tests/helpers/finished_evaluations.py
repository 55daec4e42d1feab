"""Folders as ``entropy-fork evaluate`` leaves them, without a model. Needs torch, as the evaluation does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from entropy_fork.evaluation import results
from entropy_fork.evaluation.answer_store import AnswerStore, ScoredAnswer
from entropy_fork.evaluation.checkpoint import ModelRecord
from entropy_fork.evaluation.engines import SamplingSettings
from entropy_fork.evaluation.evaluate import Evaluation
from entropy_fork.evaluation.statistics import summarise_benchmark


def write_evaluation(
    folder: Path,
    right: Mapping[str, np.ndarray],
    tokens: Mapping[str, np.ndarray] | None = None,
    model: ModelRecord | None = None,
    **changes: Any,
) -> Path:
    """A folder as ``entropy-fork evaluate`` leaves it.

    Args:
        folder: where.
        right: benchmark → whether each answer is right, shape (questions, answers).
        tokens: benchmark → lengths of the same shape; 10 for all answers if not given.
        model: which model answered.
        changes: keys of the identity, with ``__`` between the keys of nested ones.
    """
    model = model or ModelRecord(f"/models/{folder.name}")
    identity: dict[str, Any] = {
        "model": folder.name,
        "questions": "q" * 64,
        "chat_template": "the model's",
        "sampling": asdict(SamplingSettings()),
        "engine": {"name": "transformers", "dtype": "auto", "batch_size": 64},
        "reward": "entropy_fork.reward 1",
    }
    for key, value in changes.items():
        *outer, last = key.split("__")
        place = identity
        for name in outer:
            place = place[name]
        place[last] = value
    records, summaries, first = [], {}, 0
    for name, table in right.items():
        lengths = np.full(table.shape, 10) if tokens is None else tokens[name]
        for (question, sample), is_right in np.ndenumerate(table):
            length = int(lengths[question, sample])
            records.append(
                ScoredAnswer(first + question, sample, 0, name, length, False, float(is_right), True, "text")
            )
        first += len(table)
        summaries[name] = summarise_benchmark(table, lengths, np.zeros_like(table), np.ones_like(table))
    with AnswerStore(folder, identity, {"model": model.as_dict()}) as store:
        store.append(reversed(records))  # answers are written as they are finished
    results.write(Evaluation(identity, summaries, model), folder, None)
    return folder
