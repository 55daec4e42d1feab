"""The advantage hook: token weights of a whole batch, written on the driver before the actor's update.

Hook: verl's registry of V1 trainers (``verl/trainer/ppo/v1/trainer_base.py: TRAINER_REGISTRY``). ``+entropy_fork=…``
must work with whatever ``trainer.v1.trainer_mode`` a command line already has, and a trainer under a new name is taken
for an asynchronous one in six places of verl. So each registered trainer is replaced by a subclass of itself under its
own name; the subclass does nothing unless the config asks for a mask.

At the moment of the hook everything is on the driver's side: verl has computed the old policy's log-probs *and* its
entropies over all ranks (``_compute_old_log_prob``), and has laid the rows out so that each data-parallel rank gets one
contiguous part (``_balance_batch``), which its worker cuts into mini-batches in order
(``engine_workers.py: train_mini_batch``). The weights go into the field ``rollout_is_weights``, which verl's policy
losses multiply into the loss of each token; importance weights that already stand there are multiplied, not replaced.
"""

from __future__ import annotations

from typing import Any

import torch
import transfer_queue as tq
from omegaconf import open_dict
from tensordict import TensorDict
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY, PPOTrainer

from entropy_fork.core.selection import select_top
from entropy_fork.core.statistics import PoolStatistics, kept_metrics
from entropy_fork.core.weighting import kept_token_weights
from entropy_fork.verl.config import MASKED_TRAINERS, NODE, check_maskable, guarded_name, read_config
from entropy_fork.verl.errors import EntropyForkError, process_name


class TokenWeights:
    """Mixin in front of a V1 trainer: after the advantages, the token weights."""

    def __init__(self, config: Any):
        self.entropy_fork = read_config(config)
        if self.entropy_fork is not None:
            check_maskable(config)
            with open_dict(config):  # what the workers will be given
                policy_loss = config.actor_rollout_ref.actor.policy_loss
                policy_loss.loss_mode = guarded_name(policy_loss.loss_mode)
            print(f"entropy_fork: top_ratio={self.entropy_fork.top_ratio} is active in {process_name()}", flush=True)
        super().__init__(config)  # type: ignore[call-arg]

    def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
        batch = super()._compute_advantage(batch, metrics)  # type: ignore[misc]
        updates_actor = self.config.trainer.critic_warmup <= self.global_steps  # type: ignore[attr-defined]
        if self.entropy_fork is not None and updates_actor:
            batch = self._write_token_weights(batch, metrics)
        return batch

    def _write_token_weights(self, batch: Any, metrics: dict) -> Any:
        """Select in each mini-batch, write ``rollout_is_weights``, and report what was kept.

        Returns the batch as the TransferQueue describes it after the write. Workers fetch the fields that the
        description names and no others, so with the old one the weights would not reach them.
        """
        assert self.entropy_fork is not None
        actor = self.config.actor_rollout_ref.actor  # type: ignore[attr-defined]
        fields = ["entropy", "response_mask", "rollout_is_weights", "index"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        if "entropy" not in data:
            raise EntropyForkError(
                f"a mask was asked for, but this step's batch has no entropies in {process_name()}: verl's log-prob "
                f"pass did not write them. Without them the run would train on all tokens, so it stops here."
            )
        weights, pools = mini_batch_weights(
            entropy=data["entropy"],
            response_mask=data["response_mask"],
            mini_batch=self._mini_batch_of_row(len(batch)),
            row_order=_row_order(batch.keys, data.get("index", None)),
            top_ratio=self.entropy_fork.top_ratio,
            loss_agg_mode=actor.loss_agg_mode,
        )
        if "rollout_is_weights" in data:
            weights = weights * data["rollout_is_weights"].values()
        output = torch.nested.nested_tensor_from_jagged(weights, data["response_mask"].offsets())
        metrics.update({f"{NODE}/{name}": value for name, value in kept_metrics(pools).items()})
        return tq.kv_batch_put(
            keys=batch.keys,
            partition_id=batch.partition_id,
            fields=TensorDict({"rollout_is_weights": output}, batch_size=len(batch)),
        )

    def _mini_batch_of_row(self, num_rows: int) -> torch.Tensor:
        """Which mini-batch each row of the batch is trained in, shape (num_rows,).

        Rank r of dp gets the r-th contiguous part and cuts it, in order, into parts of ``mini_batch / dp`` rows: the
        j-th of these, over all ranks, is mini-batch j.
        """
        config = self.config.actor_rollout_ref  # type: ignore[attr-defined]
        dp_size = max(self.actor_rollout_wg._query_dispatch_info("actor")) + 1  # type: ignore[attr-defined]
        rows_per_rank, remainder = divmod(num_rows, dp_size)
        mini_batch_size, rest = divmod(config.actor.ppo_mini_batch_size * config.rollout.n, dp_size)
        if remainder or rest or rows_per_rank % mini_batch_size:
            raise EntropyForkError(
                f"{num_rows} rows cannot be cut into mini-batches of {config.actor.ppo_mini_batch_size} prompts × "
                f"{config.rollout.n} responses over {dp_size} ranks as verl does it."
            )
        return (torch.arange(num_rows) % rows_per_rank) // mini_batch_size


def mini_batch_weights(
    entropy: Any,
    response_mask: Any,
    mini_batch: torch.Tensor,
    row_order: torch.Tensor,
    top_ratio: float,
    loss_agg_mode: str,
) -> tuple[torch.Tensor, list[PoolStatistics]]:
    """Token weights of a batch in verl's layout.

    Args:
        entropy, response_mask: jagged nested, (num_rows, response length), as verl keeps them; entropy in nats.
        mini_batch: int, shape (num_rows,).
        row_order: int, shape (num_rows,): see :func:`entropy_fork.core.selection.select_top`.
        top_ratio: ρ.
        loss_agg_mode: verl's.

    Returns:
        Flat float32 weights in the order of ``response_mask.values()``, and the statistics of each mini-batch.
    """
    offsets = response_mask.offsets()
    if not torch.equal(entropy.offsets(), offsets):
        raise EntropyForkError("entropies and response masks of the batch have different lengths")
    lengths = offsets.diff()
    flat_entropy, flat_mask = entropy.values(), response_mask.values()
    weights = torch.zeros(flat_mask.numel(), dtype=torch.float32)
    pools = []
    for pool in range(int(mini_batch.max()) + 1):
        rows = (mini_batch == pool).nonzero().squeeze(1).tolist()
        slices = [slice(int(offsets[row]), int(offsets[row + 1])) for row in rows]
        pool_entropy = torch.cat([flat_entropy[part] for part in slices])
        pool_mask = torch.cat([flat_mask[part] for part in slices])
        selection = select_top(pool_entropy, pool_mask, lengths[rows], top_ratio, row_order[rows])
        pool_weights = kept_token_weights(selection.kept, pool_mask, lengths[rows], loss_agg_mode)
        for part, values in zip(slices, pool_weights.split(lengths[rows].tolist()), strict=True):
            weights[part] = values
        pools.append(PoolStatistics.of(selection, pool_entropy, pool_mask))
    return weights, pools


def _row_order(keys: list[str], index: Any) -> torch.Tensor:
    """Rows in the order of their data set index, then their number in the group: the same wherever they lie.

    verl's keys are ``{uid}_{session}_{output}`` with a uid that is random in every run, so it only decides last.
    """
    indices = [0] * len(keys) if index is None else [str(value) for value in index.tolist()]
    identities = []
    for key, data_index in zip(keys, indices, strict=True):
        uid, session, output = key.rsplit("_", 2)
        identities.append((data_index, int(session), int(output), uid))
    order = torch.empty(len(keys), dtype=torch.int64)
    order[sorted(range(len(keys)), key=identities.__getitem__)] = torch.arange(len(keys))
    return order


def install() -> None:
    """Put the masked subclasses in the place of verl's trainers; a second call changes nothing."""
    for name in MASKED_TRAINERS:
        trainer = TRAINER_REGISTRY[name]
        if not issubclass(trainer, TokenWeights):
            TRAINER_REGISTRY[name] = _masked(trainer)


def _masked(trainer: type[PPOTrainer]) -> type[PPOTrainer]:
    # The name is verl's own, so that logs and errors read as they did before.
    return type(trainer.__name__, (TokenWeights, trainer), {"__module__": __name__, "__doc__": trainer.__doc__})


install()
