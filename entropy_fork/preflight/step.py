"""Counts a training step: sequences, gradient steps, micro-batches, and tokens of one accelerator."""

from __future__ import annotations

import math
from dataclasses import dataclass

from entropy_fork.preflight.run_shape import RunShape


@dataclass(frozen=True)
class Step:
    """A training step. "At most" is the number if every response were as long as it may be.

    Attributes:
        prompts: of a batch.
        responses: to each prompt.
        sequences: prompts × responses.
        padding_sequences: rows that verl adds so that all ranks get equally many.
        longest_sequence: tokens of prompt and response.
        tokens_at_most: of all sequences.
        gradient_steps_per_batch: mini-batches × epochs.
        sequences_per_gradient_step: of a mini-batch, on all ranks.
        sequences_per_rank_per_gradient_step: of a mini-batch, on one rank.
        micro_batches_per_gradient_step_at_most: on one rank.
        tokens_per_gpu_per_step_at_most: of one accelerator.
        tokens_per_gpu_per_gradient_step_at_most: of one accelerator.
        tokens_per_gpu_per_micro_batch_at_most: of one accelerator.
        tokens_per_gpu_in_log_prob_pass_at_most: of one accelerator, in a micro-batch of the log-prob pass.
    """

    prompts: int
    responses: int
    sequences: int
    padding_sequences: int
    longest_sequence: int
    tokens_at_most: int
    gradient_steps_per_batch: int
    sequences_per_gradient_step: int
    sequences_per_rank_per_gradient_step: float
    micro_batches_per_gradient_step_at_most: int
    tokens_per_gpu_per_step_at_most: int
    tokens_per_gpu_per_gradient_step_at_most: int
    tokens_per_gpu_per_micro_batch_at_most: int
    tokens_per_gpu_in_log_prob_pass_at_most: int


def count_step(run: RunShape) -> Step:
    """Count a step of a run."""
    dp, sequence, longest = run.layout.data_parallel, run.layout.sequence, run.data.longest
    sequences = run.data.batch * run.rollout.n
    padded = sequences_of_batch(run)
    mini = run.update.mini_batch * run.rollout.n
    per_rank = max(1, mini // dp)
    packing = run.update.packing
    budget = packing.most_tokens(longest, sequence)
    per_micro_batch = max(1, budget * sequence // longest) if packing.dynamic else packing.sequences or 1
    of_gradient_step = math.ceil(per_rank * longest / sequence)
    of_step = math.ceil(padded / dp * longest / sequence)
    return Step(
        prompts=run.data.batch,
        responses=run.rollout.n,
        sequences=sequences,
        padding_sequences=padded - sequences,
        longest_sequence=longest,
        tokens_at_most=sequences * longest,
        gradient_steps_per_batch=padded // mini * run.update.epochs,
        sequences_per_gradient_step=mini,
        sequences_per_rank_per_gradient_step=mini / dp,
        micro_batches_per_gradient_step_at_most=math.ceil(per_rank / per_micro_batch),
        tokens_per_gpu_per_step_at_most=of_step,
        tokens_per_gpu_per_gradient_step_at_most=of_gradient_step,
        tokens_per_gpu_per_micro_batch_at_most=min(budget, of_gradient_step),
        tokens_per_gpu_in_log_prob_pass_at_most=min(run.rollout.log_probs.most_tokens(longest, sequence), of_step),
    )


def sequences_of_batch(run: RunShape) -> int:
    """Sequences of a batch with verl's padding rows: a multiple of a mini-batch and of the data-parallel ranks.

    Source: verl/trainer/ppo/v1/trainer_base.py: _get_required_batch_multiple.
    """
    mini, dp = run.update.mini_batch * run.rollout.n, run.layout.data_parallel
    multiple = mini * dp // math.gcd(mini, dp)
    return math.ceil(run.data.batch * run.rollout.n / multiple) * multiple
