"""Stage a: the LM head, the pass for entropies and the selection by themselves. Needs torch and transformers.

    python -m benchmarks.gpu.kernels --device cuda
    python -m benchmarks.gpu.kernels --device cpu          the same code on tiny shapes

On a GPU the head is Qwen3-8B's, in bfloat16, on four decoder layers of the same model. Where verl is installed, the
functions are verl's and this package's own; without it, dense and kept rows use torch's cross entropy, and verl's fused
head is not measured. verl's dense log-probabilities loop over the rows where flash-attn is not installed, which takes
long. So torch's cross entropy of all rows has a row of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from lm_head import RATIOS, Head, Step, head_bytes, heads, kept_tokens, make_model, torchs_cross_entropy
from report import seconds_in_turn
from top_ratio import kthvalue, ours, topk
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu.cases import Case, Measured, Stage, command, is_installed
from entropy_fork.core.entropy import entropies
from entropy_fork.core.lm_head import log_probs_entropy_and_rank, logits_of


@dataclass(frozen=True)
class Shape:
    """The sizes of a device.

    Attributes:
        dtype: of weights and logits.
        hidden, layers, vocabulary: of the model.
        tokens: of a micro-batch.
        pools: numbers of tokens to select from.
        repeats: measurements of each side.
    """

    dtype: str
    hidden: int
    layers: int
    vocabulary: int
    tokens: int
    pools: tuple[int, ...]
    repeats: int


SHAPES = {
    "cuda": Shape("bfloat16", 4096, 4, 151_936, 16_384, (16_384, 2**20, 2**24), 5),
    "cpu": Shape("float32", 128, 1, 512, 96, (1024,), 1),
}

DENSE, DENSE_TORCH, FUSED = "dense", "dense, torch's cross entropy", "verl's fused head"
HEAD, ROWS = "LM head of an update", "A row of logits, computed with fewer other rows"
PASS, SELECTION = "Log-probs and entropies without gradients", "Top 20% of the tokens"


def cases(device: str, folder: Path) -> list[Case]:
    """The cases of the stage."""
    shape = SHAPES[device]
    no_verl = "" if is_installed("verl") else "verl is not installed"
    return [
        Case(DENSE, HEAD, partial(lm_head, device, shape, DENSE, 1.0)),
        Case(DENSE_TORCH, HEAD, partial(lm_head, device, shape, DENSE_TORCH, 1.0)),
        Case(FUSED, HEAD, partial(lm_head, device, shape, FUSED, 1.0), no_verl),
        *(Case(f"kept rows, ρ = {share}", HEAD, partial(lm_head, device, shape, f"kept rows, ρ = {share}", share))
          for share in RATIOS),
        Case("rows", ROWS, partial(rows_alone, device, shape)),
        Case("512 rows at a time", PASS, partial(entropy_pass, device, shape, True)),
        Case("all rows at once", PASS, partial(entropy_pass, device, shape, False)),
        *(Case(f"{tokens:,} tokens", SELECTION, partial(selection, device, shape, tokens)) for tokens in shape.pools),
    ]  # fmt: skip


def lm_head(device: str, shape: Shape, name: str, share: float) -> Iterator[Measured]:
    """Seconds of the head and of the whole step, and the peak of the head's memory."""
    torch.manual_seed(0)
    model = make_model(device, shape.dtype, shape.hidden, shape.layers, shape.vocabulary)
    batch = torch.randint(shape.vocabulary, (1, shape.tokens), device=device)
    dense, fused, sparse = heads()
    kept = kept_tokens(shape.tokens, share, device)
    at_all_rows: dict[str, Head | None] = {DENSE: dense, DENSE_TORCH: torchs_cross_entropy, FUSED: fused}
    head = at_all_rows.get(name, sparse)
    assert head is not None
    rows = None if name in at_all_rows else kept.nonzero().squeeze(1)
    step = Step(model, batch, head, rows, kept)
    sides = {"head, ms": step.only_head, "step, ms": step.whole}
    for measure, seconds in seconds_in_turn(sides, shape.repeats, device).items():
        for value in seconds:
            yield Measured(name, measure, value * 1000)
    yield Measured(name, "logits, GiB", head_bytes(step, device) / 2**30)


def rows_alone(device: str, shape: Shape) -> Iterator[Measured]:
    """Whether a row of logits depends on how many rows are computed with it.

    If it does, an old log-probability and a new one can differ although no weight has changed: the log-prob pass and
    the update compute different numbers of rows.
    """
    torch.manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    hidden = torch.randn(shape.tokens, shape.hidden, device=device, dtype=dtype)
    weight = torch.randn(shape.vocabulary, shape.hidden, device=device, dtype=dtype) / shape.hidden**0.5
    labels = torch.randint(shape.vocabulary, (shape.tokens,), device=device)
    together = linear(hidden, weight)
    few = max(1, min(512, shape.tokens // 2))
    for number in sorted({64, few, max(1, shape.tokens // 5)}):
        if number > shape.tokens:
            continue
        rows = torch.randperm(shape.tokens, device=device)[:number].sort().values
        alone, among = logits_of(hidden[rows], weight), together[rows]
        name = f"{number:,} rows alone, and among {shape.tokens:,}"
        yield Measured(name, "rows with equal bits", float((alone == among).all(-1).float().mean()))
        difference = _log_probs(alone, labels[rows]) - _log_probs(among, labels[rows])
        yield Measured(name, "largest difference of log-probs, nats", float(difference.abs().max()))


def _log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1).gather(1, labels[:, None]).squeeze(1)


def entropy_pass(device: str, shape: Shape, in_parts: bool) -> Iterator[Measured]:
    """Seconds and peak memory of log-probs and entropies of all rows, and how far the entropies are from float64's."""
    torch.manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    hidden = torch.randn(shape.tokens, shape.hidden, device=device, dtype=dtype)
    weight = torch.randn(shape.vocabulary, shape.hidden, device=device, dtype=dtype) * (3 / shape.hidden**0.5)
    labels = torch.randint(shape.vocabulary, (shape.tokens,), device=device)

    def parts() -> Any:
        if not is_installed("verl"):
            return log_probs_entropy_and_rank(hidden, weight, labels)
        from entropy_fork.verl.sparse_head import log_probs_and_entropy

        with torch.no_grad():
            return log_probs_and_entropy(hidden, weight, labels, 1.0)

    def at_once() -> Any:
        with torch.no_grad():
            logits = linear(hidden, weight).float()
            return _log_probs(logits, labels), entropies(logits)

    name, side = ("512 rows at a time", parts) if in_parts else ("all rows at once", at_once)
    if device != "cpu":
        side()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    entropy = side()[1]
    if device != "cpu":
        yield Measured(name, "peak, GiB", (torch.cuda.max_memory_allocated() - before) / 2**30)
    exact = entropies(linear(hidden[:64], weight).double())
    yield Measured(name, "largest error of 64 entropies, nats", float((entropy[:64].double() - exact).abs().max()))
    for value in seconds_in_turn({name: side}, shape.repeats, device)[name]:
        yield Measured(name, "ms", value * 1000)


def selection(device: str, shape: Shape, tokens: int) -> Iterator[Measured]:
    """Seconds to choose from entropies that are on the device: this package's exact selection, and torch's ways."""
    random = torch.Generator(device=device).manual_seed(tokens)
    entropy = torch.rand(tokens, generator=random, device=device).sub_(0.5).clamp_(min=0).mul_(4)
    lengths = torch.full((tokens // 1024,), 1024)
    eligible = torch.ones(tokens, dtype=torch.bool, device=device)
    sides = {
        "select_tokens, to the CPU and exact": partial(ours, entropy, 0.2, lengths, eligible),
        "torch.topk": partial(topk, entropy, 0.2, True),
        "torch.topk(sorted=False)": partial(topk, entropy, 0.2, False),
        "torch.kthvalue": partial(kthvalue, entropy, 0.2),
        "torch.quantile": partial(torch.quantile, entropy, 0.8),
    }
    for way, seconds in seconds_in_turn(sides, shape.repeats, device).items():
        for value in seconds:
            yield Measured(f"{tokens:,} tokens: {way}", "ms", value * 1000)


STAGE = Stage("a", "head, entropies and selection alone", "benchmarks.gpu.kernels", cases)

if __name__ == "__main__":
    typer.run(command(STAGE))
