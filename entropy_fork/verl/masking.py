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

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from entropy_fork.common.errors import EntropyForkError, named_process, process_name
from entropy_fork.core.factors import changed_advantages, clip_bounds
from entropy_fork.core.identity import row_order, row_seeds
from entropy_fork.core.observed import overlap, rank_correlation, sample_of
from entropy_fork.core.responses import Choice, Responses, choose, pool_of_responses, weigh_mini_batches
from entropy_fork.core.rule import Rule
from entropy_fork.core.scores import score_of
from entropy_fork.core.scoring import Tokens
from entropy_fork.core.tally import Tally, draws
from entropy_fork.core.where import where_of
from entropy_fork.verl.config import NODE, EntropyForkConfig
from entropy_fork.verl.gradient_step import (
    FACTORS,
    KEPT_TOKENS,
    ROW_IDENTITY,
    RULE,
    SOFT_SCORES,
    VERLS_FIELDS,
    tally_of,
)
from entropy_fork.verl.policy_loss import CLIP_HIGHEST, CLIP_LOWEST, CLIPPED, WEIGHED
from entropy_fork.verl.queued_batch import FlatField, QueuedBatch

#: the field of verl's batch that verl's policy losses multiply into the loss of each token
WEIGHTS = "rollout_is_weights"


class BatchFields(Mapping[str, Tensor]):
    """The fields of the scores, fetched from the TransferQueue when they are asked for.

    Args:
        batch: the batch.
        offsets: int64, shape (num_rows + 1,): where each response begins and ends.
        known: fields that were fetched before.
    """

    def __init__(self, batch: QueuedBatch, offsets: Tensor, known: Mapping[str, Tensor]):
        self._batch, self._offsets = batch, offsets
        self._known = dict(known)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            field = self._batch.fetch(VERLS_FIELDS[name])
            if field is None:
                raise KeyError(name)
            if name == "sum_pi_squared":  # verl writes it for whole rows
                field = field.at_responses(self._offsets)
            if not torch.equal(field.offsets, self._offsets):
                raise EntropyForkError(f"the field {VERLS_FIELDS[name]} and the response mask have different lengths")
            self._known[name] = field.values
        return self._known[name]

    def forget(self) -> None:
        """Free the fields that only a score needs: all but the entropy and the advantage."""
        self._known = {name: values for name, values in self._known.items() if name in ("entropy", "advantage")}

    def __iter__(self) -> Iterator[str]:
        return (name for name, of_verl in VERLS_FIELDS.items() if name in self._known or of_verl in self._batch)

    def __len__(self) -> int:
        return len(list(iter(self)))


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
        selected_field: the field of the batch on the driver that is not 0 for a kept token and 0 for any other; None
            if there is no such field.
    """

    in_worker: ClassVar[bool]
    selected_field: str | None = None

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
        if self.fork_config.draws:
            _add(metrics, draws(seeds, eligible, responses.lengths))
        metrics[f"{NODE}/top_ratio"] = rule.selector.top_ratio
        return responses, offsets

    def _choose(
        self,
        batch: QueuedBatch,
        responses: Responses,
        offsets: Tensor,
        mini_batch: Tensor,
        rule: Rule,
        metrics: dict[str, float],
    ) -> tuple[Responses, Choice, Tally]:
        """Score the tokens, choose in each pool, and add the counts to the metrics."""
        pool = pool_of_responses(rule.pool, mini_batch)
        window = torch.zeros_like(mini_batch) if rule.pool == "batch" else mini_batch
        fields = BatchFields(batch, offsets, {"entropy": responses.entropy})
        tokens = Tokens(fields, responses.eligible, responses.lengths, responses.seeds, window)
        with named_process():
            if rule.where:
                responses = replace(responses, candidates=tokens.where(where_of(rule.where)))
            if rule.score != "entropy" and (rule.needs_score or self.fork_config.observe):
                responses = replace(responses, score=tokens.score(score_of(rule.score)))
            if not self.fork_config.observe:
                fields.forget()
            choice = choose(responses, pool, rule)
            for name in self.fork_config.observe:
                _observe(name, tokens, responses, choice, pool, rule, metrics)
        fields.forget()
        tally = Tally.of(
            choice.kept,
            responses.entropy,
            responses.eligible,
            responses.lengths,
            choice.pools,
            fields["advantage"],
            in_pools=responses.candidates,
            factors=choice.factors,
        )
        _add(metrics, tally.metrics())
        return responses, choice, tally


class SelectOnDriver(Masking):
    """The driver selects and writes the token weights. The workers only multiply, which every engine of verl can do.

    With ``use=advantage`` the driver also writes the advantages. With ``use=clip`` it also writes the clip range of
    each token, and the guarded loss of the worker uses it (``clip_by_token.py``).
    """

    in_worker = False

    def __init__(self, config: Any, fork_config: EntropyForkConfig):
        super().__init__(config, fork_config)
        self.selected_field = WEIGHTS if fork_config.use == "mask" else KEPT_TOKENS
        self._num_dropped = 0  # tokens of the last batch that were given the weight 0
        self._num_weighed = 0  # tokens of the last batch that were given another weight than 1

    def fields_to_write(self, batch: QueuedBatch, update: Update, metrics: dict[str, float]) -> dict[str, FlatField]:
        """The token weights, times the importance weights that are there already; and what else ``use`` changes."""
        rule, config = self._rule_at(update.step), self._config.actor_rollout_ref
        responses, offsets = self._read(batch, update, rule, metrics)
        mini_batch = mini_batch_of_row(
            len(batch), config.actor.ppo_mini_batch_size, config.rollout.n, _num_ranks(update.workers)
        )
        responses, choice, tally = self._choose(batch, responses, offsets, mini_batch, rule, metrics)
        written: dict[str, FlatField] = {}
        if rule.use == "advantage":
            written["advantages"] = FlatField(self._advantages(batch, choice, rule), offsets)
        elif rule.use == "clip":
            low, high = _clip_range(config.actor)
            assert choice.factors is not None
            assert choice.score is not None
            lowest, highest = clip_bounds(choice.factors, choice.score, rule, low, high)
            written |= {CLIP_LOWEST: FlatField(lowest, offsets), CLIP_HIGHEST: FlatField(highest, offsets)}
        if rule.use != "mask" and self.fork_config.dump_every:  # for the dump; with a mask, the weights say it
            written[KEPT_TOKENS] = FlatField(choice.kept.to(torch.uint8), offsets)
        weights = weigh_mini_batches(responses, choice, mini_batch, rule)
        num_tokens = int(tally.num_tokens)
        del responses, choice
        self._num_dropped = num_tokens - int(torch.count_nonzero(weights))
        self._num_weighed = num_tokens - int(torch.count_nonzero(weights == 1)) if rule.use == "weight" else 0
        importance = batch.fetch(WEIGHTS)
        if importance is not None:
            weights *= importance.values
        return {WEIGHTS: FlatField(weights, offsets), **written}

    def flags_to_send(self, step: int) -> dict[str, Any]:
        """That the weights are written, and whether clip ranges are."""
        return {WEIGHED: True, CLIPPED: True} if self.fork_config.use == "clip" else {WEIGHED: True}

    def metrics_of_update(self, returned: dict[str, float], num_rows: int, step: int) -> dict[str, float]:
        """None: all were reported when the driver selected. Checks that the weights reached the loss.

        Raises:
            EntropyForkError: the update trained on tokens that had the weight 0, or did not weigh the others.
        """
        for count, metric, what in (
            (self._num_dropped, "loss_dropped", "the weight 0"),
            (self._num_weighed, "loss_weighed", "another weight than 1"),
        ):
            if count and not returned[f"{NODE}/{metric}"]:
                raise EntropyForkError(
                    f"{count} tokens of this batch were given {what}, but the actor's update of step {step} trained on "
                    f"all of them alike: something wrote the field {WEIGHTS} again after verl's _compute_advantage. "
                    f"Write importance weights of your own before it, or multiply them in."
                )
        return {}

    def _advantages(self, batch: QueuedBatch, choice: Choice, rule: Rule) -> Tensor:
        advantages = batch.fetch("advantages")
        assert advantages is not None
        assert choice.factors is not None
        return changed_advantages(advantages.values, choice.factors, rule)


class SelectInWorker(Masking):
    """The worker selects and writes the token weights, at each gradient step. It is told who each row is."""

    in_worker = True

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
        responses, choice, _ = self._choose(batch, responses, offsets, whole_batch, rule, metrics)
        written = {
            ROW_IDENTITY: _order_and_seeds(responses),
            KEPT_TOKENS: FlatField(choice.kept.to(torch.uint8), offsets),
        }
        if choice.factors is not None:
            written[FACTORS] = FlatField(choice.factors, offsets)
        elif choice.score is not None:
            written[SOFT_SCORES] = FlatField(choice.score, offsets)
        return written

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


def _observe(
    name: str,
    tokens: Tokens,
    responses: Responses,
    choice: Choice,
    pool: Tensor,
    rule: Rule,
    metrics: dict[str, float],
) -> None:
    """Add how a score that is not trained on compares with the one that is."""
    other = tokens.score(score_of(name))
    sample = sample_of(responses.in_pools, responses.lengths, responses.seeds)
    kept = choice.kept & responses.in_pools.bool()
    compared = {
        f"overlap_with_{name}": overlap(replace(responses, score=other), kept, pool, rule.selector),
        f"rank_correlation_with_{name}": rank_correlation(responses.ranked_by[sample], other[sample]),
    }
    _add(metrics, {key: value for key, value in compared.items() if not math.isnan(value)})


def _clip_range(actor: Any) -> tuple[float, float]:
    """verl's ε below and above 1."""
    low, high = (actor.get(name) for name in ("clip_ratio_low", "clip_ratio_high"))
    return (actor.clip_ratio if low is None else low), (actor.clip_ratio if high is None else high)


def _order_and_seeds(responses: Responses) -> FlatField:
    return FlatField.of_equal_rows(torch.stack([responses.order, responses.seeds], dim=1))


def _add(metrics: dict[str, float], ours: dict[str, float]) -> None:
    metrics.update({f"{NODE}/{name}": value for name, value in ours.items()})
