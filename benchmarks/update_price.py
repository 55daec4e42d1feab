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
from typing import Annotated

import torch
import typer
from engine import Options, Shape, build, loss, mini_batch, save_model
from rich.console import Console
from rich.table import Table
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name

from entropy_fork.common.progress import track
from entropy_fork.core.rule import Rule, Selector
from entropy_fork.verl.gradient_step import RULE

TOP20 = Selector(0.2)
#: rows of the table: the rule (None for all tokens, or weights from the driver), and whether the step reports entropy
RULES: dict[str, Rule | None] = {
    "off, or selected on the driver": None,
    "old, mini_batch, in the worker (shuffle)": Rule(TOP20, "old", "mini_batch"),
    "official: current, micro_batch": Rule(TOP20, "current", "micro_batch"),
    "the paper's Eq. 6: current, mini_batch": Rule(TOP20, "current", "mini_batch"),
}


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
    seconds: dict[str, list[float]] = {name: [] for name in RULES}
    shape = Shape(hidden, layers, vocabulary, rows, prompt, response, per_micro_batch)
    on_cpu = get_device_name() == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        save_model(shape, folder)
        engine = build(folder, Options(dtype="fp32" if on_cpu else "bf16", checkpointing=not on_cpu))
    num_parameters = sum(parameter.numel() for parameter in engine.module.parameters())
    for repeat in track("repeats", range(repeats + 1)):
        for name, rule in RULES.items():
            torch.manual_seed(repeat)
            data = mini_batch(shape)
            if rule is not None:
                tu.assign_non_tensor(data, **{RULE: rule})
            with engine.train_mode():
                start = time.perf_counter()
                engine.train_batch(data, loss_function=loss(shape))
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
