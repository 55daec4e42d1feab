"""The shape of a run: what preflight wants to know of a config, read once, frozen and typed.

:func:`~entropy_fork.preflight.read_shape.read_run_shape` makes it. The checks (``problems*.py``), the numbers
(``step.py``, ``add_up.py``) and the notes take the shape and never look into the config.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from entropy_fork.preflight.logits import Head
from entropy_fork.preflight.memory import Layout


@dataclass(frozen=True)
class Machines:
    """The machines that the trainer runs on.

    Attributes:
        nodes: ``trainer.nnodes``.
        per_node: accelerators of one of them, ``trainer.n_gpus_per_node``.
        on_cpu: ``trainer.device=cpu``.
    """

    nodes: int
    per_node: int
    on_cpu: bool

    @property
    def world(self) -> int:
        """Accelerators of the trainer."""
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Trainer:
    """Which of verl's trainers runs.

    Attributes:
        mode: ``trainer.v1.trainer_mode``.
        sync_steps: updates between two synchronisations of the rollout engines' weights, in ``separate_async``
            (``trainer.v1.separate_async.parameter_sync_step``); 1 in the other modes.
        hybrid: whether the trainer and the rollout engines share accelerators (``actor_rollout_ref.hybrid_engine``).
    """

    mode: str
    sync_steps: int
    hybrid: bool

    @property
    def separate(self) -> bool:
        """Whether the rollout engines have accelerators of their own."""
        return self.mode == "separate_async"


@dataclass(frozen=True)
class Data:
    """Prompts and their lengths in tokens.

    Attributes:
        batch: prompts of a step, ``data.train_batch_size``.
        prompt_length, response_length: the longest that there may be.
        generation_batch: prompts fetched at once, ``data.gen_batch_size``.
        files: ``data.train_files``; None where the run names none.
        max_rows: ``data.train_max_samples``; -1 takes all rows.
    """

    batch: int
    prompt_length: int
    response_length: int
    generation_batch: int | None
    files: tuple[str, ...] | None
    max_rows: int

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: prompt and response."""
        return self.prompt_length + self.response_length


@dataclass(frozen=True)
class Packing:
    """How verl cuts the sequences of a rank into micro-batches.

    Attributes:
        dynamic: by tokens (``use_dynamic_bsz``). Else by sequences.
        tokens: of a micro-batch on one accelerator, where it is dynamic.
        sequences: of a micro-batch on one rank, where it is not; None or 0 if the key is not set.
    """

    dynamic: bool
    tokens: int
    sequences: int | None

    def most_tokens(self, longest: int, sequence_parallelism: int) -> int:
        """Tokens of a full micro-batch on one accelerator, if every sequence were ``longest`` tokens long."""
        if self.dynamic:
            return self.tokens
        return (self.sequences or 1) * math.ceil(longest / sequence_parallelism)


@dataclass(frozen=True)
class Update:
    """The actor's updates.

    Attributes:
        mini_batch: prompts of a gradient step, ``ppo_mini_batch_size``.
        epochs: ``ppo_epochs``.
        packing: how a mini-batch is cut up.
        kl_loss: ``use_kl_loss``.
        reduces_at_end: ``fsdp_config.use_no_sync_for_gradient_accumulation``: gradients are reduced after the last
            micro-batch alone.
        offload_policy: ``fsdp_config.offload_policy`` as it is written. :class:`Layout` has it where it does something.
        virtual_stages: ``megatron.virtual_pipeline_model_parallel_size``.
        uneven_stages: whether ``megatron.override_transformer_config`` says how layers are cut into pipeline stages.
    """

    mini_batch: int
    epochs: int
    packing: Packing
    kl_loss: bool
    reduces_at_end: bool
    offload_policy: bool
    virtual_stages: int
    uneven_stages: bool


@dataclass(frozen=True)
class Model:
    """The keys of ``actor_rollout_ref.model``. Its sizes are a :class:`ModelShape`, read elsewhere.

    Attributes:
        path: a folder or a hub id; None if the run names no model.
        trusts_its_code: ``trust_remote_code``.
        packed: ``use_remove_padding``.
        fused: ``use_fused_kernels``.
        offloads_activations: ``enable_activation_offload``.
    """

    path: str | None
    trusts_its_code: bool
    packed: bool
    fused: bool
    offloads_activations: bool


@dataclass(frozen=True)
class Rollout:
    """The rollout engines, and the log-prob pass, whose keys verl has in the same group.

    Attributes:
        name: ``vllm``, ``sglang``, …
        n: responses to a prompt.
        tensor, data_parallel, pipeline: over how many accelerators an engine is cut in each way.
        nodes, per_node: accelerators of their own, in ``separate_async``.
        sends_weights_by: ``checkpoint_engine.backend``.
        context: ``max_model_len``, tokens; None takes the model's.
        batched_tokens, batched_sequences: ``max_num_batched_tokens``, ``max_num_seqs``.
        memory_share: ``gpu_memory_utilization``.
        value_bytes: of one weight or cached value, ``dtype``.
        sleeps: whether an engine frees its memory while the trainer has its turn.
        log_probs: how the log-prob pass cuts a batch up.
    """

    name: str
    n: int
    tensor: int
    data_parallel: int
    pipeline: int
    nodes: int
    per_node: int
    sends_weights_by: str
    context: int | None
    batched_tokens: int | None
    batched_sequences: int | None
    memory_share: float
    value_bytes: int
    sleeps: bool
    log_probs: Packing

    @property
    def per_engine(self) -> int:
        """Accelerators that one engine spans."""
        return self.tensor * self.data_parallel * self.pipeline

    @property
    def is_light(self) -> bool:
        """Whether it is the light rollout of this package, on transformers."""
        return self.name == "transformers"


@dataclass(frozen=True)
class DynamicSampling:
    """``algorithm.filter_groups``: keep only prompts whose responses are not all right or all wrong.

    Attributes:
        on: ``enable``.
        metric: what is compared in a group.
        in_flight: ``max_inflight_gen_batches``.
        most_batches: ``max_num_gen_batches``.
    """

    on: bool
    metric: str | None
    in_flight: int
    most_batches: int


@dataclass(frozen=True)
class Overlong:
    """The penalty of verl's reward manager ``dapo`` for long responses, in tokens.

    Attributes:
        buffer: ``overlong_buffer_cfg.len``: over how many tokens the penalty grows.
        end: ``max_resp_len``: where it ends.
    """

    buffer: int
    end: int | None


@dataclass(frozen=True)
class Mask:
    """What a mask means for memory.

    Attributes:
        kept_ratio: the largest share of the tokens that an update of the run looks at; 1 without a mask.
        dense_because: why an update needs the LM head at every position; None where kept ones are enough.
        sparse_log_probs: whether the log-prob pass needs the LM head at response positions only.
    """

    kept_ratio: float
    dense_because: str | None
    sparse_log_probs: bool


@dataclass(frozen=True)
class RunShape:
    """All that preflight knows of a run.

    Attributes:
        machines, trainer, data, update, model, rollout, sampling, mask: see their classes.
        layout: how the actor is cut up.
        head: how hidden states become log-probs.
        overlong: the penalty for long responses; None without one.
        reference: whether log-probs of a reference policy are computed.
        reference_pass: how its pass cuts a batch up; None where it has none of its own (with LoRA, it is the actor).
        critic: whether a critic is trained.
    """

    machines: Machines
    trainer: Trainer
    data: Data
    update: Update
    model: Model
    rollout: Rollout
    sampling: DynamicSampling
    mask: Mask
    layout: Layout
    head: Head
    overlong: Overlong | None
    reference: bool
    reference_pass: Packing | None
    critic: bool
