"""Stage b: verl's FSDP engines, the sparse head against the dense one, in every way that an update can be computed.

    python -m benchmarks.gpu.engines --device cuda
    python -m benchmarks.gpu.engines --device cpu          the same code on tiny shapes, in float32

For each way and two temperatures: log-probs and entropies of the pass before the update, the ratio of new to old
probabilities with unchanged weights, and the gradient, each with the LM head at every position and at the wanted ones
only. Then one gradient step in which the worker selects by the current policy's entropies. Needs verl.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer

from benchmarks.gpu.cases import Case, Measured, Stage, command, is_installed

if TYPE_CHECKING:
    from benchmarks.engine import Options, Shape

TEMPERATURES = (1.0, 0.6)
KEPT = 0.2
TABLE = "verl's FSDP engine, the LM head at wanted positions against all"


def shape_of(device: str) -> Shape:
    """The sizes of a device."""
    from benchmarks.engine import Shape

    if device == "cuda":
        return Shape(1024, 4, 151_936, rows=8, prompt=128, response=1024, per_micro_batch=2, ragged=True)
    return Shape(128, 2, 96, rows=4, prompt=5, response=12, per_micro_batch=2, ragged=True)


def ways(device: str) -> dict[str, tuple[Options, str]]:
    """The ways to compute an update by name: the options, and what is missing for them here."""
    from benchmarks.engine import Options

    base = Options(dtype="bf16" if device == "cuda" else "fp32", checkpointing=device == "cuda")
    no_gpu = "" if device == "cuda" else "needs a GPU"
    no_flash = no_gpu or ("" if is_installed("flash_attn") else "flash-attn is not installed")
    no_peft = "" if is_installed("peft") else "peft is not installed"
    return {
        "FSDP2, padded, sdpa": (base, ""),
        "FSDP1": (replace(base, strategy="fsdp"), ""),
        "bf16": (replace(base, dtype="bf16"), "" if device == "cpu" else "all other ways are in bf16"),
        "packed": (replace(base, packed=True), ""),
        "packed, flash attention": (replace(base, packed=True, attention="flash_attention_2"), no_flash),
        "torch.compile": (replace(base, packed=True, compiled=True), no_gpu),
        "checkpointing the other way": (replace(base, checkpointing=not base.checkpointing), ""),
        "activation offload": (replace(base, activation_offload=True), no_gpu),
        "parameter and optimizer offload": (replace(base, offload=True), ""),
        "LoRA": (replace(base, lora_rank=8), no_peft),
        "fused head, torch": (replace(base, packed=True, fused="torch"), ""),
        "fused head, triton": (replace(base, packed=True, fused="triton"), no_gpu),
    }


def several(device: str) -> dict[str, tuple[Options, str]]:
    """The ways that need two ranks."""
    base = ways(device)["FSDP2, padded, sdpa"][0]
    number = torch.cuda.device_count() if device == "cuda" else 2
    too_few = "" if number > 1 else "there is one GPU"
    no_flash = "" if is_installed("flash_attn") else "flash-attn is not installed"
    ulysses = replace(base, packed=True, sequence_parallel=2, attention="flash_attention_2")
    return {
        "two ranks": (base, too_few),
        "two ranks, Ulysses": (ulysses, too_few or no_flash),
    }


def cases(device: str, folder: Path) -> list[Case]:
    """The cases of the stage."""
    if not is_installed("verl"):
        return [Case("verl's engines", TABLE, lambda: (), "verl is not installed")]
    shape = shape_of(device)
    return [
        *(Case(name, TABLE, partial(one_rank, device, shape, name, options, folder), lacks, 150, bool(options.fused))
          for name, (options, lacks) in ways(device).items()),
        *(Case(name, TABLE, partial(two_ranks, device, shape, name, options, folder), lacks, 150)
          for name, (options, lacks) in several(device).items()),
    ]  # fmt: skip


def one_rank(device: str, shape: Shape, name: str, options: Options, folder: Path) -> Iterable[Measured]:
    """Compare on one rank, in this process."""
    with group(device, 0, 1, folder / f"store-{time.monotonic_ns()}"):
        return list(compare(device, shape, name, options, model_in(folder, shape)))


def two_ranks(device: str, shape: Shape, name: str, options: Options, folder: Path) -> Iterable[Measured]:
    """Compare on two ranks, each in a process of its own; the numbers are those of rank 0."""
    model_in(folder, shape)
    result, store = folder / "ranks.json", folder / f"store-{time.monotonic_ns()}"
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_rank, args=(device, rank, 2, store, shape, name, options, folder, result))
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise RuntimeError(f"the ranks ended with {[process.exitcode for process in ranks]}")
    return [Measured(**number) for number in json.loads(result.read_text())]


def _rank(
    device: str, rank: int, size: int, store: Path, shape: Shape, name: str, options: Options, folder: Path,
    result: Path,
) -> None:  # fmt: skip
    with group(device, rank, size, store):
        measured = list(compare(device, shape, name, options, model_in(folder, shape)))
    if rank == 0:
        result.write_text(json.dumps([asdict(number) for number in measured]))


@contextmanager
def group(device: str, rank: int, size: int, store: Path) -> Iterator[None]:
    """A process group of verl's kind."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def model_in(folder: Path, shape: Shape) -> str:
    """The folder of the model, which is saved at the first call."""
    from benchmarks.engine import save_model

    if not (folder / "model" / "config.json").exists():
        torch.manual_seed(0)
        save_model(shape, str(folder / "model"))
    return str(folder / "model")


def compare(device: str, shape: Shape, name: str, options: Options, model: str) -> Iterator[Measured]:
    """Build an engine, and compare its sparse and its dense passes."""
    from benchmarks.engine import build, keep_gradients, let_fsdp1_run_on_a_cpu, mini_batch
    from entropy_fork.core.rule import Rule, Selector
    from entropy_fork.verl.sparse_head import AT_KEPT, AT_RESPONSES, EVERYWHERE

    if device == "cpu" and options.strategy == "fsdp":
        let_fsdp1_run_on_a_cpu()
    engine = build(model, options)
    state: dict[str, Any] = {}
    keep_gradients(engine, state)
    for temperature in TEMPERATURES:
        row = f"{name}, T = {temperature}"
        torch.manual_seed(engine.get_data_parallel_rank())
        data = mini_batch(shape, options, temperature)
        old = {where: infer(engine, data, where) for where in (EVERYWHERE, AT_RESPONSES)}
        for number, what in enumerate(("log-probs", "entropies")):
            difference = (old[EVERYWHERE][number] - old[AT_RESPONSES][number]).abs().max()
            yield Measured(row, f"largest difference of {what}, nats", float(difference))
        weigh(data, old[AT_RESPONSES])
        updates = {where: update(engine, state, data, shape, where, device) for where in (EVERYWHERE, AT_KEPT)}
        for where, what in ((EVERYWHERE, "dense"), (AT_KEPT, "sparse")):
            yield Measured(row, f"ratio off by at most, {what} update", updates[where]["off"])
        dense, sparse = updates[EVERYWHERE], updates[AT_KEPT]
        yield Measured(row, "gradient, relative difference", distance(sparse["gradients"], dense["gradients"]))
        yield Measured(row, "the dense gradient again", distance(dense["again"], dense["gradients"]))
        for what in ("seconds", "peak, GiB"):
            if what in dense:
                yield Measured(row, f"dense update, {what}", dense[what])
                yield Measured(row, f"sparse update, {what}", sparse[what])
        reasons = "; ".join(engine._said)
        if reasons:
            raise RuntimeError(f"the sparse head was not used: {reasons}")
        for what, pool in (("official", "micro_batch"), ("current, mini_batch", "mini_batch")):
            rule = Rule(Selector(KEPT), "current", pool)
            yield Measured(row, f"kept by {what}", select_in_worker(engine, data, shape, rule))


def infer(engine: Any, data: Any, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of the responses, flat, on the CPU; from the pass before an update."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import response_from_nested

    from entropy_fork.verl.sparse_head import HEAD

    asked = data.copy()
    tu.assign_non_tensor(asked, calculate_entropy=True, **{HEAD: where})
    with engine.eval_mode():
        output = engine.infer_batch(asked)["model_output"]
    log_probs, entropy = (
        response_from_nested(output[key].cpu(), data["response_mask"]).values() for key in ("log_probs", "entropy")
    )
    return log_probs, entropy


def weigh(data: Any, old: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Put the old policy's numbers into the mini-batch, and the weights of the tokens with the highest entropies."""
    offsets = data["response_mask"].offsets()

    def nested(values: torch.Tensor) -> torch.Tensor:
        return torch.nested.nested_tensor_from_jagged(values, offsets)

    log_probs, entropy = old
    number = max(1, round(KEPT * len(entropy)))
    weights = torch.zeros(len(entropy))
    weights[entropy.float().topk(number).indices] = len(entropy) / number
    data["old_log_probs"], data["entropy"] = nested(log_probs), nested(entropy.float())
    data["rollout_is_weights"] = nested(weights)


def update(engine: Any, state: dict[str, Any], data: Any, shape: Shape, where: str, device: str) -> dict[str, Any]:
    """Two gradient steps that change no weight: gradients, how far a kept ratio is from 1, seconds, peak memory."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import response_from_nested

    from benchmarks.engine import loss
    from entropy_fork.verl.sparse_head import HEAD

    off = 0.0
    verls = loss(shape)

    def looking(model_output: dict[str, Any], data: Any, dp_group: Any = None) -> Any:
        nonlocal off
        new = response_from_nested(model_output["log_probs"].detach(), data["response_mask"]).values()
        kept = data["rollout_is_weights"].values() != 0
        if kept.any():
            difference = new.double() - data["old_log_probs"].values().double()
            off = max(off, float((difference[kept].exp() - 1).abs().max()))
        return verls(model_output=model_output, data=data, dp_group=dp_group)

    found: dict[str, Any] = {}
    asked = data.copy()
    tu.assign_non_tensor(asked, **{HEAD: where})
    for key in ("gradients", "again"):
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        with engine.train_mode():
            engine.train_batch(asked.copy(), loss_function=looking)
        if device == "cuda":
            torch.cuda.synchronize()
            found["peak, GiB"] = torch.cuda.max_memory_allocated() / 2**30
        found["seconds"] = time.perf_counter() - began
        found[key] = {name: gradient.float().cpu() for name, gradient in state["gradients"].items()}
    return found | {"off": off}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of two gradients, relative to the norm of the expected one."""
    if found.keys() != expected.keys():
        raise RuntimeError("the two gradients are of different parameters")
    squared = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    norm = sum(float(gradient.double().square().sum()) for gradient in expected.values())
    return float((squared / norm) ** 0.5)


def select_in_worker(engine: Any, data: Any, shape: Shape, rule: Any) -> float:
    """The share of the tokens that the worker keeps in a gradient step."""
    from verl.utils import tensordict_utils as tu

    from benchmarks.engine import loss
    from entropy_fork.verl.gradient_step import RULE
    from entropy_fork.verl.sparse_head import AT_RESPONSES, HEAD

    asked = data.copy()
    del asked["rollout_is_weights"]
    where = {} if rule.selected_in_loss else {HEAD: AT_RESPONSES}
    tu.assign_non_tensor(asked, **{RULE: rule}, **where)
    with engine.train_mode():
        metrics = engine.train_batch(asked, loss_function=loss(shape))["metrics"]
    kept, tokens = (sum(metrics[f"entropy_fork/{name}"]) for name in ("num_kept", "num_tokens"))
    return float(kept / tokens)


STAGE = Stage("b", "verl's FSDP engines, sparse against dense", "benchmarks.gpu.engines", cases)

if __name__ == "__main__":
    typer.run(command(STAGE))
