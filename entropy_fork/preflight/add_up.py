"""Adds up what one accelerator and one host would hold, for a run and a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from entropy_fork.preflight import logits, memory
from entropy_fork.preflight.logits import Head
from entropy_fork.preflight.memory import Layout, Phase
from entropy_fork.preflight.model_shape import ModelShape
from entropy_fork.preflight.run_shape import RunShape
from entropy_fork.preflight.step import Step


@dataclass(frozen=True)
class ModelSummary:
    """What a plan says of a model.

    Attributes:
        source: where its sizes come from, in words.
        parameters, trained_parameters: all, and those with gradients (with LoRA the adapters alone).
        layers, hidden, heads, kv_heads, vocabulary: its sizes.
        context: tokens.
    """

    source: str
    parameters: int
    trained_parameters: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int


@dataclass(frozen=True)
class Logits:
    """Logits of one accelerator, at the peak of a pass.

    Attributes:
        tokens: of the fullest micro-batch.
        vocabulary: entries of it on this accelerator.
        kept_ratio: the largest share of the tokens that an update looks at.
        dense_because: why an update needs the LM head at every position; None where the kept ones are enough.
        log_prob_pass_bytes, log_prob_pass_bytes_dense: of the log-prob pass: as it runs, and at every position.
        gradient_step_bytes, gradient_step_bytes_dense: of an update: as it runs, and at every position.
    """

    tokens: int
    vocabulary: int
    kept_ratio: float
    dense_because: str | None
    log_prob_pass_bytes: int
    log_prob_pass_bytes_dense: int
    gradient_step_bytes: int
    gradient_step_bytes_dense: int


@dataclass(frozen=True)
class Engines:
    """The rollout engines.

    Attributes:
        engines: how many there are.
        accelerators_per_engine: how many each spans.
        share_bytes: of an accelerator's memory, for the engine.
        weights_bytes: of the share, for the weights.
        cache_bytes: of the share, what is left for keys and values.
        cache_bytes_per_token: of one token on one accelerator.
        full_length_sequences_per_engine: how many of the longest sequences the cache holds.
        sequences_per_engine_per_step: how many an engine generates.
    """

    engines: int
    accelerators_per_engine: int
    share_bytes: int
    weights_bytes: int
    cache_bytes: int
    cache_bytes_per_token: int
    full_length_sequences_per_engine: int
    sequences_per_engine_per_step: int


@dataclass(frozen=True)
class Totals:
    """Everything that was added up.

    Attributes:
        model: the model's sizes.
        phases: the moments of a step and what an accelerator holds then.
        head: the logits.
        rollout: the engines; None on a CPU, and for the light rollout, which reserves nothing.
        host_bytes_per_node: of a node's memory, for offloaded states.
    """

    model: ModelSummary
    phases: list[Phase]
    head: Logits
    rollout: Engines | None
    host_bytes_per_node: int


def add_up(run: RunShape, model: ModelShape, step: Step, accelerator_bytes: int) -> Totals:
    """Memory of one accelerator in each phase of a step, and of the host.

    Args:
        run: the run.
        model: the model's sizes.
        step: the run's step, counted.
        accelerator_bytes: memory of one accelerator.
    """
    accumulates = step.micro_batches_per_gradient_step_at_most > 1
    layout = replace(run.layout, keeps_unsharded_gradients=run.update.reduces_at_end and accumulates)
    mask = run.mask
    tokens = step.tokens_per_gpu_per_micro_batch_at_most
    log_prob_tokens = step.tokens_per_gpu_in_log_prob_pass_at_most
    in_log_probs = logits.sparse(run.head) if mask.sparse_log_probs else run.head
    in_update = logits.sparse(run.head) if mask.dense_because is None else run.head
    # kept tokens are not spread evenly over micro-batches; this is their mean
    positions = math.ceil(mask.kept_ratio * tokens) if mask.dense_because is None else tokens
    share = _engine_share(run, model, step, accelerator_bytes)
    asleep = 0 if run.rollout.sleeps else share
    if run.rollout.is_light and share:  # the caches of its answers are gone by then
        asleep = memory.rollout_weights(model, 1, run.rollout.value_bytes)
    phases = [
        memory.log_prob_phase(model, layout, in_log_probs, log_prob_tokens, asleep),
        memory.update_phase(model, layout, in_update, tokens, positions, asleep),
    ]
    if share:
        phases = [
            memory.rollout_phase(model, layout, share, after_first_update=False),
            memory.rollout_phase(model, layout, share, after_first_update=True),
            *phases,
        ]
    return Totals(
        model=_summary(model, layout),
        phases=phases,
        head=_logits(run, model, (in_log_probs, log_prob_tokens), (in_update, tokens, positions)),
        rollout=None if run.machines.on_cpu or run.rollout.is_light else _engines(run, model, step, accelerator_bytes),
        host_bytes_per_node=memory.host_states(model, layout, run.machines.per_node),
    )


def _engine_share(run: RunShape, model: ModelShape, step: Step, accelerator_bytes: int) -> int:
    """Bytes of a trainer's accelerator that belong to the rollout engine; 0 where it has accelerators of its own.

    The light rollout takes what it needs: its weights, and a cache of the longest sequence for each answer of a batch.
    """
    if run.machines.on_cpu or (run.trainer.separate and not run.trainer.hybrid):
        return 0
    if run.rollout.is_light:
        size = run.rollout.value_bytes
        answers = min(run.rollout.batched_sequences or step.sequences, step.sequences)
        cache = answers * step.longest_sequence * memory.kv_bytes_per_token(model, 1, size)
        return memory.rollout_weights(model, 1, size) + cache
    return round(run.rollout.memory_share * accelerator_bytes)


def _summary(model: ModelShape, layout: Layout) -> ModelSummary:
    return ModelSummary(
        source=model.source,
        parameters=model.num_parameters,
        trained_parameters=memory.num_trained(model, layout),
        layers=model.layers,
        hidden=model.hidden,
        heads=model.heads,
        kv_heads=model.kv_heads,
        vocabulary=model.vocab,
        context=model.max_positions,
    )


def _logits(run: RunShape, model: ModelShape, log_probs: tuple[Head, int], update: tuple[Head, int, int]) -> Logits:
    (log_prob_head, log_prob_tokens), (update_head, tokens, positions) = log_probs, update
    vocabulary = math.ceil(model.vocab / run.layout.tensor)
    return Logits(
        tokens=tokens,
        vocabulary=vocabulary,
        kept_ratio=run.mask.kept_ratio,
        dense_because=run.mask.dense_because,
        log_prob_pass_bytes=logits.forward_logits(log_prob_head, log_prob_tokens, vocabulary),
        log_prob_pass_bytes_dense=logits.forward_logits(run.head, log_prob_tokens, vocabulary),
        gradient_step_bytes=logits.update_logits(update_head, positions, vocabulary),
        gradient_step_bytes_dense=logits.update_logits(run.head, tokens, vocabulary),
    )


def _engines(run: RunShape, model: ModelShape, step: Step, accelerator_bytes: int) -> Engines:
    """The engines' weights, and how many full sequences their caches would hold."""
    rollout = run.rollout
    share = round(rollout.memory_share * accelerator_bytes)
    weights = memory.rollout_weights(model, rollout.tensor, rollout.value_bytes)
    per_token = memory.kv_bytes_per_token(model, rollout.tensor, rollout.value_bytes)
    cache = max(0, share - weights)
    world = rollout.nodes * rollout.per_node if run.trainer.separate else run.machines.world
    engines = max(1, world // rollout.per_engine)
    return Engines(
        engines=engines,
        accelerators_per_engine=rollout.per_engine,
        share_bytes=share,
        weights_bytes=weights,
        cache_bytes=cache,
        cache_bytes_per_token=per_token,
        full_length_sequences_per_engine=cache // (per_token * step.longest_sequence),
        sequences_per_engine_per_step=math.ceil(step.sequences / engines),
    )
