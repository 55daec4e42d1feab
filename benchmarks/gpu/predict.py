"""What ``entropy-fork plan`` predicts, beside the peak that stage c measured. Needs no GPU, only the CSV file.

    python -m benchmarks.gpu.predict
    python -m benchmarks.gpu.predict --from build/gpu

The prediction is computed anew from the formulas as they are now. So after a change of a formula, the same measurement
says whether it became better. After a change of stage c's sizes, measure again. Exit status 1 means that a prediction
is off by more than a tenth.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.gpu.cases import RESULTS, Row, read_rows
from benchmarks.gpu.training import PEAK, STAGE, build_model, overrides

#: a prediction that is off by more is a formula to mend
MOST_OFF = 0.10


def predicted_gib(words: list[str], flash_attention: bool) -> float:
    """The largest number of GiB that plan expects in the trainer's own process during a step.

    The light rollout has a process of its own, so its memory is not in the trainer's peak.

    Raises:
        RuntimeError: plan cannot read the model.
    """
    from entropy_fork.preflight.memory import ENGINE, NOT_OFFLOADED
    from entropy_fork.preflight.plan import make_plan

    plan = make_plan(words, flash_attention=flash_attention)
    if not plan.phases:
        raise RuntimeError("; ".join(problem.message for problem in plan.errors))
    of_trainer = [phase for phase in plan.phases if NOT_OFFLOADED not in phase.parts]
    return max(phase.total - phase.parts.get(ENGINE, 0) for phase in of_trainer) / 2**30


def compared(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """Case, measured GiB and predicted GiB, for each case of stage c that measured its memory."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        build_model(Path(folder), weights=False)
        for row in rows:
            if row.stage == STAGE.letter and row.measure == PEAK and row.case != "demo":
                words = overrides(row.device, row.case, Path(folder))
                found.append((row.case, float(row.value), predicted_gib(words, "flash-attn" in row.versions)))
    return found


def report(found: Sequence[tuple[str, float, float]]) -> str:
    """The comparison as a table."""
    if not found:
        return "not measured: no CSV file of stage c has a peak of a GPU's memory"
    lines = ["| case | measured, GiB | predicted, GiB | predicted / measured |", "|---|---|---|---|"]
    lines += [f"| {case} | {seen:.2f} | {said:.2f} | {said / seen:.3f} |" for case, seen, said in found]
    return "\n".join(lines)


def main(source: Annotated[Path, typer.Option("--from", help="Folder of the CSV file.")] = RESULTS["cuda"]) -> None:
    """Show plan's predictions beside what stage c measured."""
    file = source / STAGE.file_name
    found = compared([row for row in read_rows(file) if row.device == "cuda"] if file.is_file() else [])
    typer.echo(report(found))
    off = [case for case, seen, said in found if abs(said / seen - 1) > MOST_OFF]
    if off:
        typer.echo(f"off by more than {MOST_OFF:.0%}: {', '.join(off)}. The formulas: entropy_fork/preflight/memory.py")
    raise typer.Exit(int(bool(off)))


if __name__ == "__main__":
    typer.run(main)
