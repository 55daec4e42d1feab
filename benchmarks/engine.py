"""verl's own FSDP engine on one model with random weights, and a mini-batch for it. Benchmarks of an update use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, PolicyLossConfig
from verl.workers.engine import EngineRegistry
from verl.workers.utils.losses import ppo_loss

from entropy_fork.verl.gradient_step import ROW_IDENTITY


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of the mini-batch.

    Attributes:
        hidden, layers, vocabulary: of the model.
        rows: responses of the mini-batch.
        prompt, response: tokens of the longest.
        per_micro_batch: responses of a micro-batch.
        ragged: whether responses have all lengths from a quarter to the whole; else all are of one length.
    """

    hidden: int
    layers: int
    vocabulary: int
    rows: int
    prompt: int
    response: int
    per_micro_batch: int
    ragged: bool = False


@dataclass(frozen=True)
class Options:
    """How the engine computes; the names are verl's where it has one.

    Attributes:
        strategy: ``fsdp`` or ``fsdp2``.
        dtype: of the forward and the backward pass; weights are kept in fp32.
        packed: ``use_remove_padding``.
        attention: ``attn_implementation``.
        compiled: ``use_torch_compile``.
        checkpointing: ``enable_gradient_checkpointing``.
        activation_offload: ``enable_activation_offload``.
        offload: ``param_offload`` and ``optimizer_offload``.
        lora_rank: 0 trains all weights.
        fused: the backend of ``use_fused_kernels``, ``torch`` or ``triton``; empty for none.
        sequence_parallel: ``ulysses_sequence_parallel_size``.
    """

    strategy: str = "fsdp2"
    dtype: str = "bf16"
    packed: bool = False
    attention: str = "sdpa"
    compiled: bool = False
    checkpointing: bool = True
    activation_offload: bool = False
    offload: bool = False
    lora_rank: int = 0
    fused: str = ""
    sequence_parallel: int = 1


def save_model(shape: Shape, folder: str, tied: bool = True) -> None:
    """Save a random model, which the engine loads like a real one."""
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=max(1, shape.hidden // 128),
        head_dim=64,
        tie_word_embeddings=tied,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def build(folder: str, options: Options, learning_rate: float = 1e-6) -> Any:
    """Build the engine on a saved model. The process group must have been started."""
    engine = EngineRegistry.new(
        model_type="language_model",
        backend=options.strategy,
        model_config=HFModelConfig(
            path=folder,
            load_tokenizer=False,
            use_remove_padding=options.packed,
            enable_gradient_checkpointing=options.checkpointing,
            enable_activation_offload=options.activation_offload,
            lora_rank=options.lora_rank,
            use_fused_kernels=bool(options.fused),
            fused_kernel_options={"impl_backend": options.fused} if options.fused else {},
            override_config={"attn_implementation": options.attention},
        ),
        engine_config=FSDPEngineConfig(
            strategy=options.strategy,
            model_dtype="fp32",
            use_torch_compile=options.compiled,
            use_remove_padding=options.packed,
            use_fused_kernels=bool(options.fused),
            param_offload=options.offload,
            optimizer_offload=options.offload,
            ulysses_sequence_parallel_size=options.sequence_parallel,
            mixed_precision={"param_dtype": options.dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        ),
        optimizer_config=FSDPOptimizerConfig(lr=learning_rate, total_training_steps=1000),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def loss(shape: Shape) -> Callable[..., Any]:
    """verl's loss of PPO."""
    actor = FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_mini_batch_size=shape.rows, ppo_micro_batch_size_per_gpu=shape.rows,
        policy_loss=PolicyLossConfig(loss_mode="vanilla"),
    )  # fmt: skip
    return partial(ppo_loss, config=actor)


def mini_batch(shape: Shape, options: Options | None = None, temperature: float = 1.0) -> Any:
    """A mini-batch of random answers, in verl's layout."""
    options = options or Options()
    lengths = [shape.response] * shape.rows
    if shape.ragged:
        shortest = max(1, shape.response // 4)
        lengths = torch.linspace(shortest, shape.response, shape.rows).long().tolist()

    def nested(make: Callable[[int], Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor([make(length) for length in lengths], layout=torch.jagged)

    prompts = nested(lambda _: torch.randint(shape.vocabulary, (shape.prompt,)))
    responses = nested(lambda length: torch.randint(shape.vocabulary, (length,)))
    pairs = zip(prompts.unbind(), responses.unbind(), strict=True)
    mask = nested(lambda length: torch.ones(length, dtype=torch.int64))
    identity = torch.arange(shape.rows).repeat_interleave(2).view(shape.rows, 2)
    return tu.get_tensordict(
        {
            "input_ids": torch.nested.as_nested_tensor([torch.cat(pair) for pair in pairs], layout=torch.jagged),
            "position_ids": nested(lambda length: torch.arange(shape.prompt + length)),
            "prompts": prompts,
            "responses": responses,
            "response_mask": mask,
            "loss_mask": mask,
            "old_log_probs": nested(lambda length: torch.rand(length) - 10.0),
            "entropy": nested(torch.rand),
            "advantages": nested(lambda length: torch.rand(length) - 0.5),
            ROW_IDENTITY: torch.nested.as_nested_tensor(list(identity), layout=torch.jagged),
        },
        {
            "temperature": temperature,
            "global_batch_size": shape.rows,
            "use_remove_padding": options.packed,
            "use_fused_kernels": bool(options.fused),
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": shape.per_micro_batch,
            "calculate_entropy": False,
        },
    )


def let_fsdp1_run_on_a_cpu() -> None:
    """Let torch broadcast weights that are on a CPU, in this process. torch refuses it, but gloo can do it."""
    from torch.distributed.fsdp import _init_utils
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    from entropy_fork.verl.engine import ForkingTokens

    assert callable(_init_utils._check_module_states_for_sync_module_states)
    _init_utils._check_module_states_for_sync_module_states = lambda _: None
    if "cpu" not in EngineRegistry._engines["language_model"]["fsdp"]:
        register = EngineRegistry.register("language_model", "fsdp", "cpu")
        register(type("FSDP1", (ForkingTokens, FSDPEngineWithLMHead), {}))


def keep_gradients(engine: Any, state: dict[str, Any]) -> None:
    """Instead of an optimizer's step, put the whole gradients of each step into ``state``."""

    def keep() -> float:
        state["gradients"] = {
            name: getattr(parameter.grad, "full_tensor", lambda g=parameter.grad: g)().clone()
            for name, parameter in engine.module.named_parameters()
            if parameter.grad is not None
        }
        return 0.0

    engine.optimizer_step = keep
