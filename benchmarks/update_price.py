"""What a gradient step costs under each rule, in verl's own FSDP2 engine: one process, a random Qwen3.

    VERL_PLATFORM=cpu python benchmarks/update_price.py             on a machine without an accelerator
    python benchmarks/update_price.py --hidden 2048 --layers 28     on a GPU

The rules take turns, step by step, so that other work on the machine slows all of them equally.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.config import FSDPActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, PolicyLossConfig
from verl.workers.engine import EngineRegistry
from verl.workers.utils.losses import ppo_loss

from entropy_fork.common.progress import track
from entropy_fork.core.rule import Rule, Selector
from entropy_fork.verl.gradient_step import ROW_IDENTITY, RULE

TOP20 = Selector(0.2)
#: rows of the table: the rule (None for all tokens, or weights from the driver), and whether the step reports entropy
RULES: dict[str, Rule | None] = {
    "off, or selected on the driver": None,
    "old, mini_batch, in the worker (shuffle)": Rule(TOP20, "old", "mini_batch"),
    "official: current, micro_batch": Rule(TOP20, "current", "micro_batch"),
    "the paper's Eq. 6: current, mini_batch": Rule(TOP20, "current", "mini_batch"),
}


def build(folder: str, hidden: int, layers: int, vocabulary: int) -> Any:
    """Build the engine on a random model, which is saved and loaded like a real one."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        head_dim=64,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    on_cpu = get_device_name() == "cpu"
    dtype = "fp32" if on_cpu else "bf16"
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=HFModelConfig(
            path=folder,
            load_tokenizer=False,
            use_remove_padding=False,
            enable_gradient_checkpointing=not on_cpu,
            override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            model_dtype="fp32",
            use_torch_compile=False,
            use_remove_padding=False,
            mixed_precision={"param_dtype": dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-6, total_training_steps=1000),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def mini_batch(rows: int, prompt: int, response: int, vocabulary: int, per_micro_batch: int, rule: Rule | None) -> Any:
    """A mini-batch of random answers, in verl's layout."""

    def nested(*shape: int) -> torch.Tensor:
        values = torch.randint(vocabulary, shape) if len(shape) == 2 else torch.rand(shape[:2])
        return torch.nested.as_nested_tensor(list(values), layout=torch.jagged)

    prompts, responses = nested(rows, prompt), nested(rows, response)
    pairs = zip(prompts.unbind(), responses.unbind(), strict=True)
    mask = torch.nested.as_nested_tensor([torch.ones(response, dtype=torch.int64)] * rows, layout=torch.jagged)
    identity = torch.arange(rows).repeat_interleave(2).view(rows, 2)
    data = tu.get_tensordict(
        {
            "input_ids": torch.nested.as_nested_tensor([torch.cat(pair) for pair in pairs], layout=torch.jagged),
            "position_ids": torch.nested.as_nested_tensor(
                [torch.arange(prompt + response)] * rows, layout=torch.jagged
            ),
            "prompts": prompts,
            "responses": responses,
            "response_mask": mask,
            "loss_mask": mask,
            "old_log_probs": nested(rows, response, 1) - 10.0,
            "entropy": nested(rows, response, 1),
            "advantages": nested(rows, response, 1) - 0.5,
            ROW_IDENTITY: torch.nested.as_nested_tensor(list(identity), layout=torch.jagged),
        },
        {
            "temperature": 1.0,
            "global_batch_size": rows,
            "use_remove_padding": False,
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": per_micro_batch,
            "calculate_entropy": False,
        },
    )
    if rule is not None:
        tu.assign_non_tensor(data, **{RULE: rule})
    return data


def main(
    hidden: Annotated[int, typer.Option(help="Hidden size of the model.")] = 256,
    layers: Annotated[int, typer.Option(help="Its layers.")] = 8,
    vocabulary: Annotated[int, typer.Option(help="Its vocabulary.")] = 8192,
    rows: Annotated[int, typer.Option(help="Responses of the mini-batch.")] = 8,
    per_micro_batch: Annotated[int, typer.Option(help="Responses of a micro-batch.")] = 2,
    prompt: int = 32,
    response: int = 256,
    repeats: Annotated[int, typer.Option(help="Steps per rule, after one that is not counted.")] = 7,
) -> None:
    """Print the median seconds of a gradient step under each rule."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo" if get_device_name() == "cpu" else "cpu:gloo,cuda:nccl")
    actor = FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_mini_batch_size=rows, ppo_micro_batch_size_per_gpu=rows,
        policy_loss=PolicyLossConfig(loss_mode="vanilla"),
    )  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in RULES}
    with tempfile.TemporaryDirectory() as folder:
        engine = build(folder, hidden, layers, vocabulary)
    num_parameters = sum(parameter.numel() for parameter in engine.module.parameters())
    for repeat in track("repeats", range(repeats + 1)):
        for name, rule in RULES.items():
            torch.manual_seed(repeat)
            data = mini_batch(rows, prompt, response, vocabulary, per_micro_batch, rule)
            with engine.train_mode():
                start = time.perf_counter()
                engine.train_batch(data, loss_function=partial(ppo_loss, config=actor))
                if get_device_name() != "cpu":
                    torch.cuda.synchronize()
                if repeat > 0:
                    seconds[name].append(time.perf_counter() - start)
    base = statistics.median(next(iter(seconds.values())))
    size = f"{num_parameters / 1e6:.1f}M parameters on {get_device_name()}"
    table = Table(title=f"{size}, {rows} × ({prompt} + {response}) tokens in {rows // per_micro_batch} micro-batches")
    for column in ("rule", "s per gradient step (median)", "of the first"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for name, values in seconds.items():
        table.add_row(name, f"{statistics.median(values):.3f}", f"{statistics.median(values) / base:.2f}")
    Console().print(table)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
