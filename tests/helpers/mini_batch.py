"""A mini-batch of twelve short answers, and verl's FSDP engines for a tiny model to train on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUM_ROWS, VOCABULARY = 12, 48


@dataclass
class Answers:
    """A mini-batch in plain lists. One row is padding as verl makes it, one row has tool output in the middle."""

    prompts: list[Tensor]
    responses: list[Tensor]
    masks: list[Tensor]
    old_log_probs: list[Tensor]
    old_entropy: list[Tensor]
    advantages: list[Tensor]
    importance: list[Tensor] | None = None
    #: verl's ``loss_mask``: the response masks before rollout correction rejected tokens, if it rejected any
    masks_before: list[Tensor] | None = None
    #: of the response tokens; None for no such fields
    rollout_log_probs: list[Tensor] | None = None
    sum_pi_squared: list[Tensor] | None = None


def make_answers(seed: int, importance: bool = False, every_field: bool = False) -> Answers:
    """Random answers.

    Args:
        seed: of the random numbers.
        importance: whether rollout correction wrote importance weights.
        every_field: whether the run has every field that a score can read.
    """
    random = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=random)

    lengths = integers(2, 15, NUM_ROWS).tolist()
    lengths[3] = 1  # padding
    masks = [torch.ones(n, dtype=torch.int64) for n in lengths]
    masks[3][:] = 0
    masks[5][: lengths[5] // 2] = 0  # tool output
    advantages = torch.randn(NUM_ROWS, generator=random)
    answers = Answers(
        prompts=[integers(0, VOCABULARY, n) for n in integers(1, 6, NUM_ROWS).tolist()],
        responses=[integers(0, VOCABULARY, n) for n in lengths],
        masks=masks,
        # near the log-probability of a uniform choice, so that some ratios are clipped
        old_log_probs=[-math.log(VOCABULARY) + 0.4 * torch.randn(n, generator=random) for n in lengths],
        old_entropy=[torch.rand(n, generator=random) for n in lengths],
        advantages=[advantages[row].expand(n).clone() for row, n in enumerate(lengths)],
        importance=[0.5 + torch.rand(n, generator=random) for n in lengths] if importance else None,
    )
    if every_field:
        answers.rollout_log_probs = [
            values + 0.1 * torch.randn(len(values), generator=random) for values in answers.old_log_probs
        ]
        answers.sum_pi_squared = [torch.rand(n, generator=random) for n in lengths]
    return answers


def make_batch(
    answers: Answers, rows: list[int], settings: dict[str, Any], more: dict[str, list[Tensor]] | None = None
) -> Any:
    """Some rows in verl's layout without padding. ``more`` holds other fields of all answers."""
    from verl.utils import tensordict_utils as tu

    from entropy_fork.verl.gradient_step import ROW_IDENTITY

    def nested(values: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor([values[row] for row in rows], layout=torch.jagged)

    sequences = [torch.cat(pair) for pair in zip(answers.prompts, answers.responses, strict=True)]
    tensors = {
        "input_ids": nested(sequences),
        "position_ids": nested([torch.arange(len(sequence)) for sequence in sequences]),
        "prompts": nested(answers.prompts),
        "responses": nested(answers.responses),
        "response_mask": nested(answers.masks),
        "loss_mask": nested(answers.masks if answers.masks_before is None else answers.masks_before),
        "old_log_probs": nested(answers.old_log_probs),
        "ref_log_prob": nested(answers.old_log_probs),
        "entropy": nested(answers.old_entropy),
        "advantages": nested(answers.advantages),
        ROW_IDENTITY: nested([torch.tensor([row, 1000 + row]) for row in range(NUM_ROWS)]),
    }
    if answers.importance is not None:
        tensors["rollout_is_weights"] = nested(answers.importance)
    if answers.rollout_log_probs is not None:
        tensors["rollout_log_probs"] = nested(answers.rollout_log_probs)
    if answers.sum_pi_squared is not None:  # of whole rows, a token's value stands before the token
        squares = zip(answers.prompts, answers.sum_pi_squared, strict=True)
        tensors["sum_pi_squared"] = nested([torch.cat([torch.ones(len(p) - 1), s, torch.ones(1)]) for p, s in squares])
    tensors.update({name: nested(values) for name, values in (more or {}).items()})
    return tu.get_tensordict(tensors, settings)


def make_engine(
    path: str,
    use_remove_padding: bool,
    sequence_parallel: int = 1,
    param_dtype: str = "fp32",
    learning_rate: float = 0.0,
    strategy: str = "fsdp2",
    use_orig_params: bool = False,
    **model: Any,
) -> Any:
    """verl's engine with float32 weights. ``model`` holds arguments of its HFModelConfig."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    if strategy == "fsdp":
        from benchmarks.engine import let_fsdp1_run_on_a_cpu

        let_fsdp1_run_on_a_cpu()
    engine = EngineRegistry.new(
        model_type="language_model",
        backend=strategy,
        model_config=HFModelConfig(
            path=path,
            load_tokenizer=False,
            use_remove_padding=use_remove_padding,
            enable_gradient_checkpointing=model.pop("enable_gradient_checkpointing", False),
            override_config={"attn_implementation": "sdpa"},
            **model,
        ),
        engine_config=FSDPEngineConfig(
            strategy=strategy,
            use_orig_params=use_orig_params,
            model_dtype="fp32",
            use_torch_compile=False,
            use_remove_padding=use_remove_padding,
            ulysses_sequence_parallel_size=sequence_parallel,
            mixed_precision={"param_dtype": param_dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        ),
        optimizer_config=FSDPOptimizerConfig(lr=learning_rate, total_training_steps=1),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine
