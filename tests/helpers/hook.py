"""The advantage hook without Ray: a masked trainer on a batch in memory, in verl's layout."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import NonTensorStack, TensorDict

from entropy_fork.core.responses import Responses
from entropy_fork.verl import queued_batch, trainer
from entropy_fork.verl.config import EntropyForkConfig
from helpers.rows import jagged, make_rows

NUM_ROWS, MINI_BATCH_ROWS = 16, 8


class Stock:
    """The part of verl's trainer that the hook needs."""

    def __init__(self, config: Any):
        self.config = config

    def _setup(self) -> None:
        ranks = list(range(self.config.actor_rollout_ref.num_ranks))
        self.actor_rollout_wg = SimpleNamespace(_query_dispatch_info=lambda name: ranks, workers=[])

    def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
        return batch


class Masked(trainer.TokenWeights, Stock): ...


def run_hook(
    monkeypatch: pytest.MonkeyPatch,
    importance: float | None = None,
    with_entropy: bool = True,
    trainer_class: type | None = None,
    rows: Responses | None = None,
    fork_config: EntropyForkConfig | None = None,
    loss_agg_mode: str = "token-mean",
    keys: list[str] | None = None,
    fields: dict[str, torch.Tensor] | None = None,
    actor: dict[str, Any] | None = None,
    mini_batch_rows: int = MINI_BATCH_ROWS,
    num_ranks: int = 1,
    fetches: list[str] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Run the hook with the preset ``global`` on two mini-batches. One of their rows is padding.

    Args:
        monkeypatch: replaces the TransferQueue by a batch in memory.
        importance: the importance weight that rollout correction has written for every token; None for no such field.
        with_entropy: whether verl's log-prob pass wrote its entropies.
        trainer_class: another masked trainer.
        rows, fork_config, loss_agg_mode: other rows, another config and another aggregation than the defaults.
        keys, fields: other keys of the rows (by default all are answers to one prompt), and more fields, which may
            replace the default ones. The data set's index is 0 for every row.
        actor: more keys of the actor.
        mini_batch_rows, num_ranks: how verl lays the rows out.
        fetches: the names of the fetched fields are added, each time that one is fetched.

    Returns:
        The fields of the batch as workers would get them, and the metrics.
    """
    if rows is None:
        rows = make_rows(seed=3, num_rows=NUM_ROWS, eligible=0.9)
        rows.eligible.split(rows.lengths.tolist())[5].zero_()
    num_rows = rows.lengths.numel()
    sign = torch.tensor([1.0, -1.0]).repeat(num_rows)[:num_rows]
    data = {
        "prompts": jagged(torch.arange(2 * num_rows), torch.full((num_rows,), 2)),
        "response_mask": jagged(rows.eligible, rows.lengths),
        "advantages": jagged(sign.repeat_interleave(rows.lengths), rows.lengths),
    }
    data.update(fields or {})
    if with_entropy:
        data["entropy"] = jagged(rows.entropy, rows.lengths)
    if importance is not None:
        data["rollout_is_weights"] = jagged(torch.full_like(rows.entropy, importance), rows.lengths)

    def get(keys: list[str], select_fields: list[str], **_: Any) -> TensorDict:
        """Use memory as the TransferQueue does: first each row as it arrives, then all rows of a field together."""
        fields = {}
        asked = [batch.keys.index(key) for key in keys]
        if fetches is not None:
            fetches.extend(select_fields)
        for name in select_fields:
            if name in data:
                stored = data[name].unbind()
                fields[name] = torch.nested.as_nested_tensor(
                    [stored[row].clone() for row in asked], layout=torch.jagged
                )
            elif name == "index":
                fields[name] = NonTensorStack(*[0] * len(asked))
        return TensorDict(fields, batch_size=len(asked))

    monkeypatch.setattr(queued_batch.tq, "kv_batch_get", get)

    class Batch(SimpleNamespace):
        def __len__(self) -> int:
            return num_rows

    batch = Batch(
        keys=keys or [f"u_{row}_0" for row in range(num_rows)],
        tags=[{"is_padding": not bool(mask.any())} for mask in rows.eligible.split(rows.lengths.tolist())],
        partition_id="train",
        fields=[*data, "index"],
    )

    def put(fields: Any, **_: Any) -> Batch:
        data.update({name: jagged(field.values(), field.offsets().diff()) for name, field in fields.items()})
        return batch

    monkeypatch.setattr(queued_batch.tq, "kv_batch_put", put)
    monkeypatch.setattr(trainer, "read_config", lambda config: fork_config or EntropyForkConfig())
    monkeypatch.setattr(trainer, "check_maskable", lambda *_: None)
    config = {
        "actor_rollout_ref": {
            "actor": {
                "strategy": "fsdp2",
                "use_kl_loss": False,
                "entropy_coeff": 0,
                "calculate_entropy": False,
                "ppo_mini_batch_size": mini_batch_rows,
                "clip_ratio": 0.2,
                "clip_ratio_low": 0.2,
                "clip_ratio_high": 0.28,
                "loss_agg_mode": loss_agg_mode,
                "shuffle": False,
                "policy_loss": {"loss_mode": "vanilla"},
                **(actor or {}),
            },
            "rollout": {"n": 1},
            "num_ranks": num_ranks,
        },
        "trainer": {"critic_warmup": 0},
    }
    this = (trainer_class or Masked)(OmegaConf.create(config))
    assert this.config.actor_rollout_ref.actor.policy_loss.loss_mode == "entropy_fork/vanilla"
    this.global_steps = 1
    monkeypatch.setattr(trainer.ray, "get", lambda answers: answers)  # the real one would start Ray
    this._setup()
    metrics: dict[str, float] = {}
    this._compute_advantage(batch, metrics)
    return data, metrics
