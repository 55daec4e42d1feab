"""The driver's memory per token, counted exactly. docs/lab/performance.md gives this number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.hook import NUM_ROWS, Masked, run_hook
from helpers.live_bytes import LiveBytesWithNumpy
from helpers.rows import jagged

from entropy_fork.core.responses import Responses
from entropy_fork.core.scores import SCORES
from entropy_fork.core.selection import MANY
from entropy_fork.verl.config import EntropyForkConfig
from entropy_fork.verl.queued_batch import FlatField, QueuedBatch

#: bytes per token while the TransferQueue joins verl's int64 mask: eight as the rows arrive, eight in one tensor
FETCHING_MASK = 16.0
#: bytes per token later: entropy 4, mask and selection 1 each, advantages 4 as the rows arrive and 4 in one tensor
CHOOSING = 14.0
#: if tokens of the whole batch are drawn at random together, a float64 number for each
DRAWING = 17.3

#: verl's fields of floats, one for each response token
PER_TOKEN = ("old_log_probs", "rollout_log_probs", "ref_log_prob")

#: so many tokens that a mini-batch, half of them, takes the selection's path for large pools
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
    """The real method on a batch in memory, fetched as from the TransferQueue: the peak of its bytes."""
    loss_agg_mode = settings.get("loss_agg_mode", "token-mean")
    fork_config = EntropyForkConfig(**{name: value for name, value in settings.items() if name != "loss_agg_mode"})
    peaks = peaks_of(monkeypatch, importance=importance, fork_config=fork_config, loss_agg_mode=loss_agg_mode)
    assert peaks.pop("response_mask") == pytest.approx(FETCHING_MASK, abs=0.1)
    assert max(peaks.values()) == pytest.approx(bound, abs=0.1), peaks


#: bytes per token with any built-in score: at most so many
WITH_A_SCORE = 24.0


@pytest.mark.parametrize("pool", ["mini_batch", "batch"])
@pytest.mark.parametrize("score", SCORES)
def test_the_bytes_of_a_token_with_each_score(monkeypatch: pytest.MonkeyPatch, score: str, pool: str) -> None:
    lengths = torch.full((NUM_ROWS,), ROW_LENGTH)
    total = NUM_ROWS * ROW_LENGTH
    random = torch.Generator().manual_seed(1)
    # with a prompt of two tokens in front, as verl writes it
    whole_rows = jagged(torch.rand(total + 2 * NUM_ROWS, generator=random), lengths + 2)
    fields = {name: jagged(-torch.rand(total, generator=random), lengths) for name in PER_TOKEN}
    fork_config = EntropyForkConfig(score=score, pool=pool)
    peaks = peaks_of(monkeypatch, fork_config=fork_config, fields={**fields, "sum_pi_squared": whole_rows})
    assert max(peaks.values()) <= WITH_A_SCORE, peaks


def test_the_bytes_of_a_token_where_every_prompt_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """All answers are then fetched to tell the groups apart. That comes first, so the peak is still the mask's."""
    lengths = torch.full((NUM_ROWS,), ROW_LENGTH)
    same_prompt = jagged(torch.ones(NUM_ROWS, dtype=torch.int64), torch.ones(NUM_ROWS, dtype=torch.int64))
    fields = {"prompts": same_prompt, "responses": jagged(torch.arange(NUM_ROWS * ROW_LENGTH), lengths)}
    peaks = peaks_of(monkeypatch, keys=[f"u{row}_0_0" for row in range(NUM_ROWS)], fields=fields)
    assert peaks["before response_mask"] == pytest.approx(FETCHING_MASK, abs=0.1)
    assert max(peaks.values()) == pytest.approx(FETCHING_MASK, abs=0.1), peaks


def peaks_of(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, float]:
    """The peak of bytes per token before each fetch, in it, and after the last. ``settings``: see :func:`run_hook`."""
    random = torch.Generator().manual_seed(0)
    total = NUM_ROWS * ROW_LENGTH
    # Most entropies are exactly 0, as with a confident policy, and so is τ.
    entropy = torch.rand(total, generator=random).mul_(5).sub_(4.2).clamp_(min=0)
    order = torch.arange(NUM_ROWS)
    rows = Responses(entropy, torch.ones(total, dtype=torch.int64), torch.full((NUM_ROWS,), ROW_LENGTH), order, order)
    peaks = {}

    class Measured(Masked):
        def _entropy_fork_write_weights(self, *arguments: Any) -> Any:
            super()._entropy_fork_write_weights(*arguments)  # first, for imports and setup
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


#: with any score
SCORING = 24.0


@pytest.mark.parametrize("name", SCORES)
def test_the_bytes_of_a_token_with_a_score(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each field that a score reads is fetched once, and is there until the tokens are chosen."""
    peaks = peaks_of(monkeypatch, fork_config=EntropyForkConfig(score=name), fields=fields_of_scores())
    assert max(peaks.values()) <= SCORING, peaks


def fields_of_scores() -> dict[str, torch.Tensor]:
    """What verl writes, as large as the batch of :func:`peaks_of`; Σπ² for rows with a prompt of one token."""
    lengths = torch.full((NUM_ROWS,), ROW_LENGTH)
    total = NUM_ROWS * ROW_LENGTH
    log_probs = -torch.rand(total, generator=torch.Generator().manual_seed(1))
    return {
        "old_log_probs": jagged(log_probs, lengths),
        "rollout_log_probs": jagged(log_probs * 1.01, lengths),
        "sum_pi_squared": jagged(torch.full((total + NUM_ROWS,), 0.5), lengths + 1),
    }
