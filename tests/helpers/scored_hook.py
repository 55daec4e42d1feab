"""The advantage hook on rows with every field of the scores; see ``hook.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from entropy_fork.core.rule import Rule
from entropy_fork.verl.config import EntropyForkConfig
from helpers.hook import run_hook
from helpers.rows import jagged
from helpers.scored_rows import ScoredRows


def run_scored(
    monkeypatch: pytest.MonkeyPatch, rows: ScoredRows, names: Sequence[int], values: dict[str, Any], **settings: Any
) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
    """Run the hook on some rows.

    Args:
        monkeypatch: replaces the TransferQueue by a batch in memory.
        rows: the rows, in the order of the batch.
        names: a number for each row that stays with it in another order of the rows.
        values: the keys of ``entropy_fork``.
        settings: for :func:`run_hook`.

    Returns:
        The fields of the batch as workers would get them, row by row, and the metrics.
    """
    of_verl = {"log_prob": "old_log_probs", "advantage": "advantages", "rollout_log_prob": "rollout_log_probs"}
    fields = {
        of_verl.get(name, name): jagged(torch.cat(values), rows.lengths)
        for name, values in rows.fields.items()
        if name not in ("entropy", "sum_pi_squared")
    }
    # verl writes it for whole rows: here a prompt of two tokens, and a token's value stands before the token
    squares = [
        torch.cat([torch.full((1,), 7.0), of_row, torch.full((1,), 7.0)]) for of_row in rows.fields["sum_pi_squared"]
    ]
    fields["sum_pi_squared"] = jagged(torch.cat(squares), rows.lengths + 2)
    fields["prompts"] = jagged(torch.tensor([5, 6]).repeat(len(rows)), torch.full((len(rows),), 2))
    data, metrics = run_hook(
        monkeypatch,
        rows=rows.responses(Rule.of()),
        fork_config=EntropyForkConfig(**values),
        fields=fields,
        keys=[f"u_{name}_0" for name in names],
        **settings,
    )
    return {name: list(values.unbind()) for name, values in data.items()}, metrics
