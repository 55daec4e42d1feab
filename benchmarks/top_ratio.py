"""The top ρ of many entropies: this package's whole selection, compared with common ways to find a threshold.

    python benchmarks/top_ratio.py

The others only find a threshold (``torch.topk`` also the tokens) and do not break ties. Half of the entropies are
exactly zero, as a trained model's nearly are, so that ties matter.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from report import chip, median_and_spread, print_table, pyplot, seconds_in_turn, write_csv
from torch import Tensor

from entropy_fork.core.rule import Selector
from entropy_fork.core.selection import kept_count, select_tokens

#: torch.quantile refuses more
MOST_FOR_QUANTILE = 2**24


def ours(entropy: Tensor, ratio: float, lengths: Tensor, eligible: Tensor) -> int:
    """Keep exactly ⌈ρN⌉ tokens, with ties broken by position."""
    return select_tokens(entropy, eligible, lengths, Selector(ratio)).num_kept


def partition(entropy: Tensor, ratio: float) -> float:
    """Find the threshold with numpy's quickselect."""
    rank = entropy.numel() - kept_count(entropy.numel(), ratio)
    return float(np.partition(entropy.numpy(), rank)[rank])


def topk(entropy: Tensor, ratio: float, is_sorted: bool) -> Any:
    return torch.topk(entropy, kept_count(entropy.numel(), ratio), sorted=is_sorted)


def kthvalue(entropy: Tensor, ratio: float) -> Any:
    return torch.kthvalue(entropy, entropy.numel() - kept_count(entropy.numel(), ratio) + 1)


def main(
    sizes: Annotated[list[int] | None, typer.Option(help="Tokens, in millions; may be repeated.")] = None,
    ratio: float = 0.2,
    repeats: int = 5,
    output: Annotated[Path, typer.Option(help="Folder of top_ratio.csv and .png.")] = Path("docs/lab/performance"),
) -> None:
    """Measure, print the table, write CSV and plot."""
    shown: list[dict[str, str]] = []
    rows: list[dict[str, Any]] = []
    medians: dict[str, list[tuple[int, float]]] = {}
    for millions in sizes or [1, 4, 16, 64]:
        tokens = millions * 2**20
        random = torch.Generator().manual_seed(millions)
        entropy = torch.rand(tokens, generator=random).sub_(0.5).clamp_(min=0).mul_(4)
        lengths = torch.full((tokens // 2048,), 2048)
        eligible = torch.ones(tokens, dtype=torch.bool)
        sides: dict[str, Callable[[], Any]] = {
            "select_tokens (all of it)": partial(ours, entropy, ratio, lengths, eligible),
            "numpy.partition": partial(partition, entropy, ratio),
            "torch.topk": partial(topk, entropy, ratio, True),
            "torch.topk(sorted=False)": partial(topk, entropy, ratio, False),
            "torch.kthvalue": partial(kthvalue, entropy, ratio),
        }
        if tokens <= MOST_FOR_QUANTILE:
            sides["torch.quantile"] = partial(torch.quantile, entropy, 1 - ratio)
        seconds = seconds_in_turn(sides, repeats)
        line = {"tokens": f"{tokens:,}"}
        for name in ("select_tokens (all of it)", "numpy.partition", "torch.topk", "torch.topk(sorted=False)",
                     "torch.kthvalue", "torch.quantile"):  # fmt: skip
            line[f"{name}, s"] = median_and_spread(seconds[name]) if name in seconds else "refuses"
            if name in seconds:
                medians.setdefault(name, []).append((tokens, statistics.median(seconds[name])))
                rows += [
                    {"tokens": tokens, "way": name, "repeat": i, "seconds": s} for i, s in enumerate(seconds[name])
                ]
        shown.append(line)
    print_table(f"top {ratio:.0%}, {chip('cpu')}, numpy {np.__version__}, torch {torch.__version__}", shown)
    write_csv(rows, output / "top_ratio.csv")

    plt = pyplot()
    if plt is None:
        return
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, points in medians.items():
        axis.plot(*zip(*points, strict=True), "o-", label=name)
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds", title=f"The top {ratio:.0%}, {chip('cpu')}")
    axis.legend()
    figure.savefig(output / "top_ratio.png", dpi=120)


if __name__ == "__main__":
    typer.run(main)
