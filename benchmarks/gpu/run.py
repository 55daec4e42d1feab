"""Prove this package on a GPU: all stages, each within its time, and a Markdown page of what was measured.

    make gpu
    python -m benchmarks.gpu.run                                on a machine with a GPU
    python -m benchmarks.gpu.run --device cpu                   the same code on tiny shapes: proves the command itself
    python -m benchmarks.gpu.run --stage a --output build/results     one stage

A stage that fails, or takes too long, does not keep the next one from running. What did not run is "not measured".
"""

from __future__ import annotations

import time
from typing import Annotated

import typer

from benchmarks.gpu.cases import CONSOLE, MEASURED, RESULTS, Device, Output, Row, check_device, run_stage, versions
from benchmarks.gpu.tables import markdown, stages


def page(device: str, rows: list[Row], seconds: dict[str, float]) -> str:
    """The Markdown page: chip, versions, each stage with its command and its tables."""
    chips = sorted({row.chip for row in rows if row.chip}) or ["unknown"]
    parts = [f"# Stages on {device}: {', '.join(chips)}", versions(), "`python -m benchmarks.gpu.run`"]
    for stage in stages():
        of_stage = [row for row in rows if row.stage == stage.letter]
        parts.append(f"## Stage {stage.letter}: {stage.title}")
        if stage.letter not in seconds:
            parts.append("Not measured: the stage was not asked for.")
            continue
        parts.append(f"`python -m {stage.module} --device {device}`, {seconds[stage.letter]:.0f} s")
        parts.append(markdown(of_stage))
    return "\n\n".join(parts) + "\n"


def main(
    device: Device = "cuda",
    output: Output = None,
    stage: Annotated[list[str] | None, typer.Option(help="Only this stage, a to d; may be repeated.")] = None,
    minutes: Annotated[float, typer.Option(help="The most that a stage may take.")] = 8.0,
) -> None:
    """Run the stages one after the other, and write what came of them. Exit status 1: a case failed or was ended."""
    check_device(device)
    folder = output or RESULTS[device]
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    for each in stages():
        if stage and each.letter not in stage:
            continue
        began = time.monotonic()
        rows += run_stage(each, device, folder, seconds=min(each.seconds, minutes * 60))
        seconds[each.letter] = time.monotonic() - began
        (folder / f"gpu-{device}.md").write_text(page(device, rows, seconds), encoding="utf-8")
    CONSOLE.print(page(device, rows, seconds), markup=False, highlight=False, soft_wrap=True)
    took = ", ".join(f"{letter} {value:.0f} s" for letter, value in seconds.items())
    CONSOLE.print(f"stages: {took}; written: {folder}", highlight=False)
    bad = [row for row in rows if row.status not in (MEASURED, "not measured")]
    raise typer.Exit(int(bool(bad)))


if __name__ == "__main__":
    typer.run(main)
