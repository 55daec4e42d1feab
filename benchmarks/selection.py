"""How much time and memory the driver needs to choose the tokens of a batch.

    python benchmarks/selection.py --tokens 84000000
    python benchmarks/selection.py --tokens 16000000 --what scores

The default is a batch of the paper's runs: 512 prompts × 16 responses of 10,240 tokens on average, in 16 mini-batches.
"""

from __future__ import annotations

import resource
import time
from dataclasses import replace
from itertools import pairwise
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from entropy_fork.common.progress import track
from entropy_fork.core.responses import Responses, choose, pool_of_responses, weigh_mini_batches
from entropy_fork.core.rule import Rule, Selector
from entropy_fork.core.scores import SCORES
from entropy_fork.core.scoring import Tokens
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
    what: Annotated[str, typer.Option(help="What to compare: rules or scores.")] = "rules",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the fastest time of each is shown.")] = 3,
    seed: int = 0,
) -> None:
    """Time scoring, selection, weighting and counting of one training step, under each rule or with each score."""
    random = torch.Generator().manual_seed(seed)
    shares = torch.rand(responses, generator=random) + 0.01
    lengths = (shares / shares.sum() * tokens).long().clamp(min=1)
    total = int(lengths.sum())
    # half of the tokens near zero, a long tail: the shape that the paper reports
    entropy = torch.empty(total).exponential_(generator=random).pow_(3).mul_(0.1)
    order = torch.arange(responses)
    batch = Responses(entropy, torch.ones(total, dtype=torch.bool), lengths, order, seeds=order)
    mini_batch = order * mini_batches // responses
    advantages = torch.randn(responses, generator=random).repeat_interleave(lengths)
    fields = {"entropy": entropy, "advantage": advantages}
    if what == "scores":
        log_prob = -torch.empty(total).exponential_(generator=random).mul_(entropy)
        fields |= {"log_prob": log_prob, "rollout_log_prob": log_prob * 1.01, "sum_pi_squared": (-entropy).exp()}
    seen = Tokens(fields, batch.eligible, lengths, order, mini_batch)
    before = _peak_gib()
    rules = RULES if what == "rules" else {name: Rule(Selector(0.2), score=name) for name in SCORES}
    best = {name: [float("inf")] * len(STAGES) for name in rules}
    kept = {}
    for _ in range(repeats):  # in turn, so that a busy moment of the machine hits all alike
        for name, rule in track("rules", rules.items()):
            seconds, kept[name] = _step(batch, seen, mini_batch, rule)
            best[name] = [min(pair) for pair in zip(best[name], seconds, strict=True)]
    reference = sum(next(iter(best.values())))
    table = Table(title=f"{total:,} tokens, {responses:,} responses, {torch.get_num_threads()} threads")
    for column in (what.rstrip("s"), *(f"{stage}, s" for stage in STAGES), "relative", "kept"):
        table.add_column(column, justify="left" if column == what.rstrip("s") else "right", no_wrap=True)
    for name, seconds in best.items():
        share = f"{sum(seconds) / reference:.2f}"
        table.add_row(name, *(f"{value:.2f}" for value in seconds), share, f"{kept[name]:.4f}")
    console = Console(width=100)
    console.print(table)
    console.print(f"peak memory {_peak_gib():.2f} GiB, of which {before:.2f} for the batch itself and Python")


#: the stages of a step on the driver
STAGES = ("score", "select", "weigh", "count")


def _step(batch: Responses, seen: Tokens, mini_batch: torch.Tensor, rule: Rule) -> tuple[list[float], float]:
    """Seconds of each stage, and the share that was kept."""
    times = [time.perf_counter()]
    score = seen.score(SCORES[rule.score]) if rule.score != "entropy" else None
    times.append(time.perf_counter())
    scored = replace(batch, score=score)
    choice = choose(scored, pool_of_responses(rule.pool, mini_batch), rule)
    times.append(time.perf_counter())
    weigh_mini_batches(scored, choice, mini_batch, rule)
    times.append(time.perf_counter())
    advantages = seen.fields["advantage"]
    tally = Tally.of(choice.kept, batch.entropy, batch.eligible, batch.lengths, choice.pools, advantages)
    times.append(time.perf_counter())
    return [after - start for start, after in pairwise(times)], tally.num_kept / tally.num_tokens


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    typer.run(main)
