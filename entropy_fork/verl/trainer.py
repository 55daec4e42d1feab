"""The advantage hook: token weights of a whole batch, written on the driver before the actor's update.

Hook: verl's base class of V1 trainers (``verl/trainer/ppo/v1/trainer_base.py: PPOTrainer``). verl has no hook between
the advantages and the update, and a registry of trainers cannot serve: verl's own classes stay importable, so a task
runner that derives its trainer from one of them would train without the mask. So :func:`install` puts our mixins
*below* ``PPOTrainer``: its own version of each method that a mixin extends moves into a base class behind them, and
what it keeps under that name calls the mixins. Whoever builds or derives a trainer, under whatever name, comes by here.
The mixins do nothing unless the config asks for it.

At the moment of the hook everything is on the driver's side: verl has computed the old policy's log-probs *and* its
entropies over all ranks (``_compute_old_log_prob``), and has laid the rows out so that each data-parallel rank gets one
contiguous part (``_balance_batch``), which its worker cuts into mini-batches in order
(``engine_workers.py: train_mini_batch``). The weights go into the field ``rollout_is_weights``, which verl's policy
losses multiply into the loss of each token; importance weights that already stand there are multiplied, not replaced.

What cannot be selected here (the current policy's entropies, micro-batches, shuffled mini-batches) is selected in the
worker: see ``gradient_step.py``. The driver then sends the rule, and who each row is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial, wraps
from typing import Any

import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from entropy_fork.common.errors import EntropyForkError, process_name
from entropy_fork.core.identity import Identity, RowKey, identify, row_order, row_seeds
from entropy_fork.core.responses import Responses, pool_of_responses, select_in_pools, weigh_mini_batches
from entropy_fork.core.tally import Tally, draws
from entropy_fork.verl.config import (
    NODE,
    EntropyForkConfig,
    check_maskable,
    guard_loss,
    read_config,
)
from entropy_fork.verl.engine import admit_worker
from entropy_fork.verl.gradient_step import KEPT, ROW_IDENTITY, RULE, tally_of
from entropy_fork.verl.guards.checkpoint import WholeCheckpoints
from entropy_fork.verl.guards.waiting import WatchedWaiting
from entropy_fork.verl.policy_loss import WEIGHED, kept_means
from entropy_fork.verl.sparse_head import EVERYWHERE, HEAD, RESPONSES
from entropy_fork.verl.sparse_head import KEPT as KEPT_POSITIONS
from entropy_fork.verl.token_dump import TokenDump


class TokenWeights:
    """Mixin below verl's trainer: after the advantages, the token weights."""

    # Python lets :func:`install` change __bases__ only if the mixins add no slots. (mypy would apply () to verl.)
    __slots__ = tuple[str, ...]()

    entropy_fork: EntropyForkConfig | None = None
    entropy_fork_dump: TokenDump | None = None

    def __init__(self, config: Any):
        self.entropy_fork = read_config(config)
        self.weighed_keys: list[str] = []  # the rows of the batch that has weights
        self.num_dropped = 0  # of its tokens, those of weight 0, where the driver has written the weights
        if self.entropy_fork is not None:
            check_maskable(config, self.entropy_fork)
            guard_loss(config)  # what the workers will be given
            print(f"entropy_fork: {_in_words(self.entropy_fork)} is active in {process_name()}", flush=True)
            reason = self.entropy_fork.dense_because(config, self.entropy_fork.selector_at(1).kept_share)
            where = "kept positions only" if reason is None else f"every position, because {reason}"
            print(f"entropy_fork: the LM head of an update computes {where}", flush=True)
        self.entropy_fork_dump = TokenDump.asked_for(config)
        super().__init__(config)  # type: ignore[call-arg]

    def _setup(self) -> None:
        """verl's setup. Then each worker says, before the first rollout, whether it can apply the mask."""
        super()._setup()  # type: ignore[misc]
        if self.entropy_fork is not None:
            actor = self.config.actor_rollout_ref.actor  # type: ignore[attr-defined]
            needs = (actor.policy_loss.loss_mode, self.entropy_fork.in_worker(actor.shuffle))
            workers = self.actor_rollout_wg.workers  # type: ignore[attr-defined]
            ray.get([worker.__ray_call__.remote(admit_worker, *needs) for worker in workers])
        if self.entropy_fork_dump is not None:
            self.entropy_fork_dump.start()

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        self._ask_for_head(batch)
        return super()._compute_old_log_prob(batch, metrics)  # type: ignore[misc]

    def _compute_ref_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        self._ask_for_head(batch)
        return super()._compute_ref_log_prob(batch, metrics)  # type: ignore[misc]

    def _ask_for_head(self, batch: Any, is_update: bool = False) -> None:
        """Say with the batch where the LM head is wanted. Where nothing is dropped, say nothing: stock verl."""
        spec = self.entropy_fork
        if spec is None:
            return
        kept_share = spec.selector_at(self.global_steps).kept_share  # type: ignore[attr-defined]
        if kept_share == 1:
            batch.extra_info.pop(HEAD, None)
        elif is_update:
            reason = spec.dense_because(self.config, kept_share)  # type: ignore[attr-defined]
            batch.extra_info[HEAD] = KEPT_POSITIONS if reason is None else EVERYWHERE
        else:
            batch.extra_info[HEAD] = RESPONSES if spec.sparse_head else EVERYWHERE

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_advantage(batch, metrics)  # type: ignore[misc]
        updates_actor = self.config.trainer.critic_warmup <= self.global_steps  # type: ignore[attr-defined]
        if self.entropy_fork is not None and updates_actor:
            batch = self._write_token_weights(batch, metrics)
        # of the updates that separate_async takes in one step the first, whose policy the answers came from
        if self.entropy_fork_dump is not None and updates_actor and getattr(self, "local_trigger_step", 0) == 0:
            self.entropy_fork_dump.write(batch, self.global_steps, self.tokenizer)  # type: ignore[attr-defined]
        return batch

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        if self.entropy_fork is None:
            return super()._update_actor(batch, metrics)  # type: ignore[misc]
        if batch.keys != self.weighed_keys:
            raise EntropyForkError(
                f"a mask was asked for, but {type(self).__name__} in {process_name()} sends the actor a batch that has "
                f"no token weights: its _compute_advantage does not call verl's, or its _update_actor is given another "
                f"batch. Call super()._compute_advantage(batch, metrics) there, or write entropy_fork=off."
            )
        config = self.config.actor_rollout_ref  # type: ignore[attr-defined]
        in_worker = self.entropy_fork.in_worker(config.actor.shuffle)
        batch.extra_info[WEIGHED] = not in_worker
        if in_worker:
            rule = self.entropy_fork.rule_at(self.global_steps, config.actor.loss_agg_mode)  # type: ignore[attr-defined]
            batch.extra_info[RULE] = rule
        self._ask_for_head(batch, is_update=True)
        num_rows = len(batch)
        batch = super()._update_actor(batch, metrics)  # type: ignore[misc]
        prefix = f"actor/{NODE}/"
        ours = {key.removeprefix("actor/"): metrics.pop(key) for key in list(metrics) if key.startswith(prefix)}
        metrics.update(kept_means(ours))
        if self.num_dropped and not ours[f"{NODE}/loss_dropped"]:
            raise EntropyForkError(
                f"{self.num_dropped} tokens of this batch were given the weight 0, but the actor's update of step "
                f"{self.global_steps} trained on all of them: something wrote the field rollout_is_weights again after "  # type: ignore[attr-defined]
                f"verl's _compute_advantage. Write importance weights of your own before it, or multiply them in."
            )
        if in_worker and self.entropy_fork.pool != "batch":  # which was selected, and reported, on the driver
            tally = tally_of(ours, num_rows // (config.actor.ppo_mini_batch_size * config.rollout.n))
            metrics.update({f"{NODE}/{name}": value for name, value in tally.metrics().items()})
        return batch

    def _write_token_weights(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """Select in each pool, write ``rollout_is_weights``, and report what was kept.

        Where the selection is made in the worker, what is written is what that needs: who each row is.

        Returns the batch as the TransferQueue describes it after the write. Workers fetch the fields that the
        description names and no others, so with the old one the weights would not reach them. (Where importance
        weights already stood in the field, what workers fetch under its name is the product written here.)
        """
        assert self.entropy_fork is not None
        actor = self.config.actor_rollout_ref.actor  # type: ignore[attr-defined]
        rule = self.entropy_fork.rule_at(self.global_steps, actor.loss_agg_mode)  # type: ignore[attr-defined]
        rows, offsets = self._rows(batch, metrics)
        metrics[f"{NODE}/top_ratio"] = rule.selector.top_ratio
        in_worker = self.entropy_fork.in_worker(actor.shuffle)
        written, num_dropped = {}, 0
        if in_worker:
            written[ROW_IDENTITY] = _nested(torch.stack([rows.order, rows.seeds], dim=1).flatten(), 2)
        if not in_worker or rule.pool == "batch":  # a worker sees no more than its mini-batch
            mini_batch = torch.zeros_like(rows.lengths) if in_worker else self._mini_batch_of_row(len(batch))
            kept, pools = select_in_pools(rows, pool_of_responses(rule.pool, mini_batch), rule.selector)
            advantages = _fetch(batch, "advantages").values()
            tally = Tally.of(kept, rows.entropy, rows.eligible, rows.lengths, pools, advantages)
            metrics.update({f"{NODE}/{name}": value for name, value in tally.metrics().items()})
            del advantages
            if in_worker:
                written[KEPT] = torch.nested.nested_tensor_from_jagged(kept.to(torch.uint8), offsets)
            else:
                num_dropped = int(tally.num_tokens - tally.num_kept)
                weights = weigh_mini_batches(rows, kept, mini_batch, rule)
                del rows, kept
                importance = _fetch(batch, "rollout_is_weights")
                if importance is not None:
                    weights *= importance.values()
                    del importance
                written["rollout_is_weights"] = torch.nested.nested_tensor_from_jagged(weights, offsets)
        self.weighed_keys, self.num_dropped = list(batch.keys), num_dropped
        return tq.kv_batch_put(
            keys=batch.keys,
            partition_id=batch.partition_id,
            fields=TensorDict(written, batch_size=len(batch)),
        )

    def _rows(self, batch: Any, metrics: dict[str, Any]) -> tuple[Responses, torch.Tensor]:
        """The rows of the batch, and where each begins and ends, int64, shape (num_rows + 1,).

        With ``select=random`` the number of distinct draws is added to the metrics.

        Raises:
            EntropyForkError: there are no entropies, or not one for each token; or no prompts.
        """
        assert self.entropy_fork is not None
        identities = _identities(batch)  # first: it may fetch answers, which are as large as all of the rest
        mask = _fetch(batch, "response_mask")
        offsets, eligible = mask.offsets(), mask.values().bool()
        del mask
        entropy = _fetch(batch, "entropy")
        if entropy is None:
            raise EntropyForkError(
                f"a mask was asked for, but this step's batch has no entropies in {process_name()}: verl's log-prob "
                f"pass did not write them. Without them the run would train on all tokens, so it stops here."
            )
        if not torch.equal(entropy.offsets(), offsets):
            raise EntropyForkError("entropies and response masks of the batch have different lengths")
        # separate_async takes several batches in one step
        update = getattr(self, "local_trigger_step", 0)
        seeds = row_seeds(identities, self.entropy_fork.seed, self.global_steps, update)  # type: ignore[attr-defined]
        rows = Responses(entropy.values(), eligible, offsets.diff(), row_order(identities), seeds)
        if self.entropy_fork.select == "random":
            counts = draws(seeds, eligible, rows.lengths)
            metrics.update({f"{NODE}/{name}": value for name, value in counts.items()})
        return rows, offsets

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


def _fetch(batch: Any, name: str) -> Any:
    """One field of the batch, None where it has none.

    One at a time: while the TransferQueue puts a field together it takes twice the field's size, and verl's mask of
    eight bytes for each token is what no other part of a selection comes near.
    """
    if name not in batch.fields:
        return None
    # get, because an item that is no tensor comes as a mere list
    return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=[name]).get(name)


def _identities(batch: Any) -> list[Identity]:
    """Who each row is; see ``core/identity.py``. Fetches one prompt per group, and answers only where groups collide.

    Raises:
        EntropyForkError: the batch has no prompts.
    """
    if "prompts" not in batch.fields:
        raise EntropyForkError(
            f"the batch has no field 'prompts' in {process_name()}, so draws and ties cannot follow the data. verl's "
            f"agent loops write it; one of your own must write it too."
        )
    index = _fetch(batch, "index")
    indices = [""] * len(batch.keys) if index is None else [str(value) for value in index.tolist()]
    keys = []
    for key, data_index, tag in zip(batch.keys, indices, batch.tags, strict=True):
        uid, session, output = key.rsplit("_", 2)
        keys.append(RowKey(uid, int(session), int(output), data_index, tag.get("is_padding", False)))

    def tokens(name: str, rows: list[int]) -> Any:
        some = [batch.keys[row] for row in rows]
        return tq.kv_batch_get(keys=some, partition_id=batch.partition_id, select_fields=[name])[name].unbind()

    return identify(keys, partial(tokens, "prompts"), partial(tokens, "responses"))


def _nested(values: torch.Tensor, per_row: int) -> torch.Tensor:
    return torch.nested.nested_tensor_from_jagged(values, torch.arange(0, values.numel() + 1, per_row))


def _in_words(spec: EntropyForkConfig) -> str:
    changed = [f.name for f in fields(spec) if getattr(spec, f.name) != f.default or f.name == "top_ratio"]
    return " ".join(f"{name}={getattr(spec, name)}" for name in changed)


def install() -> None:
    """Put the mixins below verl's ``PPOTrainer``; a second call changes nothing.

    A trainer's method then calls the mixins', and theirs verl's, by ``super()``, also in classes that were derived from
    it before.

    Raises:
        EntropyForkError: this verl's trainer has not the methods that the mixins extend.
    """
    if issubclass(PPOTrainer, TokenWeights):
        return
    mixins = (TokenWeights, WholeCheckpoints, WatchedWaiting)
    stock = vars(PPOTrainer)
    extended = {name for name in EXTENDED if name in stock}
    # A method that itself calls super() would come back to the mixins from below.
    if extended != set(EXTENDED) or any("__class__" in stock[name].__code__.co_freevars for name in extended):
        raise EntropyForkError(f"verl's PPOTrainer has changed: entropy_fork extends its {', '.join(EXTENDED)}")
    moved = {"__slots__": (), "__module__": PPOTrainer.__module__} | {name: stock[name] for name in EXTENDED}
    behind = type(PPOTrainer)("StockPPOTrainer", PPOTrainer.__bases__, moved)
    for name in extended:
        setattr(PPOTrainer, name, _by_the_mixins(stock[name]))
    PPOTrainer.__bases__ = (*mixins, behind)


def _by_the_mixins(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A method of PPOTrainer's: of a trainer the mixins', of anything else, which tests pass as ``self``, verl's."""

    @wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not issubclass(type(self), PPOTrainer):
            return stock(self, *args, **kwargs)
        return getattr(super(PPOTrainer, self), stock.__name__)(*args, **kwargs)

    return method


#: what the mixins extend of verl's PPOTrainer
EXTENDED = (
    "__init__", "_setup", "_build_replay_buffer", "_load_checkpoint", "_save_checkpoint",
    "_compute_old_log_prob", "_compute_ref_log_prob", "_compute_advantage", "_update_actor",
)  # fmt: skip

install()
