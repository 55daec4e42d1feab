"""What the LM head of an update costs: at all positions as verl computes it, with verl's fused head, at kept positions.

    python benchmarks/lm_head.py                                                      on a CPU
    python benchmarks/lm_head.py --device cuda --dtype bfloat16 --hidden 4096 --layers 4 --tokens 16384

The model is a Qwen3 of a few layers with the real vocabulary. Every token is a response token, and a share ρ of them is
kept. It measures the seconds of the head alone and of the whole step (forward and backward), and the peak of the memory
that the head allocates. It also runs without verl, with torch and transformers only: then verl's functions are left
out, and dense and kept rows use torch's cross entropy.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from live_bytes import LiveBytes
from report import chip, median_and_spread, print_table, pyplot, seconds_in_turn, write_csv
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from transformers import Qwen3Config, Qwen3ForCausalLM

RATIOS = (1.0, 0.5, 0.2, 0.1)
VOCABULARY = 151_936

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def torchs_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the labels with nothing but torch."""
    return -cross_entropy(linear(hidden, weight), labels, reduction="none")


def heads() -> tuple[Head, Head | None, Head]:
    """The heads by name (dense, fused, for kept rows): each maps (hidden, weight, labels) to log-probabilities."""
    try:
        from verl.utils.experimental.torch_functional import FusedLinearForPPO
        from verl.utils.torch_functional import logprobs_from_logits

        from entropy_fork.verl.sparse_head import log_probs_with_gradient
    except ImportError:
        return torchs_cross_entropy, None, torchs_cross_entropy
    return (
        lambda hidden, weight, labels: logprobs_from_logits(linear(hidden, weight), labels),
        lambda hidden, weight, labels: FusedLinearForPPO()(hidden, weight, labels, 1.0)[0],
        lambda hidden, weight, labels: log_probs_with_gradient(hidden, weight, labels, 1.0),
    )


def make_model(device: str, dtype: str, hidden: int, layers: int, vocabulary: int = VOCABULARY) -> Any:
    """A Qwen3 with random weights and an LM head of its own; a hidden size of 4096 makes Qwen3-8B's layers."""
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, num_key_value_heads=max(1, hidden // 512), head_dim=128,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        return Qwen3ForCausalLM(config).to(getattr(torch, dtype))


def kept_tokens(tokens: int, share: float, device: str) -> Tensor:
    """A random share of the tokens: bool, shape (tokens,)."""
    kept = torch.zeros(tokens, dtype=torch.bool, device=device)
    kept[torch.randperm(tokens, device=device)[: round(share * tokens)]] = True
    return kept


class Step:
    """A gradient step on random tokens, of which ``kept`` have a weight.

    Args:
        head: computes log-probabilities.
        rows: the positions at which it computes them; None for all.
        kept: bool, shape (tokens,).
    """

    def __init__(self, model: Any, tokens: Tensor, head: Head, rows: Tensor | None, kept: Tensor):
        self.model, self.tokens, self.head, self.rows, self.kept = model, tokens, head, rows, kept
        self.hidden = model.model(tokens).last_hidden_state[0].detach().requires_grad_()

    def whole(self) -> None:
        """Forward and backward through the model."""
        self.model.zero_grad(set_to_none=True)
        self._loss(self.model.model(self.tokens).last_hidden_state[0]).backward()

    def only_head(self) -> None:
        """Forward and backward through the head, from given hidden states."""
        self.model.lm_head.weight.grad = self.hidden.grad = None
        self._loss(self.hidden).backward()

    def _loss(self, hidden: Tensor) -> Tensor:
        labels = self.tokens[0].roll(-1)
        weight = self.model.lm_head.weight
        if self.rows is None:
            log_probs = self.head(hidden, weight, labels)[self.kept]
        else:
            log_probs = self.head(hidden[self.rows], weight, labels[self.rows])
        return -log_probs.float().sum() / len(log_probs)


def head_bytes(step: Step, device: str) -> int:
    """The peak of logits and everything computed from them, forward and backward, without the weight's gradient.

    That gradient is as large as the weight, for any number of rows."""
    weight = step.model.lm_head.weight.requires_grad_(False)
    try:
        step.only_head()
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step.only_head()
            return torch.cuda.max_memory_allocated() - before
        with LiveBytes([weight, step.hidden, step.hidden.grad, *step.model.parameters()]) as live:
            step.only_head()
        return live.peak
    finally:
        weight.requires_grad_(True)


def main(
    device: str = "cpu",
    dtype: Annotated[str, typer.Option(help="Of weights and logits.")] = "float32",
    hidden: Annotated[int, typer.Option(help="Hidden size; Qwen3-8B has 4096.")] = 1024,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of a micro-batch.")] = 1024,
    ratio: Annotated[
        list[float] | None, typer.Option(help="ρ; may be repeated. By default 1.0, 0.5, 0.2, 0.1.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Measurements of each side.")] = 3,
    output: Annotated[Path, typer.Option(help="Folder of lm_head-DEVICE.csv and .png.")] = Path("docs/lab/performance"),
) -> None:
    """Measure, print the table, write CSV and plot."""
    torch.manual_seed(0)
    model = make_model(device, dtype, hidden, layers)
    batch = torch.randint(VOCABULARY, (1, tokens), device=device)
    dense, fused, sparse = heads()
    steps: dict[str, Step] = {}
    ratios = ratio or list(RATIOS)
    for share in ratios:
        kept = kept_tokens(tokens, share, device)
        steps[f"kept rows, ρ = {share}"] = Step(model, batch, sparse, kept.nonzero().squeeze(1), kept)
        if share == ratios[0]:
            steps = {"dense": Step(model, batch, dense, None, kept), **steps}
            if fused is not None:
                steps["fused"] = Step(model, batch, fused, None, kept)
    head_seconds = seconds_in_turn({name: step.only_head for name, step in steps.items()}, repeats, device)
    step_seconds = seconds_in_turn({name: step.whole for name, step in steps.items()}, repeats, device)
    memory = {name: head_bytes(step, device) for name, step in steps.items()}

    def relative(values: dict[str, list[float]], name: str) -> str:
        return f"{statistics.median(values[name]) / statistics.median(values['dense']):.3f}"

    shown = [
        {
            "head": name,
            "head, s": median_and_spread(head_seconds[name]),
            "of dense": relative(head_seconds, name),
            "step, s": median_and_spread(step_seconds[name]),
            "of dense ": relative(step_seconds, name),
            "logits, GiB": f"{memory[name] / 2**30:.3f}",
            "of dense  ": f"{memory[name] / memory['dense']:.3f}",
        }
        for name in steps
    ]
    where = chip(device)
    print_table(
        f"{where}: {tokens} tokens, hidden {hidden}, {layers} layers, {dtype}, torch {torch.__version__}", shown
    )
    rows = [
        {"chip": where, "dtype": dtype, "tokens": tokens, "hidden": hidden, "layers": layers, "head": name,
         "repeat": i, "head_seconds": head_seconds[name][i], "step_seconds": step_seconds[name][i],
         "head_bytes": memory[name]}
        for name in steps for i in range(repeats)
    ]  # fmt: skip
    write_csv(rows, output / f"lm_head-{device}.csv")
    plot(steps, head_seconds, memory, ratios, where, output / f"lm_head-{device}.png")


def plot(
    names: Any, seconds: dict[str, list[float]], memory: dict[str, int], ratios: list[float], where: str, file: Path
) -> None:
    """Plot time and memory of the head over ρ, with lines for the heads that do not depend on ρ."""
    plt = pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    ours = [name for name in names if name.startswith("kept")]
    values = (
        ("seconds, forward and backward", {n: statistics.median(s) for n, s in seconds.items()}),
        ("GiB at the peak", {n: m / 2**30 for n, m in memory.items()}),
    )
    for axis, (label, by_name) in zip(axes, values, strict=True):
        axis.plot(ratios, [by_name[name] for name in ours], "o-", label="kept rows")
        axis.plot([0, 1], [0, by_name["dense"]], ":", color="gray", label="in proportion")
        for name, style in (("dense", "-"), ("fused", "--")):
            if name in by_name:
                axis.axhline(by_name[name], linestyle=style, color="tab:red", label=f"verl, {name}")
        axis.set(xlabel="kept share ρ", ylabel=label, xlim=(0, 1.03), ylim=(0, None))
        axis.legend()
    figure.suptitle(f"LM head of an update, {where}", fontsize=10)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    typer.run(main)
