"""What the benchmarks share: repeated measurements of several sides in turn, as a table, a CSV file and a plot."""

from __future__ import annotations

import csv
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from entropy_fork.common.progress import track

#: the console for tables and progress
CONSOLE = Console()


def seconds_in_turn(sides: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """The seconds of each side, measured ``repeats`` times after one warm-up; on a GPU by its own events.

    The sides take turns, so that other work on the machine slows all of them equally.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in track("repeats", range(repeats + 1), console=CONSOLE):
        for name, run in sides.items():
            gc.collect()
            took = _seconds(run, device)
            if repeat > 0:
                seconds[name].append(took)
    return seconds


def _seconds(run: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def median_and_spread(values: list[float], digits: int = 3) -> str:
    """The median, and the lowest and highest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def chip(device: str) -> str:
    """The name of the processor or GPU."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def write_csv(rows: list[dict[str, Any]], file: Path) -> None:
    """Write a CSV file with one row per measurement."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def print_table(title: str, rows: list[dict[str, str]]) -> None:
    """Print rows of text as a table, with their keys as the head."""
    table = Table(title=title)
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    CONSOLE.print(table)


def pyplot() -> Any:
    """matplotlib's pyplot. If it is not installed (the extra ``analysis``), print that, and return None."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        CONSOLE.print("matplotlib is not installed: no plot")
        return None
    return plt
