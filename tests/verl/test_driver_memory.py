"""How much memory the driver's part takes for each token, counted exactly: docs/lab/performance.md says so much."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.hook import NUM_ROWS, Masked, run_hook
from helpers.live_bytes import LiveBytesWithNumpy
from helpers.rows import jagged

from entropy_fork.core.responses import Responses
from entropy_fork.core.selection import MANY
from entropy_fork.verl.config import EntropyForkConfig
from entropy_fork.verl.queued_batch import FlatField, QueuedBatch

#: bytes of a token while the TransferQueue puts verl's int64 mask together: eight as they come, eight in one tensor
FETCHING_MASK = 16.0
#: and in all that comes after: entropy 4, mask and selection 1 each, the advantages 4 as they come, 4 in one tensor
CHOOSING = 14.0
#: but where all tokens of the batch are drawn by lot together, a float64 number for each
DRAWING = 17.3

#: a mini-batch, half of them, is what the selection calls large
ROW_LENGTH = 2 * MANY // NUM_ROWS


@pytest.mark.parametrize(
    ("settings", "importance", "bound"),
    [
        ({}, None, CHOOSING),
        ({}, 0.5, CHOOSING),
        ({"pool": "batch"}, None, CHOOSING),
        ({"pool": "response"}, None, CHOOSING),
        ({"weight": "soft", "pool": "batch"}, 0.5, CHOOSING),
        ({"ties": "threshold"}, None, CHOOSING),
        ({"select": "random"}, None, CHOOSING),
        ({"select": "random", "pool": "batch"}, None, DRAWING),
        ({"loss_agg_mode": "seq-mean-token-mean"}, None, CHOOSING),
    ],
    ids=str,
)
def test_the_bytes_of_a_token(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], importance: float | None, bound: float
) -> None:
    """The real method on a batch in memory that is fetched as from the TransferQueue: its highest bytes at any time."""
    loss_agg_mode = settings.get("loss_agg_mode", "token-mean")
    fork_config = EntropyForkConfig(**{name: value for name, value in settings.items() if name != "loss_agg_mode"})
    peaks = peaks_of(monkeypatch, importance=importance, fork_config=fork_config, loss_agg_mode=loss_agg_mode)
    assert peaks.pop("response_mask") == pytest.approx(FETCHING_MASK, abs=0.1)
    assert max(peaks.values()) == pytest.approx(bound, abs=0.1), peaks


def test_the_bytes_of_a_token_where_every_prompt_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """All answers are fetched then, to tell the groups apart: before everything else, so the peak is the mask's."""
    lengths = torch.full((NUM_ROWS,), ROW_LENGTH)
    same_prompt = jagged(torch.ones(NUM_ROWS, dtype=torch.int64), torch.ones(NUM_ROWS, dtype=torch.int64))
    fields = {"prompts": same_prompt, "responses": jagged(torch.arange(NUM_ROWS * ROW_LENGTH), lengths)}
    peaks = peaks_of(monkeypatch, keys=[f"u{row}_0_0" for row in range(NUM_ROWS)], fields=fields)
    assert peaks["before response_mask"] == pytest.approx(FETCHING_MASK, abs=0.1)
    assert max(peaks.values()) == pytest.approx(FETCHING_MASK, abs=0.1), peaks


def peaks_of(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, float]:
    """The highest bytes of a token up to each fetch, in it, and after the last; ``settings`` as of :func:`run_hook`."""
    random = torch.Generator().manual_seed(0)
    total = NUM_ROWS * ROW_LENGTH
    # Most are exactly 0, as a policy that is sure of itself has them, and τ is among them.
    entropy = torch.rand(total, generator=random).mul_(5).sub_(4.2).clamp_(min=0)
    order = torch.arange(NUM_ROWS)
    rows = Responses(entropy, torch.ones(total, dtype=torch.int64), torch.full((NUM_ROWS,), ROW_LENGTH), order, order)
    peaks = {}

    class Measured(Masked):
        def _entropy_fork_write_weights(self, *arguments: Any) -> Any:
            super()._entropy_fork_write_weights(*arguments)  # what is imported and set up is no matter of tokens
            live, fetch = LiveBytesWithNumpy(), QueuedBatch.fetch

            def fetch_apart(batch: QueuedBatch, name: str) -> FlatField | None:
                peaks[f"before {name}"] = live.note() / total
                field = fetch(batch, name)
                peaks[name] = live.note() / total
                return field

            monkeypatch.setattr(QueuedBatch, "fetch", fetch_apart)
            with live:
                result = super()._entropy_fork_write_weights(*arguments)
            peaks["write"] = live.note() / total
            return result

    run_hook(monkeypatch, trainer_class=Measured, rows=rows, **settings)
    return peaks
