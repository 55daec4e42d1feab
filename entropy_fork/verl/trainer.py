"""The trainer hook: what we add to the steps of verl's trainer.

Hook: verl's base class of V1 trainers (``verl/trainer/ppo/v1/trainer_base.py: PPOTrainer``). verl has no hook between
the advantages and the update. A trainer of our own in verl's registry would not be enough: a task runner can still
derive its trainer from one of verl's classes, and would train without the mask. So :func:`install` puts our mixins
*below* ``PPOTrainer``. For each method that a mixin extends, verl's own version moves into a base class behind the
mixins, and the method that stays in ``PPOTrainer`` calls the mixins. So every trainer that derives from ``PPOTrainer``
calls them. The mixins do nothing unless the config asks for it.

When verl has computed the advantages, everything that a mask needs is there. verl has computed the old policy's
log-probs and entropies over all ranks (``_compute_old_log_prob``). It has ordered the rows so that each data-parallel
rank gets one contiguous part (``_balance_batch``), which the worker cuts into mini-batches in order
(``engine_workers.py: train_mini_batch``). So the token weights are written then, into the field ``rollout_is_weights``.
verl's policy losses multiply that field into the loss of each token. Importance weights that already stand there are
multiplied, not replaced.

``masking.py`` decides what the driver writes and what the workers write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from typing import TYPE_CHECKING, Any

import ray
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from entropy_fork.common.errors import EntropyForkError, process_name
from entropy_fork.common.verl_types import BatchDescription, StockTrainer
from entropy_fork.core.rule import TOKEN_MEAN
from entropy_fork.verl.checks import check_maskable
from entropy_fork.verl.config import NODE, EntropyForkConfig, default_of, guard_loss, read_config
from entropy_fork.verl.engine import admit_worker
from entropy_fork.verl.guards.checkpoint import WholeCheckpoints
from entropy_fork.verl.guards.waiting import WatchedWaiting
from entropy_fork.verl.masking import Masking, Update, masking_of
from entropy_fork.verl.policy_loss import kept_means
from entropy_fork.verl.queued_batch import QueuedBatch
from entropy_fork.verl.scores_of_run import fields_read, own_functions
from entropy_fork.verl.sparse_head import AT_KEPT, AT_RESPONSES, EVERYWHERE, HEAD, SUM_PI_SQUARED
from entropy_fork.verl.token_dump import TokenDump

if TYPE_CHECKING:
    Base = StockTrainer
else:
    Base = object  # install() puts the mixins in front of verl's own methods


class TokenWeights(Base):
    """Mixin below verl's trainer: it writes the token weights when the advantages are there.

    Its attributes and methods begin with ``_entropy_fork``, so that they do not clash with those of a user's trainer.
    """

    __slots__ = ()  # Python lets :func:`install` change __bases__ only if the mixins add no slots.

    _entropy_fork_masking: Masking | None = None
    _entropy_fork_dump: TokenDump | None = None
    _entropy_fork_weighed_keys: Sequence[str] = ()  # the rows of the batch that has token weights

    def __init__(self, config: Any):
        fork_config = read_config(config)
        if fork_config is not None:
            check_maskable(config, fork_config)
            guard_loss(config)  # what the workers will be given
            words = _in_words(fork_config, config.actor_rollout_ref.actor.loss_agg_mode)
            print(f"entropy_fork: {words} is active in {process_name()}", flush=True)
            reason = fork_config.dense_because(config, fork_config.may_drop_at(1))
            where = "kept positions only" if reason is None else f"every position, because {reason}"
            print(f"entropy_fork: the LM head of an update computes {where}", flush=True)
            self._entropy_fork_masking = masking_of(config, fork_config)
        self._entropy_fork_dump = TokenDump.asked_for(config, self._entropy_fork_masking)
        super().__init__(config)

    def _setup(self) -> None:
        """verl's setup. Then each worker says, before the first rollout, whether it can apply the mask."""
        super()._setup()
        if self._entropy_fork_masking is not None:
            loss_mode = self.config.actor_rollout_ref.actor.policy_loss.loss_mode
            masking = self._entropy_fork_masking
            needs = (loss_mode, masking.in_worker, own_functions(masking.fork_config) if masking.in_worker else ())
            ray.get([worker.__ray_call__.remote(admit_worker, *needs) for worker in self.actor_rollout_wg.workers])
        if self._entropy_fork_dump is not None:
            self._entropy_fork_dump.start()

    def _compute_old_log_prob(self, batch: BatchDescription, metrics: dict[str, Any]) -> BatchDescription:
        self._entropy_fork_ask_for_head(batch)
        masking = self._entropy_fork_masking
        if masking is None or "sum_pi_squared" not in fields_read(masking.fork_config):
            return super()._compute_old_log_prob(batch, metrics)
        batch.extra_info[SUM_PI_SQUARED] = True  # verl's engines compute it then, in this pass
        returned = super()._compute_old_log_prob(batch, metrics)
        for described in (batch, returned):
            described.extra_info.pop(SUM_PI_SQUARED, None)
        return returned

    def _compute_ref_log_prob(self, batch: BatchDescription, metrics: dict[str, Any]) -> BatchDescription:
        self._entropy_fork_ask_for_head(batch)
        return super()._compute_ref_log_prob(batch, metrics)

    def _compute_advantage(self, batch: BatchDescription, metrics: dict[str, Any]) -> BatchDescription:
        batch = super()._compute_advantage(batch, metrics)
        if self.config.trainer.critic_warmup > self.global_steps:  # the actor is not updated yet
            return batch
        number = getattr(self, "local_trigger_step", 0)  # separate_async makes several updates in one step
        if self._entropy_fork_masking is not None:
            update = Update(self.global_steps, number, self.actor_rollout_wg)
            batch = self._entropy_fork_write_weights(self._entropy_fork_masking, batch, update, metrics)
        # Dump only at the first of these updates, whose policy gave the answers.
        if self._entropy_fork_dump is not None and number == 0:
            self._entropy_fork_dump.write(batch, self.global_steps, self.tokenizer)
        return batch

    def _update_actor(self, batch: BatchDescription, metrics: dict[str, Any]) -> BatchDescription:
        masking = self._entropy_fork_masking
        if masking is None:
            return super()._update_actor(batch, metrics)
        if batch.keys != self._entropy_fork_weighed_keys:
            raise EntropyForkError(
                f"a mask was asked for, but {type(self).__name__} in {process_name()} sends the actor a batch that has "
                f"no token weights: its _compute_advantage does not call verl's, or its _update_actor is given another "
                f"batch. Call super()._compute_advantage(batch, metrics) there, or write entropy_fork=off."
            )
        batch.extra_info.update(masking.flags_to_send(self.global_steps))
        self._entropy_fork_ask_for_head(batch, is_update=True)
        num_rows = len(batch)
        batch = super()._update_actor(batch, metrics)
        prefix = f"actor/{NODE}/"
        returned = {key.removeprefix("actor/"): metrics.pop(key) for key in list(metrics) if key.startswith(prefix)}
        metrics.update(kept_means(returned))
        metrics.update(masking.metrics_of_update(returned, num_rows, self.global_steps))
        return batch

    def _entropy_fork_write_weights(
        self, masking: Masking, batch: BatchDescription, update: Update, metrics: dict[str, Any]
    ) -> BatchDescription:
        """Write into the batch what the workers need, and return verl's description of it with that."""
        queued = QueuedBatch(batch)
        written = masking.fields_to_write(queued, update, metrics)
        self._entropy_fork_weighed_keys = list(batch.keys)
        return queued.put(written)

    def _entropy_fork_ask_for_head(self, batch: BatchDescription, is_update: bool = False) -> None:
        """Tell the workers, with the batch, where to compute the LM head. If nothing is dropped, leave it to verl."""
        if self._entropy_fork_masking is None:
            return
        fork_config = self._entropy_fork_masking.fork_config
        if not fork_config.may_drop_at(self.global_steps):
            batch.extra_info.pop(HEAD, None)
        elif is_update:
            reason = fork_config.dense_because(self.config, may_drop=True)
            batch.extra_info[HEAD] = AT_KEPT if reason is None else EVERYWHERE
        else:
            batch.extra_info[HEAD] = AT_RESPONSES if fork_config.sparse_head else EVERYWHERE


def _in_words(fork_config: EntropyForkConfig, loss_agg_mode: str = TOKEN_MEAN) -> str:
    """The keys that are not the default, and what they mean."""
    changed = [
        f.name for f in fields(fork_config) if getattr(fork_config, f.name) != default_of(f) or f.name == "top_ratio"
    ]
    settings = " ".join(f"{name}={getattr(fork_config, name)}" for name in changed)
    return f"{settings} ({fork_config.rule(loss_agg_mode).describe()[:-1]})"


def install() -> None:
    """Put the mixins below verl's ``PPOTrainer``; a second call changes nothing.

    A method of a trainer then calls the mixins' method, which calls verl's by ``super()``. That also holds for classes
    that were derived from ``PPOTrainer`` before.

    Raises:
        EntropyForkError: the trainer of this verl lacks a method that the mixins extend.
    """
    if issubclass(PPOTrainer, TokenWeights):
        return
    mixins = (TokenWeights, WholeCheckpoints, WatchedWaiting)
    stock = vars(PPOTrainer)
    extended = {name for name in EXTENDED if name in stock}
    # A method of verl that calls super() itself would call the mixins a second time.
    if extended != set(EXTENDED) or any("__class__" in stock[name].__code__.co_freevars for name in extended):
        raise EntropyForkError(f"verl's PPOTrainer has changed: entropy_fork extends its {', '.join(EXTENDED)}")
    moved = {"__slots__": (), "__module__": PPOTrainer.__module__} | {name: stock[name] for name in EXTENDED}
    behind = type(PPOTrainer)("StockPPOTrainer", PPOTrainer.__bases__, moved)
    for name in extended:
        setattr(PPOTrainer, name, _by_the_mixins(stock[name]))
    PPOTrainer.__bases__ = (*mixins, behind)


def _by_the_mixins(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A method for PPOTrainer that calls the mixins. If ``self`` is no trainer, as in some tests, it calls verl's."""

    @wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not issubclass(type(self), PPOTrainer):
            return stock(self, *args, **kwargs)
        return getattr(super(PPOTrainer, self), stock.__name__)(*args, **kwargs)

    return method


#: the methods of verl's PPOTrainer that the mixins extend
EXTENDED = (
    "__init__", "_setup", "_build_replay_buffer", "_load_checkpoint", "_save_checkpoint",
    "_compute_old_log_prob", "_compute_ref_log_prob", "_compute_advantage", "_update_actor",
)  # fmt: skip

install()
