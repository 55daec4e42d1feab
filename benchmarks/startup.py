"""What a run of one step costs with and without the fork server: time, processor time of all processes, memory.

    python -m examples.cpu_demo.build --output .demo/world
    python benchmarks/startup.py --world .demo/world

Both sides take turns on the same machine. Memory is the sum of the processes' proportional set sizes, in which shared
memory counts once. Linux only, because the numbers are read from /proc.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from entropy_fork.common.progress import task

#: seconds between two looks at all processes, and between two looks at their memory, which take longer
LOOK_SECONDS, MEMORY_SECONDS = 0.1, 1.0
TICKS = os.sysconf("SC_CLK_TCK")
SIDES = {"without": "False", "with": "True"}


@dataclass
class Cost:
    """The cost of one run.

    Attributes:
        wall: seconds until the command ended.
        processor: user and system seconds of each process.
        peak: the highest memory of all processes together, in KiB.
        processes: the number of processes at that moment.
    """

    wall: float = float("nan")
    processor: dict[tuple[str, str], float] = field(default_factory=dict)
    peak: int = 0
    processes: int = 0


def measure(arguments: list[str], output: Path) -> Cost:
    """Run a command, and watch it and every process that it starts, until the last one has ended."""
    ray = tempfile.mkdtemp(prefix="ef")  # marks the processes of this run, and is short enough for Ray's sockets
    environment = {**os.environ, "VERL_PLATFORM": "cpu", "RAY_TMPDIR": ray, "PYTHONWARNINGS": "ignore"}
    cost, began, looked = Cost(), time.monotonic(), 0.0
    with output.open("w") as log:
        process = subprocess.Popen(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT)
    members: dict[tuple[str, str], bool] = {}
    while True:
        with_memory = time.monotonic() - looked > MEMORY_SECONDS
        alive, memory = _look(f"RAY_TMPDIR={ray}".encode(), members, cost, with_memory)
        if with_memory:
            looked = time.monotonic()
            if memory > cost.peak:
                cost.peak, cost.processes = memory, alive
        if cost.wall != cost.wall and process.poll() is not None:
            cost.wall = time.monotonic() - began
        if process.poll() is not None and not alive:
            break
        time.sleep(LOOK_SECONDS)
    shutil.rmtree(ray, ignore_errors=True)
    if process.returncode != 0:
        sys.exit("".join(output.read_text().splitlines(keepends=True)[-20:]) + f"\nthe run failed: {output}")
    return cost


def _look(mark: bytes, members: dict[tuple[str, str], bool], cost: Cost, with_memory: bool) -> tuple[int, int]:
    """Note the processor time of each process. Returns the number of processes and their memory in KiB."""
    alive = memory = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            process = (folder.name, fields[19])  # Linux reuses pids, but with another start time
            if process not in members:
                members[process] = mark in (folder / "environ").read_bytes().split(b"\0")
            if not members[process] or fields[0] == "Z":
                continue
            alive += 1
            cost.processor[process] = (int(fields[11]) + int(fields[12])) / TICKS
            if with_memory:
                lines = (folder / "smaps_rollup").read_text().splitlines()
                memory += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except OSError:  # it has ended meanwhile
            continue
    return alive, memory


def main(
    world: Annotated[Path, typer.Option(help="What examples/cpu_demo/build.py built.")],
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each side.")] = 2,
) -> None:
    """Run one step of the demo's recipe, without and with the fork server in turn."""
    costs: dict[str, list[Cost]] = {side: [] for side in SIDES}
    console = Console()
    with tempfile.TemporaryDirectory() as folder, task("runs", total=2 * repeats, console=console) as shown:
        for _ in range(repeats):
            for side, value in SIDES.items():
                arguments = [
                    sys.executable, "-m", "verl.trainer.main_ppo", "+recipe=demo_cpu", f"demo.dir={world.resolve()}",
                    f"cpu_platform.fork_server={value}", "trainer.total_training_steps=1", "trainer.test_freq=-1",
                    "trainer.val_before_train=false", "trainer.save_freq=-1", "trainer.logger=[console]",
                    "trainer.resume_mode=disable", f"hydra.run.dir={folder}/hydra",
                ]  # fmt: skip
                costs[side].append(measure(arguments, Path(folder) / "log.txt"))
                shown.advance(1, note=f"{side} the fork server: {costs[side][-1].wall:.1f} s")
    table = Table(title=f"one step, median of {repeats} runs of each side, {os.cpu_count()} cores")
    for column in ("fork server", "wall, s", "processor, s", "peak memory, GiB", "processes at the peak"):
        table.add_column(column, justify="left" if column == "fork server" else "right")
    for side, runs in costs.items():
        numbers = (
            median(run.wall for run in runs),
            median(sum(run.processor.values()) for run in runs),
            median(run.peak for run in runs) / 2**20,
        )
        table.add_row(side, *(f"{number:.1f}" for number in numbers), str(max(run.processes for run in runs)))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
