"""Formulas for the bytes that one accelerator holds, from a model's sizes and a layout. No verl and no GPU is needed.

What is exact, and what is an estimate:

* weights, gradients and optimizer states of FSDP are exact (``test_memory.py`` counts the tensors that FSDP2
  makes on real ranks);
* activations are an estimate for dense decoder layers of the Llama and Qwen3 kind as ``transformers`` writes them, with
  flash attention. The same test runs real layers on fake tensors and counts every byte that is alive: within 5%;
* logits are counted in ``logits.py``;
* Megatron's sizes are those of its documentation, and are not measured here.

No number contains CUDA contexts, NCCL's buffers, fragmentation, CUDA graphs, or what a sleeping rollout engine keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from entropy_fork.preflight.logits import Head, forward_logits, update_logits
from entropy_fork.preflight.model_shape import ModelShape, Parameter

GIB = 2**30

#: bytes of one element, by the names that verl accepts (verl/utils/torch_dtypes.py)
DTYPE_BYTES = {
    **dict.fromkeys(("fp32", "float32", "float", "32"), 4),
    **dict.fromkeys(("bf16", "bfloat16", "fp16", "float16", "16", "half"), 2),
}

# parts of a phase
WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
UNSHARDED_GRADIENTS, GATHERED = "unsharded gradients", "gathered layers"
ACTIVATIONS, LOGITS, ENGINE = "activations", "logits", "rollout engine"
NOT_OFFLOADED = "weights and optimizer that were not offloaded"


def in_gib(size: float) -> str:
    """Bytes in words, for a person."""
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"


@dataclass(frozen=True)
class Layout:
    """How the actor is cut up and computed.

    Attributes:
        strategy: ``fsdp``, ``fsdp2`` or ``megatron``.
        world: accelerators of the trainer.
        shard: over how many of them a parameter is sharded (FSDP).
        sequence: Ulysses sequence parallelism, or Megatron's context parallelism.
        tensor, pipeline: Megatron's.
        master_bytes: of a parameter, its gradient and each of Adam's two moments: ``fsdp_config.model_dtype``.
        compute_bytes, reduce_bytes: of a parameter in the forward pass, and of a gradient while it is reduced.
        param_offload, optimizer_offload: verl's: on the host *between* passes, on the accelerator during an update.
        offload_policy: FSDP2's: on the host during an update too.
        keeps_unsharded_gradients: ``use_no_sync_for_gradient_accumulation`` with more than one micro-batch.
        reshard_after_forward: whether layers are gathered a second time for the backward pass.
        checkpointing: activation checkpointing, one checkpoint per layer.
        distributed_optimizer: Megatron's: Adam's states and the fp32 weights over the data-parallel ranks.
        lora_rank: 0 trains all parameters.
    """

    strategy: str
    world: int
    shard: int
    sequence: int = 1
    tensor: int = 1
    pipeline: int = 1
    master_bytes: int = 4
    compute_bytes: int = 2
    reduce_bytes: int = 4
    param_offload: bool = False
    optimizer_offload: bool = False
    offload_policy: bool = False
    keeps_unsharded_gradients: bool = False
    reshard_after_forward: bool = True
    checkpointing: bool = True
    distributed_optimizer: bool = True
    lora_rank: int = 0

    @property
    def data_parallel(self) -> int:
        """Data-parallel ranks."""
        return max(1, self.world // (self.sequence * self.tensor * self.pipeline))


@dataclass(frozen=True)
class States:
    """What training keeps on one accelerator, bytes."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return self.weights + self.gradients + self.optimizer


def sharded_count(parameters: Iterable[Parameter], shard: int) -> int:
    """Elements that the fullest rank holds: FSDP2 cuts each parameter along its first dimension, rounding up.

    Source: torch.distributed.fsdp.fully_shard, as called in verl/utils/fsdp_utils.py: apply_fsdp2.
    """
    return sum(math.ceil(p.shape[0] / shard) * math.prod(p.shape[1:]) for p in parameters)


def states(model: ModelShape, layout: Layout) -> States:
    """Weights, gradients and Adam's two moments of the actor on one accelerator while it is updated.

    FSDP (verl/workers/engine/fsdp/transformer_impl.py): all three in ``fsdp_config.model_dtype``, over ``shard`` ranks;
    with LoRA gradients and moments of the adapters alone. Megatron: weights in 2 bytes and gradients in 4 over
    tensor × pipeline ranks; fp32 weights and moments (12 bytes) over the data- and context-parallel ranks as well.
    """
    if layout.strategy == "megatron":
        mine = model.num_parameters / (layout.tensor * layout.pipeline)
        trained = num_trained(model, layout) / (layout.tensor * layout.pipeline)
        over = layout.data_parallel * layout.sequence if layout.distributed_optimizer else 1
        return States(round(2 * mine), round(4 * trained), round(12 * trained / over))
    held = sharded_count(model.parameters, layout.shard)
    trained = held
    if layout.lora_rank:
        trained = sharded_count(model.lora_parameters(layout.lora_rank), layout.shard)
        held += trained
    size = layout.master_bytes
    return States(held * size, trained * size, 2 * trained * size)


def resident_states(model: ModelShape, layout: Layout, after_first_update: bool = True) -> int:
    """Bytes of :func:`states` that stay on the accelerator while the rollout engine generates.

    ``param_offload`` and ``optimizer_offload`` move them to the host between passes (workers/engine/base.py:
    BaseEngineCtx); gradients are dropped after each update; the moments exist from the first update on.
    """
    all_states = states(model, layout)
    if layout.offload_policy:
        return 0
    weights = 0 if layout.param_offload else all_states.weights
    optimizer = 0 if layout.optimizer_offload or not after_first_update else all_states.optimizer
    return weights + optimizer


def host_states(model: ModelShape, layout: Layout, per_node: int) -> int:
    """Bytes of host memory that the offloaded states of one node's accelerators take."""
    all_states = states(model, layout)
    if layout.offload_policy:
        return per_node * all_states.total
    weights = all_states.weights if layout.param_offload else 0
    return per_node * (weights + (all_states.optimizer if layout.optimizer_offload else 0))


def layer_activations(model: ModelShape) -> int:
    """Bytes per token that one decoder layer saves for its backward pass, at 2 bytes per value.

    With h = hidden, q = heads·head_dim, k = kv_heads·head_dim, f = intermediate::

        16h + 14q + 14k + 8f + 8·heads + 4·kv_heads + 8

    of which: for each of two RMSNorms its input in fp32, its normalised input and its output, 8h; the same for the
    norms of queries and keys; rotated queries and keys, values, and attention's output as it is and as the projection
    reads it; gate, up, silu(gate) and their product, 8f; and the statistics of norms and attention. For models
    without norms of queries and keys it is 8(q + k) too high.
    """
    q, k = model.heads * model.head_dim, model.kv_heads * model.head_dim
    statistics = 8 * model.heads + 4 * model.kv_heads + 8
    return 16 * model.hidden + 14 * q + 14 * k + 8 * model.intermediate + statistics


def activations(model: ModelShape, layout: Layout, tokens: int) -> int:
    """Peak bytes of activations in an update's backward pass, for ``tokens`` of a micro-batch on one accelerator.

    With checkpointing ``layers · 2h`` (each layer's input) and one layer's :func:`layer_activations`, recomputed;
    without, all layers' and the final norm's 8h. Either way 6f for the three gradients of the MLP that are alive at
    once. Values of 4 bytes (``mixed_precision.param_dtype=fp32``) take twice that. Megatron's tensor parallelism with
    sequence parallelism divides it; up to ``pipeline`` micro-batches are under way in its first stage.
    """
    layer = layer_activations(model)
    inputs = 2 * model.hidden
    layers = math.ceil(model.layers / layout.pipeline)
    in_flight = layout.pipeline
    gradients = 6 * model.intermediate
    if layout.checkpointing:
        per_token = layers * inputs * in_flight + layer + gradients
    else:
        per_token = layers * layer * in_flight + 8 * model.hidden + gradients
    return tokens * per_token * layout.compute_bytes // 2 // layout.tensor


def checkpoints(model: ModelShape, layout: Layout, tokens: int) -> int:
    """Bytes of activations that are alive while the LM head is computed: all layers' inputs and the final norm."""
    if not layout.checkpointing:
        return activations(model, layout, tokens)
    layers = math.ceil(model.layers / layout.pipeline) * layout.pipeline
    return tokens * (layers * 2 + 8) * model.hidden * layout.compute_bytes // 2 // layout.tensor


def forward_activations(model: ModelShape, layout: Layout, tokens: int) -> int:
    """Peak bytes of activations without a backward pass: one layer's MLP, 6f + 8h a token, or attention, 14q + 10h."""
    in_attention = 14 * model.heads * model.head_dim + 10 * model.hidden
    per_token = max(6 * model.intermediate + 8 * model.hidden, in_attention)
    return tokens * per_token * layout.compute_bytes // 2 // layout.tensor


@dataclass(frozen=True)
class Phase:
    """One moment of a step and what is on the accelerator then, bytes by name."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def update_phase(
    model: ModelShape, layout: Layout, head: Head, tokens: int, head_tokens: int | None = None, asleep: int = 0
) -> Phase:
    """The peak of a gradient step.

    Either at the LM head (its gathered weight, two layers', the logits, all checkpoints), or in a layer's backward pass
    (gathered weights, gradients before they are reduced, the recomputed activations): the larger of the two, since the
    logits are gone when the first layer's turn comes.

    Args:
        model: its sizes.
        layout: how it is spread over accelerators.
        head: how the logits are computed.
        tokens: of the fullest micro-batch on one accelerator.
        head_tokens: how many of them go through the LM head; all by default.
        asleep: what the rollout engine still holds, bytes.
    """
    held = states(model, layout)
    head_tokens = tokens if head_tokens is None else head_tokens
    logits = update_logits(head, head_tokens, math.ceil(model.vocab / layout.tensor))
    at_head, in_layer, at_reduce = _gathered(model, layout)
    moments = [
        (checkpoints(model, layout, tokens), logits, at_head),
        (activations(model, layout, tokens), 0, in_layer),
        (checkpoints(model, layout, tokens), 0, at_reduce),
    ]
    activation, logits, gathered = max(moments, key=sum)
    parts = {WEIGHTS: held.weights, GRADIENTS: held.gradients, OPTIMIZER: held.optimizer}
    if layout.offload_policy:
        parts = dict.fromkeys(parts, 0)
    if layout.keeps_unsharded_gradients:
        parts[UNSHARDED_GRADIENTS] = num_trained(model, layout) * layout.reduce_bytes
    parts |= {GATHERED: gathered, ACTIVATIONS: activation, LOGITS: logits}
    if asleep:
        parts[ENGINE] = asleep
    return Phase("gradient step", parts)


def log_prob_phase(model: ModelShape, layout: Layout, head: Head, tokens: int, asleep: int = 0) -> Phase:
    """The peak of the pass that computes the old policy's log-probs and entropies: forward only, no gradients.

    Adam's moments stay where they were: an evaluation loads the weights alone (workers/engine/base.py).
    """
    held = states(model, layout)
    optimizer = 0 if layout.optimizer_offload or layout.offload_policy else held.optimizer
    gathered = 0
    if layout.strategy != "megatron":
        gathered = layout.compute_bytes * (2 * model.num_layer_parameters + model.num_head_parameters)
    logits = forward_logits(head, tokens, math.ceil(model.vocab / layout.tensor))
    per_layer = forward_activations(model, layout, tokens)
    parts = {
        WEIGHTS: 0 if layout.offload_policy else held.weights,
        OPTIMIZER: optimizer,
        GATHERED: gathered,
        ACTIVATIONS: per_layer if per_layer > logits else 0,
        LOGITS: logits if logits >= per_layer else 0,
    }
    if asleep:
        parts[ENGINE] = asleep
    return Phase("old log-probs", parts)


def rollout_phase(model: ModelShape, layout: Layout, engine: int, after_first_update: bool) -> Phase:
    """While the rollout engine generates, or reserves its share when it starts (before there is an optimizer state)."""
    name = "rollout" if after_first_update else "start of the rollout engine"
    kept = resident_states(model, layout, after_first_update)
    return Phase(name, {NOT_OFFLOADED: kept, ENGINE: engine})


def kv_bytes_per_token(model: ModelShape, tensor: int, bytes_per_value: int) -> int:
    """Keys and values of one token in all layers, on one of ``tensor`` accelerators (heads are copied below one)."""
    kv_heads = max(1, math.ceil(model.kv_heads / tensor))
    return 2 * model.layers * kv_heads * model.head_dim * bytes_per_value


def rollout_weights(model: ModelShape, tensor: int, bytes_per_value: int) -> int:
    """The rollout engine's own weights on one of ``tensor`` accelerators."""
    return math.ceil(model.num_parameters / tensor) * bytes_per_value


def num_trained(model: ModelShape, layout: Layout) -> int:
    """Parameters with gradients: all, or with LoRA the adapters."""
    if layout.lora_rank:
        return sum(parameter.count for parameter in model.lora_parameters(layout.lora_rank))
    return model.num_parameters


def _gathered(model: ModelShape, layout: Layout) -> tuple[int, int, int]:
    """What FSDP gathers and has not reduced yet: at the LM head, in a layer's backward pass, and while it is reduced.

    With c and r bytes of compute and reduction: at the head ``2c·head + 2c·layer`` (weight and gradient of the head;
    this layer and the prefetched one); in a layer ``4c·layer`` (two layers, the buffer they come in, gradients); while
    gradients are reduced ``(3c + r)·layer``, or ``(c + r)·head + 2c·layer``. Counted in test_memory.py on
    FSDP2 over fake ranks. A tied head is the root's and stays gathered throughout; without ``reshard_after_forward``
    all layers do.
    """
    if layout.strategy == "megatron":
        return 0, 0, 0
    c, r = layout.compute_bytes, layout.reduce_bytes
    layer, head = model.num_layer_parameters, model.num_head_parameters
    if layout.lora_rank:  # frozen weights have no gradients
        at_head, in_layer, at_reduce = c * (head + 2 * layer), 3 * c * layer, 0
    else:
        at_head = 2 * c * head + 2 * c * layer
        in_layer = 4 * c * layer
        at_reduce = max((3 * c + r) * layer, (c + r) * head + 2 * c * layer)
    root = c * head if model.tied else 0
    if not layout.reshard_after_forward:
        everything = c * model.num_parameters
        at_head, in_layer, at_reduce = (everything + part for part in (c * head, 2 * c * layer, r * layer))
        root = 0
    return at_head, in_layer + root, at_reduce + root
