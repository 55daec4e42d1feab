"""Prove this package on a GPU: all stages, each within its time, and a Markdown page of what was measured.

    make gpu
    python -m benchmarks.gpu.run                                on a machine with a GPU
    python -m benchmarks.gpu.run --device cpu                   the same code on tiny shapes: proves the command itself
    python -m benchmarks.gpu.run --stage a --output build/results     one stage
    python -m benchmarks.gpu.run --dry-run                      what would be run here, and what cannot; starts nothing

A stage that fails, or takes too long, does not keep the next one from running. What did not run is "not measured". The
page is build/gpu-DEVICE.md, and with --output a file in that folder.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.gpu.cases import (
    CONSOLE,
    MEASURED,
    NOT_MEASURED,
    RESULTS,
    Device,
    Output,
    Row,
    Stage,
    check_device,
    run_stage,
    versions,
)
from benchmarks.gpu.tables import markdown, stages


def page(device: str, rows: list[Row], seconds: dict[str, float]) -> str:
    """The Markdown page: chip, versions, each stage with its command and its tables."""
    chips = sorted({row.chip for row in rows if row.chip}) or ["unknown"]
    line = shlex.join(["python", "-m", "benchmarks.gpu.run", *sys.argv[1:]])
    parts = [f"# Stages on {device}: {', '.join(chips)}", versions(), f"`{line}`"]
    for stage in stages():
        of_stage = [row for row in rows if row.stage == stage.letter]
        parts.append(f"## Stage {stage.letter}: {stage.title}")
        if stage.letter not in seconds:
            parts.append("Not measured: the stage was not asked for.")
            continue
        parts.append(f"`python -m {stage.module} --device {device}`, {seconds[stage.letter]:.0f} s")
        parts.append(markdown(of_stage))
    return "\n\n".join(parts) + "\n"


def listing(device: str, asked: Sequence[Stage], minutes: float) -> str:
    """What would be run, as Markdown: the cases in their order, each with its limit or with what it lacks here."""
    parts = []
    for stage in asked:
        limit = min(stage.seconds, minutes * 60)
        parts.append(f"## Stage {stage.letter}: {stage.title}, ended after {limit:.0f} s")
        cases = stage.cases(device, Path("a-temporary-folder"))
        lines = [f"- {case.name}: " + (case.lacks or f"ended after {min(case.seconds, limit):.0f} s") for case in cases]
        parts += [f"`python -m {stage.module} --device {device}`", "\n".join(lines)]
    return "\n\n".join(parts)


def main(
    device: Device = "cuda",
    output: Output = None,
    stage: Annotated[list[str] | None, typer.Option(help="Only this stage, a to d; may be repeated.")] = None,
    minutes: Annotated[float, typer.Option(help="The most that a stage may take.")] = 8.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be run, and start nothing.")] = False,
) -> None:
    """Run the stages one after the other, and write what came of them. Exit status 1: a case failed or was ended."""
    asked = [each for each in stages() if not stage or each.letter in stage]
    if dry_run:
        CONSOLE.print(listing(device, asked, minutes), markup=False, highlight=False, soft_wrap=True)
        return
    check_device(device)
    folder, written = output or RESULTS[device], (output or Path("build")) / f"gpu-{device}.md"
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    for each in asked:
        began = time.monotonic()
        rows += run_stage(each, device, folder, seconds=min(each.seconds, minutes * 60))
        seconds[each.letter] = time.monotonic() - began
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(page(device, rows, seconds), encoding="utf-8")
    CONSOLE.print(page(device, rows, seconds), markup=False, highlight=False, soft_wrap=True)
    took = ", ".join(f"{letter} {value:.0f} s" for letter, value in seconds.items())
    CONSOLE.print(f"stages: {took}; written: {written}, and CSV files in {folder}", highlight=False)
    bad = [row for row in rows if row.status not in (MEASURED, NOT_MEASURED)]
    raise typer.Exit(int(bool(bad)))


if __name__ == "__main__":
    typer.run(main)
