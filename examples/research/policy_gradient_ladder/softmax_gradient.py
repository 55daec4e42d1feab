"""Measure how the size of a position's gradient depends on its entropy: near zero entropy, the gradient is near zero.

The policy gradient reaches the logits z of a position as Ψ_t (e_a - p): the sampled token's unit vector minus the
probabilities. Its expected squared norm is E_a |e_a - p|² = 1 - Σ_j p_j², which is at most the entropy H, because
1 - p_j ≤ -log p_j. This script measures it on a model's own answers, and prints the share that the top ρ tokens have.
"""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import torch
import typer
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from entropy_fork.core.rule import Selector
from entropy_fork.core.selection import select_tokens
from examples.tiny_world import Rollout, roll_out

EDGES = (0.0, 0.01, 0.1, 0.5, 1.0, float("inf"))


def expected_square(logits: Tensor) -> Tensor:
    """``E_a |∂ log p_a / ∂z|²`` of each distribution: (…, vocabulary) to (…,)."""
    return 1 - logits.softmax(dim=-1).square().sum(dim=-1)


@torch.inference_mode()
def measure(model: torch.nn.Module, rollouts: list[Rollout]) -> tuple[Tensor, Tensor]:
    """Entropy (nats) and expected square at each response token of all answers, each of shape (tokens,)."""
    entropies, squares = [], []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        first = len(rollout.prompt_ids) - 1
        logits = model(input_ids=ids).logits[0, first:-1].float()
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
        squares.append(expected_square(logits))
    return torch.cat(entropies), torch.cat(squares)


def main(
    model: Annotated[Path, typer.Option(help="The model directory, with its tokenizer.")] = Path(".demo/world/model"),
    data: Annotated[Path, typer.Option(help="A parquet file of problems.")] = Path(".demo/world/test.parquet"),
    top_ratio: Annotated[float, typer.Option(min=0.001, max=1, help="ρ")] = 0.2,
    output: Annotated[Path, typer.Option(help="Folder of the CSV file and the plot.")] = Path(".demo/softmax_gradient"),
    seed: int = 0,
) -> None:
    """Sample an answer to each problem and measure every position."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    language_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False).eval()
    prompts = [messages[-1]["content"] for messages in Dataset.from_parquet(str(data))["prompt"]]
    entropy, square = measure(language_model, roll_out(language_model, tokenizer, prompts))

    table = Table("entropy (nats)", "share of tokens", "mean of 1 - Σp²", "share of its sum", title=f"{model}")
    rows = []
    for low, high in itertools.pairwise(EDGES):
        inside = (entropy >= low) & (entropy < high)
        share, part = inside.float().mean(), square[inside].sum() / square.sum()
        mean = square[inside].mean() if inside.any() else torch.tensor(0.0)
        rows.append([f"{low:g} to {high:g}", f"{share:.1%}", f"{mean:.5f}", f"{part:.1%}"])
    kept = select_tokens(entropy, torch.ones_like(entropy, dtype=torch.bool), torch.tensor([len(entropy)]),
                         Selector(top_ratio)).kept  # fmt: skip
    for name, chosen in ((f"top {top_ratio:.0%}", kept), ("the rest", ~kept)):
        rows.append([name, f"{chosen.float().mean():.1%}", f"{square[chosen].mean():.5f}",
                     f"{square[chosen].sum() / square.sum():.1%}"])  # fmt: skip
    for row in rows:
        table.add_row(*row)
    Console().print(table)

    output.mkdir(parents=True, exist_ok=True)
    with (output / "softmax_gradient.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["entropy", "share_of_tokens", "mean_expected_square", "share_of_sum"])
        writer.writerows(rows)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.scatter(entropy.clamp(min=1e-6), square.clamp(min=1e-7), s=4, alpha=0.3, label="positions of real answers")
    line = torch.logspace(-6, 1, 50)
    axes.plot(line, line.clamp(max=1), color="black", linewidth=1, label="the bound min(H, 1)")
    axes.set(xscale="log", yscale="log", xlabel="entropy H (nats)", ylabel="E|∂ log π / ∂z|² = 1 - Σp²")
    axes.legend()
    figure.savefig(output / "softmax_gradient.png", dpi=130)


if __name__ == "__main__":
    typer.run(main)
