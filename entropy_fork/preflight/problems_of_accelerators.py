"""Finds what cannot be cut up: a model, its trainer and its rollout engines over the accelerators that there are."""

from __future__ import annotations

import math
from collections.abc import Iterator

from entropy_fork.common.problem import IN_ENGINE, IN_LOG_PROB, IN_RAY, IN_WORKER, Problem
from entropy_fork.preflight.model_shape import ModelShape
from entropy_fork.preflight.read_shape import ACTOR, ROLLOUT
from entropy_fork.preflight.run_shape import RunShape


def check_parallelism(run: RunShape, model: ModelShape | None) -> Iterator[Problem]:
    """How the actor is cut up."""
    yield from (_check_megatron if run.layout.strategy == "megatron" else _check_fsdp)(run, model)


def _check_megatron(run: RunShape, model: ModelShape | None) -> Iterator[Problem]:
    layout, virtual = run.layout, run.update.virtual_stages
    product = layout.tensor * layout.pipeline * layout.sequence
    if layout.world % product:  # megatron.core.parallel_state
        yield Problem(
            f"{_accelerators(run)} cannot be cut into tensor × pipeline × context = {layout.tensor} × "
            f"{layout.pipeline} × {layout.sequence} = {product}. Change these keys of {ACTOR}.megatron, or the number "
            f"of accelerators.",
            IN_WORKER,
        )
    if model is None:
        return
    if model.heads % layout.tensor:
        yield Problem(
            f"{ACTOR}.megatron.tensor_model_parallel_size={layout.tensor} does not divide the model's "
            f"{model.heads} attention heads. Write a divisor of {model.heads}.",
            IN_WORKER,
        )
    if model.layers % (layout.pipeline * virtual) and not run.update.uneven_stages:
        yield Problem(
            f"{model.layers} layers cannot be cut into {layout.pipeline} × {virtual} pipeline stages of one "
            f"size. Change {ACTOR}.megatron.pipeline_model_parallel_size.",
            IN_WORKER,
        )


def _check_fsdp(run: RunShape, model: ModelShape | None) -> Iterator[Problem]:
    layout = run.layout
    world, sp = layout.world, layout.sequence
    if world % sp:  # transformer_impl.py: _init_device_mesh
        yield Problem(
            f"{_accelerators(run)} cannot be cut into groups of {ACTOR}.ulysses_sequence_parallel_size={sp}. "
            f"Write a divisor of {world}.",
            IN_WORKER,
        )
    if sp > 1 and not run.model.packed:  # transformer_impl.py: __init__
        yield Problem(
            f"sequence parallelism ({sp}) needs packed sequences: write "
            f"actor_rollout_ref.model.use_remove_padding=True.",
            IN_WORKER,
        )
    if model is not None:  # monkey_patch.py: apply_monkey_patch
        if model.heads % sp:
            yield Problem(
                f"{ACTOR}.ulysses_sequence_parallel_size={sp} does not divide the model's {model.heads} attention "
                f"heads. Write {_divisors(model.heads, world)}.",
                IN_WORKER,
            )
        if model.kv_heads % sp and sp % model.kv_heads:
            yield Problem(
                f"{ACTOR}.ulysses_sequence_parallel_size={sp} and the model's {model.kv_heads} key-value heads: one "
                f"must divide the other. Write another ulysses_sequence_parallel_size.",
                IN_WORKER,
            )
        if run.model.fused and layout.strategy == "fsdp2" and not model.tied:  # fsdp_utils.py: apply_fsdp2
            yield Problem(
                "actor_rollout_ref.model.use_fused_kernels=True with strategy=fsdp2: FSDP2 shards an LM head that is "
                "not the embedding by itself, and verl's fused forward pass reads the shard. Leave use_fused_kernels "
                "out (a masked run computes the head in chunks anyway), or write "
                f"{ACTOR}.strategy=fsdp.",
                IN_LOG_PROB,
            )
    if world % layout.shard:  # engine/fsdp/utils.py: create_device_mesh
        yield Problem(
            f"{_accelerators(run)} cannot be cut into shards of {ACTOR}.fsdp_config.fsdp_size={layout.shard}. "
            f"Write a divisor of {world}, or -1 to shard over all of them.",
            IN_WORKER,
        )
    if layout.strategy == "fsdp" and run.update.offload_policy:
        yield Problem(
            f"{ACTOR}.fsdp_config.offload_policy=True does nothing with strategy=fsdp; write {ACTOR}.strategy=fsdp2, "
            f"or param_offload and optimizer_offload.",
            fatal=False,
        )


def check_rollout(run: RunShape, model: ModelShape | None) -> Iterator[Problem]:
    """How the rollout engines are cut up, and what they take."""
    rollout, per_engine = run.rollout, run.rollout.per_engine
    if run.layout.world % per_engine:  # engine_workers.py: init_model
        yield Problem(
            f"{run.layout.world} accelerators cannot be cut into rollout engines of {per_engine} "
            f"({ROLLOUT}.tensor_model_parallel_size={rollout.tensor} × data_parallel_size={rollout.data_parallel}). "
            f"Write sizes whose product divides {run.layout.world}.",
            IN_WORKER,
        )
    if per_engine % min(run.machines.per_node, per_engine):  # rollout/replica.py: RolloutReplica.__init__
        yield Problem(
            f"a rollout engine of {per_engine} accelerators does not fill whole nodes of "
            f"trainer.n_gpus_per_node={run.machines.per_node}. Write sizes whose product is a multiple of "
            f"{run.machines.per_node}, or less than it.",
            IN_ENGINE,
        )
    if run.trainer.separate and rollout.nodes > 0:
        separate = rollout.nodes * rollout.per_node
        if separate < per_engine:
            yield Problem(
                f"{ROLLOUT}.nnodes × n_gpus_per_node = {separate} accelerators are too few for an engine of "
                f"{per_engine}. Write {ROLLOUT}.nnodes={math.ceil(per_engine / max(1, rollout.per_node))} or more.",
                IN_RAY,
            )
        elif separate % per_engine:
            yield Problem(
                f"{separate % per_engine} of the {separate} separate rollout accelerators would stay idle: engines "
                f"have {per_engine}.",
                fatal=False,
            )
    if model is not None:
        yield from _check_context(run, model)
    tokens, sequences = rollout.batched_tokens, rollout.batched_sequences
    if rollout.name == "vllm" and tokens is not None and sequences is not None and tokens < sequences:
        # vllm/config/scheduler.py
        yield Problem(
            f"{ROLLOUT}.max_num_batched_tokens ({tokens}) must be at least max_num_seqs ({sequences}). "
            f"Write {ROLLOUT}.max_num_batched_tokens={sequences} or more.",
            IN_ENGINE,
        )
    if not 0 < rollout.memory_share <= 1:
        yield Problem(
            f"{ROLLOUT}.gpu_memory_utilization={rollout.memory_share} is not a share of the memory. Write a number "
            f"above 0 and at most 1.",
            IN_ENGINE,
        )


def _check_context(run: RunShape, model: ModelShape) -> Iterator[Problem]:
    """The model's heads over an engine's accelerators, and the longest sequence in its context."""
    rollout, longest = run.rollout, run.data.longest
    if model.heads % rollout.tensor:  # vllm/config/model.py: verify_with_parallel_config
        yield Problem(
            f"{ROLLOUT}.tensor_model_parallel_size={rollout.tensor} does not divide the model's {model.heads} "
            f"attention heads. Write a divisor of {model.heads}.",
            IN_ENGINE,
        )
    if rollout.context is not None and rollout.context > model.max_positions:
        # vllm_async_server.py: _validate_configs
        yield Problem(
            f"{ROLLOUT}.max_model_len={rollout.context} is more than the model's context of {model.max_positions} "
            f"tokens. Write {ROLLOUT}.max_model_len={model.max_positions} or less.",
            IN_ENGINE,
        )
    allowed = min(rollout.context or model.max_positions, model.max_positions)
    if longest > allowed:  # vllm_async_server.py: generate cuts max_tokens to what is left
        source = f"{ROLLOUT}.max_model_len" if rollout.context is not None else "the model's context"
        way = f"{ROLLOUT}.max_model_len={longest}"
        if longest > model.max_positions:
            way = (
                f"data.max_response_length={model.max_positions - run.data.prompt_length}, or take a model with a "
                f"longer context"
            )
        yield Problem(
            f"prompt + response = {longest} tokens, and {source} is {allowed}: longer responses would be cut "
            f"there without any message. Write {way}."
        )


def _accelerators(run: RunShape) -> str:
    return f"{run.machines.world} accelerators ({run.machines.nodes} × {run.machines.per_node})"


def _divisors(number: int, world: int) -> str:
    """Numbers that divide both, in words."""
    fitting = [str(i) for i in range(1, number + 1) if number % i == 0 and world % i == 0]
    return " or ".join([", ".join(fitting[:-1]), fitting[-1]]) if len(fitting) > 1 else "1"
