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

from entropy_fork.core.batch import batch_weights
from entropy_fork.core.randomness import seed_of
from entropy_fork.core.statistics import kept_metrics
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
        """Select in each pool, write ``rollout_is_weights``, and report what was kept.

        Returns the batch as the TransferQueue describes it after the write. Workers fetch the fields that the
        description names and no others, so with the old one the weights would not reach them. (Where importance
        weights already stood in the field, what workers fetch under its name is the product written here.)
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
        response_mask = data["response_mask"]
        if not torch.equal(data["entropy"].offsets(), response_mask.offsets()):
            raise EntropyForkError("entropies and response masks of the batch have different lengths")
        identities = _identities(batch.keys, data.get("index", None))
        spec = self.entropy_fork
        selector = spec.selector_at(self.global_steps)  # type: ignore[attr-defined]
        weights, pools = batch_weights(
            entropy=data["entropy"].values(),
            eligible=response_mask.values(),
            lengths=response_mask.offsets().diff(),
            mini_batch=self._mini_batch_of_row(len(batch)),
            selector=selector,
            pool=spec.pool,
            loss_agg_mode=actor.loss_agg_mode,
            denominator=spec.denominator,
            weight=spec.weight,
            row_order=_order(identities),
            row_seeds=_seeds(identities, spec.seed, self.global_steps) if selector.select == "random" else None,  # type: ignore[attr-defined]
        )
        if "rollout_is_weights" in data:
            weights = weights * data["rollout_is_weights"].values()
        output = torch.nested.nested_tensor_from_jagged(weights, response_mask.offsets())
        metrics.update({f"{NODE}/{name}": value for name, value in kept_metrics(pools).items()})
        metrics[f"{NODE}/top_ratio"] = selector.top_ratio
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


def _identities(keys: list[str], index: Any) -> list[tuple[str, int, int, str]]:
    """What a row is, wherever it lies: its data set index, its number in the group, and which output of it.

    verl's keys are ``{uid}_{session}_{output}`` with a uid that is random in every run, so it comes last.
    """
    indices = [""] * len(keys) if index is None else [str(value) for value in index.tolist()]
    identities = []
    for key, data_index in zip(keys, indices, strict=True):
        uid, session, output = key.rsplit("_", 2)
        identities.append((data_index, int(session), int(output), uid))
    return identities


def _order(identities: list[tuple[str, int, int, str]]) -> torch.Tensor:
    order = torch.empty(len(identities), dtype=torch.int64)
    order[sorted(range(len(identities)), key=identities.__getitem__)] = torch.arange(len(identities))
    return order


def _seeds(identities: list[tuple[str, int, int, str]], seed: int, step: int) -> torch.Tensor:
    """A seed per row for ``select=random``: the same on other ranks, in other orders and after a resume."""
    return torch.tensor([seed_of(seed, step, *identity[:3]) for identity in identities], dtype=torch.int64)


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
