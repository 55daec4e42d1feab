"""Where the mask of a run is made: on the driver, or in the workers. Decided once, when the trainer is built.

- :class:`SelectOnDriver`, the usual case: before the update the driver selects the tokens and writes their weights.
- :class:`SelectInWorker`: at each gradient step the worker selects the tokens and writes their weights, because the
  driver cannot know what to keep.
- :class:`SelectOnDriverWeighInWorker`, for ``pool=batch`` with ``actor.shuffle``: before the update the driver selects
  the tokens, and at each gradient step the worker writes their weights.

The driver cannot know what to keep in three cases: the rule uses the current policy's entropies (``entropy=current``);
a pool is a micro-batch (``pool=micro_batch``); or the worker shuffles the mini-batches (``actor.shuffle``).

In ``SelectOnDriverWeighInWorker`` both have a part. A worker sees only its mini-batch, so the driver must select from
the whole batch. The driver does not know which rows verl's shuffle puts into one mini-batch, so the worker must compute
the denominator.

``trainer.py`` calls these objects and does not ask which one it has. What a worker does is in ``gradient_step.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from entropy_fork.common.errors import EntropyForkError, process_name
from entropy_fork.core.identity import row_order, row_seeds
from entropy_fork.core.responses import Responses, pool_of_responses, select_in_pools, weigh_mini_batches
from entropy_fork.core.rule import Rule
from entropy_fork.core.tally import Tally, draws
from entropy_fork.verl.config import NODE, EntropyForkConfig
from entropy_fork.verl.gradient_step import KEPT_TOKENS, ROW_IDENTITY, RULE, tally_of
from entropy_fork.verl.policy_loss import WEIGHED
from entropy_fork.verl.queued_batch import FlatField, QueuedBatch

#: the field of verl's batch that verl's policy losses multiply into the loss of each token
WEIGHTS = "rollout_is_weights"


@dataclass(frozen=True)
class Update:
    """One update of the actor.

    Attributes:
        step: the training step, from 1.
        number: the number of the update in this step, from 0. verl's trainer ``separate_async`` makes several per step.
        workers: verl's worker group of the actor.
    """

    step: int
    number: int
    workers: Any


class Masking(ABC):
    """How the mask of a run is made.

    Args:
        config: the root of verl's config.
        fork_config: ours.

    Attributes:
        in_worker: whether the worker's engine must make, or apply, the selection.
        selected_field: the field of the batch on the driver that is 0 for a dropped token and not 0 for a kept one;
            None if there is no such field.
    """

    in_worker: ClassVar[bool]
    selected_field: ClassVar[str | None]

    def __init__(self, config: Any, fork_config: EntropyForkConfig):
        self.fork_config = fork_config
        self._config = config

    @abstractmethod
    def fields_to_write(self, batch: QueuedBatch, update: Update, metrics: dict[str, float]) -> dict[str, FlatField]:
        """Select in each pool, if the driver selects, and report what was kept.

        Args:
            batch: the batch as the update will see it: with advantages and entropies, in verl's layout of rows.
            update: the update that the batch is for.
            metrics: the metrics of the step; those of the selection are added.

        Returns:
            What to write into the batch for the workers.

        Raises:
            EntropyForkError: the batch has no entropies, or not one for each token; or it has no prompts.
        """

    @abstractmethod
    def flags_to_send(self, step: int) -> dict[str, Any]:
        """What to send to the workers along with the update, once for the whole batch.

        Args:
            step: the training step, from 1.
        """

    @abstractmethod
    def metrics_of_update(self, returned: dict[str, float], num_rows: int, step: int) -> dict[str, float]:
        """Check that the update used the mask, and make metrics of what the workers returned.

        Args:
            returned: our metrics, averaged by verl over the ranks and gradient steps of the update.
            num_rows: the number of rows of the batch.
            step: the training step, from 1.

        Raises:
            EntropyForkError: the update trained on tokens that had the weight 0.
        """

    def _rule_at(self, step: int) -> Rule:
        return self.fork_config.rule_at(step, self._config.actor_rollout_ref.actor.loss_agg_mode)

    def _read(
        self, batch: QueuedBatch, update: Update, rule: Rule, metrics: dict[str, float]
    ) -> tuple[Responses, Tensor]:
        """The responses of the batch, and where each begins and ends: int64, shape (num_rows + 1,)."""
        identities = batch.identities()  # first, because it may fetch answers, which are as large as everything else
        eligible, offsets = _response_mask(batch)
        entropy = batch.fetch("entropy")
        if entropy is None:
            raise EntropyForkError(
                f"a mask was asked for, but this step's batch has no entropies in {process_name()}: verl's log-prob "
                f"pass did not write them. Without them the run would train on all tokens, so it stops here."
            )
        if not torch.equal(entropy.offsets, offsets):
            raise EntropyForkError("entropies and response masks of the batch have different lengths")
        seeds = row_seeds(identities, self.fork_config.seed, update.step, update.number)
        responses = Responses(entropy.values, eligible, offsets.diff(), row_order(identities), seeds)
        if rule.selector.select == "random":
            _add(metrics, draws(seeds, eligible, responses.lengths))
        metrics[f"{NODE}/top_ratio"] = rule.selector.top_ratio
        return responses, offsets


class SelectOnDriver(Masking):
    """The driver selects and writes the token weights. The workers only multiply, which every engine of verl can do."""

    in_worker = False
    selected_field = WEIGHTS

    def __init__(self, config: Any, fork_config: EntropyForkConfig):
        super().__init__(config, fork_config)
        self._num_dropped = 0  # tokens of the last batch that were given the weight 0

    def fields_to_write(self, batch: QueuedBatch, update: Update, metrics: dict[str, float]) -> dict[str, FlatField]:
        """The token weights, times the importance weights that are there already."""
        rule, config = self._rule_at(update.step), self._config.actor_rollout_ref
        responses, offsets = self._read(batch, update, rule, metrics)
        mini_batch = mini_batch_of_row(
            len(batch), config.actor.ppo_mini_batch_size, config.rollout.n, _num_ranks(update.workers)
        )
        kept, tally = _select(batch, responses, pool_of_responses(rule.pool, mini_batch), rule, metrics)
        weights = weigh_mini_batches(responses, kept, mini_batch, rule)
        del responses, kept
        importance = batch.fetch(WEIGHTS)
        if importance is not None:
            weights *= importance.values
        self._num_dropped = int(tally.num_tokens - tally.num_kept)
        return {WEIGHTS: FlatField(weights, offsets)}

    def flags_to_send(self, step: int) -> dict[str, Any]:
        """That the weights are written."""
        return {WEIGHED: True}

    def metrics_of_update(self, returned: dict[str, float], num_rows: int, step: int) -> dict[str, float]:
        """None: all were reported when the driver selected. Checks that the weights reached the loss.

        Raises:
            EntropyForkError: the update trained on tokens that had the weight 0.
        """
        if self._num_dropped and not returned[f"{NODE}/loss_dropped"]:
            raise EntropyForkError(
                f"{self._num_dropped} tokens of this batch were given the weight 0, but the actor's update of step "
                f"{step} trained on all of them: something wrote the field {WEIGHTS} again after verl's "
                f"_compute_advantage. Write importance weights of your own before it, or multiply them in."
            )
        return {}


class SelectInWorker(Masking):
    """The worker selects and writes the token weights, at each gradient step. It is told who each row is."""

    in_worker = True
    selected_field: ClassVar[str | None] = None

    def fields_to_write(self, batch: QueuedBatch, update: Update, metrics: dict[str, float]) -> dict[str, FlatField]:
        """The order and the seed of each row."""
        responses, _ = self._read(batch, update, self._rule_at(update.step), metrics)
        return {ROW_IDENTITY: _order_and_seeds(responses)}

    def flags_to_send(self, step: int) -> dict[str, Any]:
        """The rule."""
        return {WEIGHED: False, RULE: self._rule_at(step)}

    def metrics_of_update(self, returned: dict[str, float], num_rows: int, step: int) -> dict[str, float]:
        """What the workers kept."""
        config = self._config.actor_rollout_ref
        tally = tally_of(returned, num_rows // (config.actor.ppo_mini_batch_size * config.rollout.n))
        metrics: dict[str, float] = {}
        _add(metrics, tally.metrics())
        return metrics


class SelectOnDriverWeighInWorker(SelectInWorker):
    """The driver selects, from the whole batch. The worker writes the weights, at each gradient step.

    For ``pool=batch`` with ``actor.shuffle``: the worker is told who each row is, and which of its tokens are kept.
    """

    selected_field = KEPT_TOKENS

    def fields_to_write(self, batch: QueuedBatch, update: Update, metrics: dict[str, float]) -> dict[str, FlatField]:
        """The order and the seed of each row, and the kept tokens, as 0 and 1."""
        rule = self._rule_at(update.step)
        responses, offsets = self._read(batch, update, rule, metrics)
        whole_batch = torch.zeros_like(responses.lengths)
        kept, _ = _select(batch, responses, whole_batch, rule, metrics)
        return {ROW_IDENTITY: _order_and_seeds(responses), KEPT_TOKENS: FlatField(kept.to(torch.uint8), offsets)}

    def metrics_of_update(self, returned: dict[str, float], num_rows: int, step: int) -> dict[str, float]:
        """None: all were reported when the driver selected."""
        return {}


def masking_of(config: Any, fork_config: EntropyForkConfig) -> Masking:
    """Decide where the mask of a run is made.

    Args:
        config: the root of verl's config.
        fork_config: ours, which asks for a mask.
    """
    if not fork_config.in_worker(config.actor_rollout_ref.actor.shuffle):
        return SelectOnDriver(config, fork_config)
    if fork_config.pool == "batch":
        return SelectOnDriverWeighInWorker(config, fork_config)
    return SelectInWorker(config, fork_config)


def mini_batch_of_row(num_rows: int, prompts: int, answers: int, num_ranks: int) -> Tensor:
    """Which mini-batch each row of a batch is trained in, int64, shape (num_rows,).

    verl gives each rank a contiguous part of the batch. The rank cuts its part, in order, into pieces of
    ``prompts * answers / num_ranks`` rows. The j-th pieces of all ranks together are mini-batch j.

    Args:
        num_rows: the number of rows of the batch.
        prompts: the number of prompts of a mini-batch, verl's ``actor.ppo_mini_batch_size``.
        answers: the number of answers to each prompt, verl's ``rollout.n``.
        num_ranks: the number of data-parallel ranks.

    Raises:
        EntropyForkError: the rows cannot be cut in this way.
    """
    rows_per_rank, remainder = divmod(num_rows, num_ranks)
    piece, rest = divmod(prompts * answers, num_ranks)
    if remainder or rest or rows_per_rank % piece:
        raise EntropyForkError(
            f"{num_rows} rows cannot be cut into mini-batches of {prompts} prompts × {answers} responses over "
            f"{num_ranks} ranks as verl does it."
        )
    return (torch.arange(num_rows) % rows_per_rank) // piece


def _num_ranks(workers: Any) -> int:
    return max(workers._query_dispatch_info("actor")) + 1


def _response_mask(batch: QueuedBatch) -> tuple[Tensor, Tensor]:
    """The response mask of all rows, bool, shape (num_tokens,), and its offsets.

    This is a function of its own so that verl's int64 mask is freed when it returns.
    """
    mask = batch.fetch("response_mask")
    assert mask is not None  # verl's agent loops write it
    return mask.values.bool(), mask.offsets


def _select(
    batch: QueuedBatch, responses: Responses, pool_of_response: Tensor, rule: Rule, metrics: dict[str, float]
) -> tuple[Tensor, Tally]:
    """Select in each pool, and add the counts to the metrics. Returns the kept tokens, bool, shape (num_tokens,)."""
    kept, pools = select_in_pools(responses, pool_of_response, rule.selector)
    advantages = batch.fetch("advantages")
    assert advantages is not None  # verl has just written them
    tally = Tally.of(kept, responses.entropy, responses.eligible, responses.lengths, pools, advantages.values)
    _add(metrics, tally.metrics())
    return kept, tally


def _order_and_seeds(responses: Responses) -> FlatField:
    return FlatField.of_equal_rows(torch.stack([responses.order, responses.seeds], dim=1))


def _add(metrics: dict[str, float], ours: dict[str, float]) -> None:
    metrics.update({f"{NODE}/{name}": value for name, value in ours.items()})
