"""A stage whose cases end in every way that a case can end, to test how stages are run. Runs as a module."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import typer

from benchmarks.gpu.cases import Case, Measured, Stage, command


def measures() -> Iterable[Measured]:
    yield Measured("first", "ms", 1.5)
    yield Measured("first", "ms", 2.5)
    yield Measured("second", "GiB", 0.25)


def raises() -> Iterable[Measured]:
    yield Measured("lost", "ms", 1.0)
    raise ValueError("no | such\nkernel")


def dies() -> Iterable[Measured]:
    print("the last words", flush=True)
    os._exit(7)


def hangs() -> Iterable[Measured]:
    """Like Ray, it starts a process in a session of its own, which outlives it."""
    code = "import time; time.sleep(300)"
    subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    time.sleep(300)
    return []


def cases(device: str, folder: Path) -> list[Case]:
    return [
        Case("lacks", "Ways to end", measures, "there is no such thing here"),
        Case("measures", "Ways to end", measures),
        Case("raises", "Ways to end", raises),
        Case("dies", "Ways to end", dies),
        Case("hangs", "Ways to end", hangs, seconds=2),
        Case("alone", "Ways to end", measures, alone=True),
        Case("after", "Ways to end", measures),
    ]


STAGE = Stage("a", "a stage for tests", "helpers.gpu_stage", cases)

if __name__ == "__main__":
    typer.run(command(STAGE))
