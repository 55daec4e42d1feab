"""Computed, not measured: memory and FLOPs of an update of the paper's models, with a dense, a fused and a sparse head.

    python benchmarks/token_budget.py

A sparse head computes kept positions only. Memory follows the formulas of entropy_fork/preflight/memory.py, whose
docstrings say what is exact and what is an estimate, with flash attention's cross entropy. The FLOPs per token, with
activation checkpointing, are

    body    8 P + 8 layers · heads · head_dim · L    P: parameters between embedding and head. L: the sequence's length,
                                                     of which a causal mask needs half. Forward, once more for the
                                                     checkpoints, and twice as much for the backward pass
    head    6 V h dense, 8 V h fused (logits twice), ρ times either at kept positions (fused beyond 8192 rows)

L is the longest sequence that a recipe allows: 2048 + 20,480 or 2048 + 29,696 tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from report import print_table, write_csv

from entropy_fork.core.lm_head import ROWS_KEPT
from entropy_fork.preflight import logits, memory
from entropy_fork.preflight.logits import Head
from entropy_fork.preflight.memory import GIB, Layout
from entropy_fork.preflight.model_shape import ModelShape, find_model_shape

#: accelerators and sequence parallelism, as in recipes/cluster
CLUSTERS = {"paper_16x8": (128, 8), "node_8": (8, 4)}
LENGTHS = {"20k": 2048 + 20_480, "29k": 2048 + 29_696}
HEADS = ("dense", "fused", "sparse")
USABLE = 0.9


def peak(model: ModelShape, layout: Layout, head: str, tokens: int, ratio: float) -> int:
    """The peak of a gradient step on one accelerator, in bytes, with this number of tokens in its micro-batch."""
    if head == "sparse":
        rows = math.ceil(ratio * tokens)
        return memory.update_phase(model, layout, logits.sparse(Head()), tokens, rows).total
    return memory.update_phase(model, layout, Head(fused=head == "fused"), tokens).total


def largest_budget(model: ModelShape, layout: Layout, head: str, ratio: float, limit: float) -> int:
    """The most tokens per accelerator that a micro-batch can have, a multiple of 256; 0 if none fits."""
    low, high = 0, 2**14
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if peak(model, layout, head, 256 * middle, ratio) <= limit else (low, middle - 1)
    return 256 * low


def flops(model: ModelShape, head: str, length: int, tokens: int, ratio: float) -> tuple[float, float]:
    """The FLOPs per token of an update: of the body, and of the head."""
    body = model.num_parameters - model.num_head_parameters * (1 if model.tied else 2)
    attention = 8 * model.layers * model.heads * model.head_dim * length
    row = 6 * model.vocab * model.hidden
    twice = 8 * model.vocab * model.hidden
    of_head = {
        "dense": row,
        "fused": twice,
        "sparse": ratio * (twice if ratio * tokens > ROWS_KEPT else row),
    }[head]
    return 8 * body + attention, of_head


def main(
    ratio: Annotated[float, typer.Option(help="ρ, the kept share.")] = 0.2,
    gib: Annotated[float, typer.Option(help="Memory of an accelerator.")] = 80.0,
    output: Annotated[Path, typer.Option(help="Folder of token_budget.csv.")] = Path("docs/lab/performance"),
) -> None:
    """Print the table and write it as CSV."""
    rows = []
    fits = f"tokens per GPU in {USABLE:.0%} of {gib:g} GiB"
    for size in ("8b", "14b", "32b"):
        model = find_model_shape(f"Qwen/Qwen3-{size.upper()}", None, False)
        for cluster, (world, sequence) in CLUSTERS.items():
            layout = Layout("fsdp2", world, world, sequence, param_offload=True, optimizer_offload=True)
            for name, length in LENGTHS.items():
                least = math.ceil(length / sequence)
                for head in HEADS:
                    body, of_head = flops(model, head, length, least, ratio)
                    bytes_ = peak(model, layout, head, least, ratio)
                    rows.append(
                        {
                            "model": size,
                            "cluster": cluster,
                            "length": name,
                            "head": f"{head} {ratio}" if head == "sparse" else head,
                            "one longest sequence, GiB": f"{bytes_ / GIB:.1f}",
                            fits: f"{largest_budget(model, layout, head, ratio, USABLE * gib * GIB):,}",
                            "GFLOPs per token": f"{(body + of_head) / 1e9:.1f}",
                            "of which head": f"{of_head / (body + of_head):.1%}",
                        }
                    )
    print_table(f"an update, {ratio:.0%} kept", rows)
    write_csv(rows, output / "token_budget.csv")


if __name__ == "__main__":
    typer.run(main)
