"""Judges the numbers: what does not fit an accelerator, and what to write so that it does."""

from __future__ import annotations

from collections.abc import Iterator

from entropy_fork.common.problem import IN_ENGINE, Problem
from entropy_fork.preflight import memory
from entropy_fork.preflight.add_up import Engines, Totals
from entropy_fork.preflight.memory import Phase, in_gib
from entropy_fork.preflight.model_shape import ModelShape
from entropy_fork.preflight.read_shape import ROLLOUT
from entropy_fork.preflight.run_shape import RunShape

#: share of an accelerator's memory above which a phase that fits is called tight, for what no formula counts
TIGHT = 0.9

#: what to write, by the part of a phase that takes most
WAYS = {
    memory.LOGITS: "lower ppo_max_token_len_per_gpu (and log_prob_max_token_len_per_gpu), raise "
    "ulysses_sequence_parallel_size, or write actor_rollout_ref.actor.entropy_from_logits_with_chunking=True, or "
    "+entropy_fork=global, which holds a chunk of the log-prob pass and the kept rows of the update",
    memory.ACTIVATIONS: "lower ppo_max_token_len_per_gpu, raise ulysses_sequence_parallel_size, or write "
    "actor_rollout_ref.model.enable_gradient_checkpointing=True",
    memory.UNSHARDED_GRADIENTS: "write actor_rollout_ref.actor.fsdp_config.use_no_sync_for_gradient_accumulation=False",
    memory.ENGINE: "lower actor_rollout_ref.rollout.gpu_memory_utilization, or offload with "
    "actor_rollout_ref.actor.fsdp_config.param_offload=True and optimizer_offload=True",
    memory.NOT_OFFLOADED: "write actor_rollout_ref.actor.fsdp_config.param_offload=True and optimizer_offload=True",
}
#: what to write where that is weights, gradients or the optimizer's states
FEWER_STATES = (
    "take more accelerators, LoRA (actor_rollout_ref.model.lora_rank=32), or FSDP2's "
    "actor_rollout_ref.actor.fsdp_config.offload_policy=True"
)


def check_fit(run: RunShape, model: ModelShape, totals: Totals, accelerator_bytes: int) -> Iterator[Problem]:
    """Hold the numbers against an accelerator's memory. On a CPU there is no limit to hold them against."""
    if run.machines.on_cpu:
        return
    if totals.rollout is not None:
        yield from _check_engine(run, model, totals.rollout)
    for phase in totals.phases:
        if phase.total > accelerator_bytes:
            yield _too_large(phase, accelerator_bytes)
    for phase in totals.phases:
        if accelerator_bytes * TIGHT < phase.total <= accelerator_bytes:
            yield Problem(
                f"{phase.name}: {in_gib(phase.total)} of {in_gib(accelerator_bytes)} is more than {TIGHT:.0%}: CUDA "
                f"contexts, NCCL, fragmentation and what a sleeping rollout engine keeps come on top.",
                fatal=False,
            )


def _check_engine(run: RunShape, model: ModelShape, engines: Engines) -> Iterator[Problem]:
    rollout, per_token, longest = run.rollout, engines.cache_bytes_per_token, run.data.longest
    context = min(rollout.context or model.max_positions, model.max_positions)
    if engines.weights_bytes >= engines.share_bytes:
        yield Problem(
            f"the rollout engine's weights, {in_gib(engines.weights_bytes)} on each of {rollout.tensor} accelerators, "
            f"do not fit its share of {in_gib(engines.share_bytes)} ({ROLLOUT}.gpu_memory_utilization="
            f"{rollout.memory_share}). Write a larger {ROLLOUT}.tensor_model_parallel_size or gpu_memory_utilization.",
            IN_ENGINE,
        )
    elif engines.cache_bytes < per_token * context:
        yield Problem(
            f"the rollout engine's cache of {in_gib(engines.cache_bytes)} holds {engines.cache_bytes // per_token} "
            f"tokens, and one sequence may have {context} ({ROLLOUT}.max_model_len, by default the model's context). "
            f"Write {ROLLOUT}.max_model_len={longest}, a larger tensor_model_parallel_size or gpu_memory_utilization.",
            IN_ENGINE,
        )


def _too_large(phase: Phase, accelerator_bytes: int) -> Problem:
    largest = max(phase.parts, key=phase.parts.__getitem__)
    return Problem(
        f"{phase.name}: {in_gib(phase.total)} on an accelerator of {in_gib(accelerator_bytes)}, most of it {largest} "
        f"({in_gib(phase.parts[largest])}). To fit: {WAYS.get(largest, FEWER_STATES)}.",
        "out of memory there",
    )
