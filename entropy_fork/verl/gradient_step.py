"""Token weights in the worker: the mask of one gradient step, made where the mini-batch is.

Some masks can only be made during the update (see ``masking.py``). For these the driver sends the :class:`Rule` along
with the batch, and the engine (see ``engine.py``) makes the mask before each gradient step, or in it:

- Before it, if the entropies are known then: the old policy's, or the current policy's from a pass without gradients.
  The weights are written into the mini-batch before it is cut into micro-batches.
- In it, if the current policy's entropies are taken over a micro-batch: the loss sees them (:data:`ENTROPY_OF_MASK`),
  so they need no pass of their own. How many tokens *all* micro-batches on all ranks will keep follows from their
  sizes, so the denominator is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.engine.utils import prepare_micro_batches
from verl.workers.utils.padding import response_from_nested

from entropy_fork.common.errors import EntropyForkError, named_process, process_name
from entropy_fork.core.flat import count_per_row
from entropy_fork.core.ranks import Ranks, choose_over_ranks, gather_tokens
from entropy_fork.core.responses import Choice, Responses, choose, pool_of_responses, soft_weights
from entropy_fork.core.rule import Rule
from entropy_fork.core.scores import score_of
from entropy_fork.core.scoring import Tokens
from entropy_fork.core.selection import exact_count
from entropy_fork.core.tally import Tally
from entropy_fork.core.weighting import Counts, token_weights
from entropy_fork.core.where import where_of
from entropy_fork.verl.config import NODE
from entropy_fork.verl.policy_loss import weights_written
from entropy_fork.verl.sparse_head import AT_RESPONSES, ENTROPY_OF_MASK, EVERYWHERE, HEAD, SparseHead

#: the flag that the driver sends with the batch: the rule
RULE = "entropy_fork_rule"

#: the field that the driver writes: order and seed of each row, int64, shape (num_rows, 2)
ROW_IDENTITY = "entropy_fork_row_identity"
#: the field that the driver writes if it has selected: 1 for a kept token, else 0; uint8, shape (num_tokens,), flat
KEPT_TOKENS = "entropy_fork_kept"
#: the field that the driver writes if it has selected with ``use=weight``: the factor of each kept token, else NaN
FACTORS = "entropy_fork_factors"
#: the field that the driver writes if it has selected with ``weight=soft``: the score that each kept token weighs by
SOFT_SCORES = "entropy_fork_soft_scores"

#: verl's field for each field of the scores (``core/scores.py: FIELDS``)
VERLS_FIELDS: Mapping[str, str] = {
    "entropy": "entropy",
    "log_prob": "old_log_probs",
    "advantage": "advantages",
    "ref_log_prob": "ref_log_prob",
    "rollout_log_prob": "rollout_log_probs",
    "sum_pi_squared": "sum_pi_squared",
}

#: the field that the worker writes: the number of a row in its mini-batch, by which a micro-batch is recognised
ROW = "entropy_fork_row"


class GradientStep:
    """The mask of one gradient step on one rank.

    Args:
        engine: verl's engine with our mixin. All its data-parallel ranks must make their step.
        data: this rank's rows of the mini-batch, in verl's layout without padding. The weights are multiplied into its
            field ``rollout_is_weights`` at once, unless the loss computes them.
        rule: what to keep.
        loss_function: verl's loss function.

    Raises:
        EntropyForkError: the batch lacks the entropies that the rule needs.
        ValueError: an entropy is not finite.
    """

    def __init__(self, engine: SparseHead, data: TensorDict, rule: Rule, loss_function: Callable[..., Any]):
        self.rule = rule
        self.loss_function = loss_function
        self.ranks = Ranks(engine.get_data_parallel_group(), get_device_name())
        self._engine = engine
        self._tallies: list[Tally] = []
        self.in_loss = rule.selected_in_loss
        self._micro_batches: list[list[int]] = []
        if rule.pool == "micro_batch":
            data[ROW] = torch.arange(len(data), device=data["response_mask"].device)
            self._micro_batches = _cut(engine, data)
        self._next_micro_batch = 0
        self._score = score_of(rule.score) if rule.needs_score and rule.score != "entropy" else None
        self._where = where_of(rule.where) if rule.where else None
        parts = [part for part in (self._score, self._where) if part is not None]
        self._read = {"entropy", *(name for part in parts for name in part.fields)}
        if self.in_loss:
            self._counts = self._counts_of(data["response_mask"])
        else:
            _multiply_into(data, self._weights_before(data))

    def loss(self, model_output: dict[str, Any], data: TensorDict, dp_group: Any = None) -> Any:
        """verl's loss on a micro-batch, with its weights in place."""
        if self.rule.pool == "micro_batch":
            self._check_micro_batch(data)
        if self.in_loss:
            current = {**model_output, "entropy": model_output.pop(ENTROPY_OF_MASK)}
            _multiply_into(data, self._weights_in_loss(data, self._fields_of(current, data)))
        with weights_written():
            return self.loss_function(model_output=model_output, data=data, dp_group=dp_group)

    @contextmanager
    def selecting_in_loss(self) -> Iterator[None]:
        """If the mask is made in the loss, let the engine give the entropies to the loss, without a gradient."""
        self._engine.selects_in_loss = self.in_loss
        try:
            yield
        finally:
            self._engine.selects_in_loss = False

    def metrics(self) -> dict[str, list[float]]:
        """The :class:`Tally` of the step over all ranks, in the form of verl's metrics; see :func:`tally_of`."""
        tally = self.ranks.merge_tallies(Tally.merged(self._tallies))
        return {f"{NODE}/{name}": [value] for name, value in asdict(tally).items()}

    def _weights_before(self, data: TensorDict) -> Tensor:
        old = data["entropy"].values().cpu() if "entropy" in data else None
        if self.rule.entropy == "current":
            responses = self._scored(data, self._fields_of_a_pass(data))
        elif old is not None:
            responses = self._scored(data, {}, score=KEPT_TOKENS not in data)
        else:
            raise EntropyForkError(f"a mask was asked for, but the batch has no entropies in {process_name()}.")
        if KEPT_TOKENS in data:
            factors, score = (data[name].values().cpu() if name in data else None for name in (FACTORS, SOFT_SCORES))
            choice = Choice(data[KEPT_TOKENS].values().cpu().bool(), [], factors, score)
        else:
            choice = self._choose(responses)
        by_old = None
        if self.rule.entropy == "current" and old is not None:
            by_old = self._choose(self._scored(data, {})).kept
        self._count(data, responses, choice, by_old)
        soft_score = choice.score if self.rule.weight == "soft" else None
        counts = self.ranks.sum_counts(Counts.of(choice.kept, responses.eligible, soft_score))
        return self._weigh(responses, choice, counts)

    def _weights_in_loss(self, data: TensorDict, current: dict[str, Tensor]) -> Tensor:
        responses = self._scored(data, current)
        one_pool = torch.zeros_like(responses.lengths)
        with named_process():
            choice = choose(responses, one_pool, self.rule)
            by_old = choose(self._scored(data, {}), one_pool, self.rule).kept if "entropy" in data else None
        self._count(data, responses, choice, by_old)
        return self._weigh(responses, choice, self._counts)

    def _scored(self, data: TensorDict, current: dict[str, Tensor], score: bool = True) -> Responses:
        """The responses of some rows, with score and candidates.

        A function that looks at several tokens sees those of all ranks, so then all ranks must call this.

        Args:
            data: the rows.
            current: the fields of the current policy; those of the old one are in ``data``.
            score: whether the rule still has to be applied.
        """
        mask = data["response_mask"]
        needed, where = self._score, self._where
        given = {
            name: (response_from_nested(data[key], mask) if name == "sum_pi_squared" else data[key]).values().cpu()
            for name, key in VERLS_FIELDS.items()
            if name in self._read and key in data
        } | current
        sizes = {name: values.numel() for name, values in given.items()}
        if any(size != mask.values().numel() for size in sizes.values()):
            raise EntropyForkError(f"{sizes} values for {mask.values().numel()} response tokens")
        order, seeds = data[ROW_IDENTITY].values().cpu().view(-1, 2).unbind(1)
        eligible, lengths = mask.values().cpu(), mask.offsets().diff().cpu()
        responses = Responses(given["entropy"], eligible, lengths, order, seeds)
        if not score or (needed is None and where is None):
            return responses
        tokens, mine = Tokens(given, eligible, lengths, seeds, torch.zeros_like(lengths)), slice(None)
        if any(part is not None and not part.elementwise for part in (needed, where)):
            tokens, mine = gather_tokens(tokens, self.ranks)
        with named_process(), nullcontext() if self.in_loss else self.ranks.fail_together():
            if where is not None:
                responses = replace(responses, candidates=tokens.where(where)[mine])
            if needed is not None:
                responses = replace(responses, score=tokens.score(needed)[mine])
        return responses

    def _choose(self, responses: Responses) -> Choice:
        with named_process():
            if self.rule.pool == "mini_batch":
                return choose_over_ranks(responses, self.rule, self.ranks)
            micro_batch = torch.zeros_like(responses.lengths)
            for number, members in enumerate(self._micro_batches):
                micro_batch[members] = number
            pool = pool_of_responses(self.rule.pool, torch.zeros_like(responses.lengths), micro_batch)
            with self.ranks.fail_together():
                return choose(responses, pool, self.rule)

    def _weigh(self, responses: Responses, choice: Choice, counts: Counts) -> Tensor:
        if self.rule.use != "mask":
            return soft_weights(choice, responses.eligible, self.rule)
        soft_score = choice.score if self.rule.weight == "soft" else None
        mode, denominator = self.rule.loss_agg_mode, self.rule.denominator
        return token_weights(choice.kept, responses.eligible, responses.lengths, mode, denominator, soft_score, counts)

    def _count(self, data: TensorDict, responses: Responses, choice: Choice, by_old: Tensor | None) -> None:
        advantages = data["advantages"].values().cpu()
        tally = Tally.of(
            choice.kept,
            responses.entropy,
            responses.eligible,
            responses.lengths,
            choice.pools,
            advantages,
            by_old,
            responses.candidates,
            choice.factors,
        )
        self._tallies.append(tally)

    def _fields_of_a_pass(self, data: TensorDict) -> dict[str, Tensor]:
        """Entropies and log-probabilities of the current policy, from a pass without gradients."""
        head = tu.get_non_tensor_data(data, key=HEAD, default=EVERYWHERE)
        asked = data.copy()
        tu.assign_non_tensor(asked, calculate_entropy=True, **{HEAD: head if head == EVERYWHERE else AT_RESPONSES})
        with _without_training(self._engine):
            output = self._engine.infer_batch(asked)["model_output"]
        return self._fields_of(output, data)

    def _fields_of(self, model_output: Mapping[str, Any], data: TensorDict) -> dict[str, Tensor]:
        """The fields of the current policy that the rule reads, from what verl's engine gives for whole rows."""
        return {
            name: response_from_nested(model_output[key].detach(), data["response_mask"]).values().cpu()
            for name, key in (("entropy", "entropy"), ("log_prob", "log_probs"))
            if name in self._read
        }

    def _counts_of(self, response_mask: Tensor) -> Counts:
        """Kept and eligible tokens of the mini-batch on all ranks, before any of its entropies is known."""
        mask: Any = response_mask
        per_row = count_per_row(mask.values(), mask.offsets().diff())
        sizes = [int(per_row[members].sum()) for members in self._micro_batches]
        kept = sum(exact_count(size, self.rule.selector) for size in sizes)
        return self.ranks.sum_counts(Counts(sum(sizes), kept))

    def _check_micro_batch(self, data: TensorDict) -> None:
        members = data[ROW].tolist()
        if members != self._micro_batches[self._next_micro_batch]:
            raise EntropyForkError(
                f"verl cut the mini-batch into other micro-batches than were counted in {process_name()} (rows "
                f"{members}), so the denominator would be wrong. Write entropy_fork.pool=mini_batch, and report this."
            )
        self._next_micro_batch += 1


def tally_of(metrics: dict[str, float], num_mini_batches: int) -> Tally:
    """The tally of a training step.

    Args:
        metrics: what :meth:`GradientStep.metrics` returned, averaged by verl over ranks and mini-batches.
        num_mini_batches: how many mini-batches were averaged.
    """
    average = Tally(**{name: metrics[f"{NODE}/{name}"] for name in asdict(Tally())})
    return Tally.merged([average] * num_mini_batches)


@contextmanager
def _without_training(engine: SparseHead) -> Iterator[None]:
    """Switch to verl's eval mode for one pass during training: no dropout, no activation offload.

    Weights and optimizer stay on the device. Afterwards everything is as before, also after an error.
    """
    mode = engine.mode
    training = [(module, module.training) for module in engine.module.modules()]
    try:
        with engine.eval_mode(disable_auto_offload=True):
            yield
    finally:
        engine.mode = mode
        for module, was_training in training:
            module.training = was_training


def _multiply_into(data: TensorDict, weights: Tensor) -> None:
    mask = data["response_mask"]
    weights = weights.to(mask.device)
    if "rollout_is_weights" in data:
        weights = weights * data["rollout_is_weights"].values()
    lengths = mask.offsets().diff()
    data["rollout_is_weights"] = torch.nested.nested_tensor_from_jagged(
        weights,
        mask.offsets(),
        # without these, torch pads every row to the sum of all lengths
        min_seqlen=int(lengths.min()),
        max_seqlen=int(lengths.max()),
    )


def _cut(engine: SparseHead, data: TensorDict) -> list[list[int]]:
    """The rows of each micro-batch, in order: by verl's own function, on only the fields that it looks at."""
    settings = ("use_dynamic_bsz", "max_token_len_per_gpu", "micro_batch_size_per_gpu", "force_group_size")
    light = tu.get_tensordict(
        {"input_ids": data["input_ids"], ROW: data[ROW]},
        {name: tu.get_non_tensor_data(data, key=name, default=None) for name in settings if name in data},
    )
    tu.assign_non_tensor(light, sp_size=engine.ulysses_sequence_parallel_size)
    micro_batches, _ = prepare_micro_batches(
        light, dp_group=engine.get_data_parallel_group(), same_micro_num_in_dp=True
    )
    return [micro_batch[ROW].tolist() for micro_batch in micro_batches]
