"""What a training step of the paper's size costs on the driver, between verl's advantages and the update.

    python benchmarks/driver_load.py                            # 512 prompts × 16 answers, every one of 20,480 tokens
    python benchmarks/driver_load.py --mean 8000                # answers as they come, cut off at 20,480
    python benchmarks/driver_load.py --mean 2000 --scores       # every score, on 16 million tokens
    python benchmarks/driver_load.py --prompts 128 --beside     # also measures verl's own part, which needs more memory

The answers are random. Everything else is as in a run. verl's TransferQueue, in its own processes, holds the answers in
the form in which verl's passes leave them (rows in nested tensors, an int64 mask). The trainer's own method fetches,
selects, counts, weighs and writes. It runs in a Ray worker, as verl's driver does, and each config gets a new worker.
Only the trainer's start is left out, because there is no model. A peak is the process's peak as the kernel reports it,
minus its memory before the call.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

os.environ.setdefault("VERL_PLATFORM", "cpu")  # before verl is imported, here and in every worker

import ray
import torch
import transfer_queue as tq
import typer
from report import CONSOLE, chip, print_table, write_csv
from tensordict import NonTensorStack, TensorDict

from entropy_fork.common.progress import task
from entropy_fork.core.scores import SCORES

CONFIGS = {
    "global": ["+entropy_fork=global"],
    "global, 1 mini-batch": [
        "+entropy_fork=global",
        "actor_rollout_ref.actor.ppo_mini_batch_size=${data.train_batch_size}",
    ],
    "pool=batch": ["+entropy_fork=global", "entropy_fork.pool=batch"],
    "pool=response": ["+entropy_fork=global", "entropy_fork.pool=response"],
    "weight=soft": ["+entropy_fork=global", "entropy_fork.weight=soft"],
    "seq-mean-token-mean": ["+entropy_fork=global", "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"],
    "random20, pool=batch": ["+entropy_fork=random20", "entropy_fork.pool=batch"],
    "official": ["+entropy_fork=official"],
    "archer": ["+entropy_fork=archer"],
    "ar": ["+entropy_fork=ar"],
    "entropy_advantage": ["+entropy_fork=entropy_advantage"],
    "matched_random": ["+entropy_fork=matched_random"],
}
#: what ``--scores`` measures: every built-in score for which the made-up batch has the fields
BY_SCORE = {
    f"score={name}": ["+entropy_fork=global", f"entropy_fork.score={name}"]
    for name, score in SCORES.items()
    if "sum_pi_squared" not in score.fields
}

#: the number of prompts whose answers are made up and put at a time
AT_ONCE = 32

#: tokens of each prompt: the limit of the paper's runs
PROMPT = 2048


def compose(overrides: list[str]) -> Any:
    """verl's config as main_ppo composes it."""
    import verl.trainer.main_ppo as main_ppo
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(Path(main_ppo.__file__).parent / "config"), version_base=None):
        return compose("ppo_trainer", overrides=overrides)


def make_up(answers: int, mean: int | None, longest: int, random: torch.Generator) -> torch.Tensor:
    """Lengths of answers, int64: all of the greatest length; or log-normal with this mean, cut off at that length."""
    if mean is None:
        return torch.full((answers,), longest)
    sigma = 0.7  # a few percent are cut off at 2.5 times the mean, as in the paper's runs
    lengths = torch.empty(answers).log_normal_(generator=random, mean=0.0, std=sigma)
    return (lengths / lengths.mean() * mean).long().clamp(1, longest)


def put(prompts: int, n: int, lengths: torch.Tensor, random: torch.Generator, with_scores: bool) -> list[str]:
    """Write into the queue what verl's passes leave there. Returns the keys, in the order of the rows."""
    keys = []
    for first in range(0, prompts, AT_ONCE):
        rows = slice(first * n, min(first + AT_ONCE, prompts) * n)
        uids = [str(uuid.uuid4()) for _ in range((rows.stop - rows.start) // n)]
        part = [f"{uid}_{number}_0" for uid in uids for number in range(n)]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths[rows].cumsum(0)])
        total = int(offsets[-1])
        ends = offsets[1:] - 1
        # half of the entropies near zero and a long tail, the shape that the paper reports
        entropy = torch.empty(total).exponential_(generator=random).pow_(3).mul_(0.1)
        fields = {"response_mask": torch.ones(total, dtype=torch.int64), "entropy": entropy, "old_log_probs": -entropy}
        advantages = torch.randn(len(part), generator=random)
        if with_scores:
            fields["rm_scores"] = torch.zeros(total).index_copy_(0, ends, advantages.sign())
        else:
            fields["rollout_log_probs"] = -1.01 * entropy
            fields["advantages"] = advantages.repeat_interleave(lengths[rows])
        batch: dict[str, Any] = {
            name: torch.nested.nested_tensor_from_jagged(values, offsets) for name, values in fields.items()
        }
        asked = torch.randint(0, 150_000, (len(uids), PROMPT), generator=random).repeat_interleave(n, dim=0)
        batch["prompts"] = torch.nested.as_nested_tensor(list(asked), layout=torch.jagged)
        batch["index"] = NonTensorStack(*(first + row // n for row in range(len(part))))
        batch["uid"] = NonTensorStack(*(uid for uid in uids for _ in range(n)))
        tq.kv_batch_put(keys=part, partition_id="train", fields=TensorDict(batch, batch_size=len(part)))
        keys += part
    return keys


class Meter:
    """Seconds of each stage, and the peak of this process's memory in it."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, float, int]] = []
        self.before = _memory("VmRSS")
        self.peak = 0
        self._restart()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._restart()
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.stages.append((name, seconds, self._restart()))

    def timed(self, name: Callable[..., str] | str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name if isinstance(name, str) else name(*args, **kwargs)):
                return function(*args, **kwargs)

        return run

    def _restart(self) -> int:
        peak = _memory("VmHWM") - self.before
        self.peak = max(self.peak, peak)
        Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's peak
        return peak


def _memory(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


@ray.remote(max_calls=1)
def driver(overrides: list[str], keys: list[str], ranks: int, beside: bool) -> dict[str, Any]:
    """One training step's part on the driver: verl's advantages (``beside``), then the token weights."""
    import verl.trainer.ppo.v1  # noqa: F401  (brings our trainers with it)
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY, PPOTrainer

    from entropy_fork.verl import masking, queued_batch
    from entropy_fork.verl.config import read_config

    tq.init()
    this: Any = object.__new__(TRAINER_REGISTRY["sync"])  # without a model, without workers
    this.config = compose(overrides)
    this.global_steps = 1
    this.actor_rollout_wg = SimpleNamespace(_query_dispatch_info=lambda _: range(ranks))
    fields = [
        "advantages", "entropy", "index", "old_log_probs", "prompts", "response_mask", "rm_scores", "rollout_log_probs",
        "uid",
    ]  # fmt: skip
    batch = tq.KVBatchMeta(keys=keys, tags=[{} for _ in keys], partition_id="train", fields=fields)
    metrics: dict[str, float] = {}
    if beside:
        meter = Meter()
        with meter.stage("verl's advantages"):
            batch = PPOTrainer._compute_advantage(this, batch, metrics)
        return {"stages": meter.stages, "peak": meter.peak, "seconds": meter.stages[0][1], "kept": None}

    fork_config = read_config(this.config)
    assert fork_config is not None
    how = masking.masking_of(this.config, fork_config)
    meter = Meter()
    get, write = tq.kv_batch_get, tq.kv_batch_put
    tq.kv_batch_get = meter.timed(lambda **call: f"fetch {', '.join(call['select_fields'])}", get)
    tq.kv_batch_put = meter.timed("write", write)
    queued_batch.identify = meter.timed("identify", queued_batch.identify)
    masking.Tokens.score = meter.timed("score", masking.Tokens.score)
    masking.choose = meter.timed("choose", masking.choose)
    masking.weigh_mini_batches = meter.timed("weigh", masking.weigh_mini_batches)
    masking.Tally.of = meter.timed("count", masking.Tally.of)
    start = time.perf_counter()
    this._entropy_fork_write_weights(how, batch, masking.Update(1, 0, this.actor_rollout_wg), metrics)
    seconds = time.perf_counter() - start
    meter._restart()
    return {
        "stages": meter.stages,
        "peak": meter.peak,
        "seconds": seconds,
        "kept": metrics.get("entropy_fork/kept_ratio"),
    }


def main(
    prompts: int = 512,
    n: Annotated[int, typer.Option(help="Answers per prompt.")] = 16,
    longest: Annotated[int, typer.Option(help="Tokens of the longest answer.")] = 20_480,
    mean: Annotated[int | None, typer.Option(help="Mean tokens of an answer; all the longest if not given.")] = None,
    ranks: Annotated[int, typer.Option(help="Data-parallel ranks that the rows are dealt out to.")] = 8,
    mini_batch: Annotated[int, typer.Option(help="Prompts of a gradient step.")] = 32,
    only: Annotated[list[str] | None, typer.Option(help="Of the configs, by name.")] = None,
    beside: Annotated[bool, typer.Option(help="Also measure what verl computes right before.")] = False,
    scores: Annotated[bool, typer.Option(help="Measure every built-in score instead of the other configs.")] = False,
    output: Annotated[Path | None, typer.Option(help="CSV file to write.")] = None,
    seed: int = 0,
) -> None:
    """Make up a batch, let the driver choose its tokens under each config, and print time and memory."""
    random = torch.Generator().manual_seed(seed)
    lengths = make_up(prompts * n, mean, longest, random)
    tokens = int(lengths.sum())
    base = [
        f"data.train_batch_size={prompts}", f"actor_rollout_ref.rollout.n={n}", "algorithm.adv_estimator=grpo",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={mini_batch}",
    ]  # fmt: skip
    folder = tempfile.mkdtemp(prefix="ef")  # short: Ray puts sockets there
    known = BY_SCORE if scores else CONFIGS
    configs = {name: known[name] for name in only or known}
    rows: list[dict[str, Any]] = []
    try:
        ray.init(
            num_cpus=16,
            include_dashboard=False,
            object_store_memory=2**27,
            _temp_dir=folder,
            log_to_driver=False,
            logging_level="error",
        )
        tq.init(compose([*base, "transfer_queue.backend.SimpleStorage.num_data_storage_units=2"]).transfer_queue)
        with task("making up answers", console=CONSOLE):
            keys = put(prompts, n, lengths, random, with_scores=beside)
        if beside:
            configs = {"verl": CONFIGS["global"], **configs}
        with task("configs", len(configs), console=CONSOLE) as shown:
            for name, overrides in configs.items():
                shown.update(note=name)
                measured = ray.get(driver.remote(base + overrides, keys, ranks, name == "verl"))
                rows += [
                    {"config": name, "stage": stage, "seconds": seconds, "peak_bytes": peak}
                    for stage, seconds, peak in [*measured["stages"], ("all", measured["seconds"], measured["peak"])]
                ]
                print_stages(name, rows, tokens)
                shown.advance()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    title = f"{tokens:,} tokens, {len(keys):,} answers, {chip('cpu')}"
    print_table(title, [_line(row, tokens) for row in rows if row["stage"] == "all"])
    if output is not None:
        write_csv([{**row, "tokens": tokens} for row in rows], output)


def print_stages(config: str, rows: list[dict[str, Any]], tokens: int) -> None:
    """Print the stages of one config, before the next one is measured."""
    print_table(config, [_line(row, tokens) for row in rows if row["config"] == config])


def _line(row: dict[str, Any], tokens: int) -> dict[str, str]:
    return {
        "config": row["config"],
        "stage": row["stage"],
        "seconds": f"{row['seconds']:.2f}",
        "s per 100M tokens": f"{row['seconds'] / tokens * 1e8:.2f}",
        "peak, GiB": f"{row['peak_bytes'] / 2**30:.2f}",
        "bytes per token": f"{row['peak_bytes'] / tokens:.1f}",
    }


if __name__ == "__main__":
    typer.run(main)
