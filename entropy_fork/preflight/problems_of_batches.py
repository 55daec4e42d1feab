"""Finds what verl's trainer stumbles over: prompts, batches, lengths and rewards that do not go together."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

from entropy_fork.common.problem import IN_LOG_PROB, IN_RAY, IN_UPDATE, IN_WORKER, Problem
from entropy_fork.preflight.model_shape import ModelShape
from entropy_fork.preflight.read_shape import ACTOR, REF, ROLLOUT
from entropy_fork.preflight.run_shape import RunShape
from entropy_fork.preflight.step import sequences_of_batch


def check_trainer(run: RunShape, _: ModelShape | None = None) -> Iterator[Problem]:
    """What each of verl's trainers asks of the config."""
    if run.trainer.separate:
        yield from _check_separate(run)
    elif not run.trainer.hybrid:
        yield Problem(
            f"actor_rollout_ref.hybrid_engine=False needs trainer.v1.trainer_mode=separate_async, and it is "
            f"{run.trainer.mode}. Write actor_rollout_ref.hybrid_engine=True, or that mode."
        )
    yield from _check_sampling(run)
    yield from _check_overlong(run)


def _check_separate(run: RunShape) -> Iterator[Problem]:
    """verl/trainer/ppo/v1/trainer_separate_async.py: __init__."""
    batch, mini, sync = run.data.batch, run.update.mini_batch, run.trainer.sync_steps
    rollout = run.rollout
    if batch != sync * mini:
        fits = f"trainer.v1.separate_async.parameter_sync_step={batch // mini}, or " if batch % mini == 0 else ""
        yield Problem(
            f"separate_async takes one mini-batch per update: data.train_batch_size ({batch}) must be "
            f"parameter_sync_step ({sync}) × ppo_mini_batch_size ({mini}) = {sync * mini}. Write "
            f"{fits}data.train_batch_size={sync * mini}.",
            IN_RAY,
        )
    if rollout.nodes < 1 or rollout.per_node < 1:
        yield Problem(
            f"separate_async needs accelerators for the rollout engines alone, and there are none: {ROLLOUT}.nnodes="
            f"{rollout.nodes}, n_gpus_per_node={rollout.per_node}. Write {ROLLOUT}.nnodes=1 or more.",
            IN_RAY,
        )
    if rollout.sends_weights_by == "naive":
        yield Problem(
            f"separate_async sends weights to other accelerators, and {ROLLOUT}.checkpoint_engine.backend=naive "
            f"cannot. Write {ROLLOUT}.checkpoint_engine.backend=nccl.",
            IN_RAY,
        )


def _check_sampling(run: RunShape) -> Iterator[Problem]:
    """How prompts are fetched, and which of them dynamic sampling keeps."""
    sampling, batch, generation = run.sampling, run.data.batch, run.data.generation_batch
    one_by_one = sampling.on or run.trainer.mode != "sync"
    if generation and not one_by_one and batch % generation:  # trainer_base.py: _next_train_batch
        yield Problem(
            f"data.gen_batch_size={generation} must divide data.train_batch_size={batch}: prompts are fetched in whole "
            f"generation batches. Leave data.gen_batch_size=null, or write a divisor.",
            "in the first step",
        )
    if generation and generation != 1 and one_by_one:  # trainer_base.py: _init_dataloader
        yield Problem(
            f"data.gen_batch_size={generation} does nothing: with dynamic sampling or an asynchronous trainer verl "
            f"fetches prompts one by one and keeps algorithm.filter_groups.max_inflight_gen_batches "
            f"({sampling.in_flight}) batches of data.train_batch_size in flight.",
            fatal=False,
        )
    if not sampling.on:
        return
    if not sampling.metric:
        yield Problem("algorithm.filter_groups.enable=True needs algorithm.filter_groups.metric=acc.", IN_RAY)
    if run.rollout.n < 2:
        yield Problem(
            f"dynamic sampling keeps groups with a right and a wrong answer, and {ROLLOUT}.n={run.rollout.n} makes "
            f"groups of one: no group would ever be kept, and the run would sample for ever. Write {ROLLOUT}.n=8.",
            "never: it goes on sampling",
        )
    if sampling.most_batches > 0:
        yield Problem(
            "algorithm.filter_groups.max_num_gen_batches is ignored by verl's V1 trainer; "
            "max_inflight_gen_batches bounds what is generated at once.",
            fatal=False,
        )


def _check_overlong(run: RunShape) -> Iterator[Problem]:
    """verl/workers/reward_manager/dapo.py: __init__."""
    if (overlong := run.overlong) is None:
        return
    if overlong.end is None or not 0 < overlong.buffer <= overlong.end:
        yield Problem(
            f"overlong shaping needs 0 < overlong_buffer_cfg.len ({overlong.buffer}) ≤ reward_kwargs.max_resp_len "
            f"({overlong.end}). Write a smaller reward.reward_kwargs.overlong_buffer_cfg.len.",
            "when the reward workers start",
        )
    elif overlong.end != run.data.response_length:
        yield Problem(
            f"overlong shaping ends at reward_kwargs.max_resp_len={overlong.end}, but responses end at "
            f"data.max_response_length={run.data.response_length}.",
            fatal=False,
        )


def check_batches(run: RunShape, _: ModelShape | None = None) -> Iterator[Problem]:
    """Batches, mini-batches and micro-batches must divide one another and be dealt to all ranks."""
    dp, batch, mini, n = run.layout.data_parallel, run.data.batch, run.update.mini_batch, run.rollout.n
    sequences = mini * n
    if sequences % dp:  # engine_workers.py: train_mini_batch
        yield Problem(
            f"a mini-batch of {ACTOR}.ppo_mini_batch_size ({mini}) × {ROLLOUT}.n ({n}) = {sequences} sequences cannot "
            f"be dealt to {dp} data-parallel ranks. Write a ppo_mini_batch_size that is a multiple of "
            f"{dp // math.gcd(n, dp)}.",
            IN_UPDATE,
        )
    if mini > batch:
        yield Problem(
            f"{ACTOR}.ppo_mini_batch_size ({mini}) is larger than data.train_batch_size ({batch}): verl would fill the "
            f"mini-batch with padding rows. Write {ACTOR}.ppo_mini_batch_size={batch}."
        )
    elif batch % mini:  # trainer_base.py: _balance_batch
        yield Problem(
            f"data.train_batch_size ({batch}) is no multiple of {ACTOR}.ppo_mini_batch_size ({mini}): verl spreads "
            f"padding rows over the mini-batches.",
            fatal=False,
        )
    update, log_probs = run.update.packing, run.rollout.log_probs
    if update.dynamic != log_probs.dynamic:  # engine_workers.py: init_model
        yield Problem(
            f"{ACTOR}.use_dynamic_bsz={update.dynamic} and {ROLLOUT}.log_prob_use_dynamic_bsz={log_probs.dynamic} must "
            f"be the same; leave the second one out.",
            IN_WORKER,
        )
    if update.dynamic:
        return
    of_batch = sequences_of_batch(run) // dp
    for key, size, per_rank, when in (
        (f"{ACTOR}.ppo_micro_batch_size_per_gpu", update.sequences, sequences // dp, IN_UPDATE),
        (f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu", log_probs.sequences, of_batch, IN_LOG_PROB),
    ):
        if not size:  # engine_workers.py: init_model
            yield Problem(
                f"without use_dynamic_bsz verl needs {key} (its older key without _per_gpu is accepted at first, and "
                f"refused by the worker). Write {key}=1, or {ACTOR}.use_dynamic_bsz=True.",
                IN_WORKER,
            )
        elif per_rank % size and not sequences % dp:  # engine/utils.py: prepare_micro_batches
            yield Problem(f"{key}={size} does not divide the {per_rank} sequences of a rank. Write a divisor.", when)


def check_lengths(run: RunShape, _: ModelShape | None = None) -> Iterator[Problem]:
    """utils/seqlen_balancing.py: rearrange_micro_batches asserts that a micro-batch can hold the longest sequence."""
    longest, sequence = run.data.longest, run.layout.sequence
    passes = [
        (f"{ACTOR}.ppo_max_token_len_per_gpu", run.update.packing, "in an update"),
        (f"{ROLLOUT}.log_prob_max_token_len_per_gpu", run.rollout.log_probs, "in a log-prob pass"),
        (f"{REF}.log_prob_max_token_len_per_gpu", run.reference_pass, "in a pass of the reference policy"),
    ]
    for key, packing, where in passes:
        if packing is not None and packing.dynamic and packing.tokens * sequence < longest:
            yield Problem(
                f"{key} ({packing.tokens}) × sequence parallelism ({sequence}) = {packing.tokens * sequence} tokens "
                f"cannot hold the longest sequence, prompt + response = {run.data.prompt_length} + "
                f"{run.data.response_length} = {longest}. Write {key}={math.ceil(longest / sequence)} or more, or "
                f"raise ulysses_sequence_parallel_size.",
                f"{where}, at the first response that is that long",
            )


def check_rows(run: RunShape, _: ModelShape | None = None) -> Iterator[Problem]:
    """verl takes a whole number of batches from the data files, and divides by that number."""
    import pyarrow.parquet as pq

    if run.data.files is None:
        return
    paths = [os.path.expanduser(file) for file in run.data.files]
    if not all(path.endswith(".parquet") and os.path.exists(path) for path in paths):
        return
    try:
        rows = sum(pq.read_metadata(path).num_rows for path in paths)
    except (OSError, ValueError):  # the checks of the data files report it
        return
    rows = min(rows, run.data.max_rows) if run.data.max_rows > 0 else rows
    if rows < run.data.batch:
        yield Problem(
            f"data.train_files has {rows} rows and data.train_batch_size={run.data.batch}: not one batch. Write "
            f"data.train_batch_size={rows} or less.",
            IN_RAY,
        )
