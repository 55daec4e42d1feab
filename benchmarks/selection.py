"""How much time and memory the driver needs to choose the tokens of a batch.

    python benchmarks/selection.py --tokens 84000000

The default is a batch of the paper's runs: 512 prompts × 16 responses of 10,240 tokens on average, in 16 mini-batches.
"""

from __future__ import annotations

import resource
import time
from itertools import pairwise
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from entropy_fork.common.progress import track
from entropy_fork.core.responses import Responses, Rule, pool_of_responses, select_in_pools, weigh_mini_batches
from entropy_fork.core.selection import Selector
from entropy_fork.core.tally import Tally

RULES = {
    "global": Rule(Selector(0.2)),
    "pool=batch": Rule(Selector(0.2), pool="batch"),
    "pool=response": Rule(Selector(0.2), pool="response"),
    "ties=threshold": Rule(Selector(0.2, ties="threshold")),
    "bottom80": Rule(Selector(0.8, "bottom")),
    "random20": Rule(Selector(0.2, "random")),
    "weight=soft": Rule(Selector(0.2), weight="soft"),
    "seq-mean-token-mean": Rule(Selector(0.2), loss_agg_mode="seq-mean-token-mean"),
}


def main(
    tokens: Annotated[int, typer.Option(help="Response tokens of the batch.")] = 512 * 16 * 10_240,
    responses: Annotated[int, typer.Option(help="Responses of the batch.")] = 512 * 16,
    mini_batches: Annotated[int, typer.Option(help="Gradient steps that it is cut into.")] = 16,
    seed: int = 0,
) -> None:
    """Time selection, weighting and counting of one training step, under each rule."""
    random = torch.Generator().manual_seed(seed)
    shares = torch.rand(responses, generator=random) + 0.01
    lengths = (shares / shares.sum() * tokens).long().clamp(min=1)
    # half of the tokens near zero, a long tail: the shape that the paper reports
    entropy = torch.empty(int(lengths.sum())).exponential_(generator=random).pow_(3).mul_(0.1)
    order = torch.arange(responses)
    batch = Responses(entropy, torch.ones(entropy.numel(), dtype=torch.bool), lengths, order, seeds=order)
    mini_batch = order * mini_batches // responses
    advantages = torch.randn(entropy.numel(), generator=random)
    before = _peak_gib()

    table = Table(title=f"{entropy.numel():,} tokens, {responses:,} responses, {torch.get_num_threads()} threads")
    for column in ("rule", "select, s", "weigh, s", "count, s", "kept"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for name, rule in track("rules", RULES.items()):
        times = [time.perf_counter()]
        kept, pools = select_in_pools(batch, pool_of_responses(rule.pool, mini_batch), rule.selector)
        times.append(time.perf_counter())
        weigh_mini_batches(batch, kept, mini_batch, rule)
        times.append(time.perf_counter())
        tally = Tally.of(kept, batch.entropy, batch.eligible, batch.lengths, pools, advantages)
        times.append(time.perf_counter())
        seconds = [f"{after - start:.2f}" for start, after in pairwise(times)]
        table.add_row(name, *seconds, f"{tally.num_kept / tally.num_tokens:.4f}")
    console = Console()
    console.print(table)
    console.print(f"peak memory {_peak_gib():.2f} GiB, of which {before:.2f} for the batch itself and Python")


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    typer.run(main)
