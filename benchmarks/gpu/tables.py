"""The CSV files of the stages as Markdown, and the GPU section of a page made from them.

    python -m benchmarks.gpu.tables            print the section
    python -m benchmarks.gpu.tables --write    put it into docs/lab/performance.md

Only what a CSV file of a GPU holds becomes a number. Everything else is "not measured", with its reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.gpu.cases import MEASURED, RESULTS, Row, Stage, read_rows

PAGE = Path("docs/lab/performance.md")
BEGIN, END = "<!-- gpu: made by python -m benchmarks.gpu.tables --write -->", "<!-- gpu: end -->"


def stages() -> list[Stage]:
    """All stages, in their order."""
    from benchmarks.gpu import engines, kernels, training, vllm_rollout

    return [kernels.STAGE, engines.STAGE, training.STAGE, vllm_rollout.STAGE]


def rows_of_a_gpu(folder: Path) -> list[Row]:
    """The rows of all stages that were run on a GPU and kept."""
    files = (folder / stage.file_name for stage in stages())
    return [row for file in files if file.is_file() for row in read_rows(file) if row.device == "cuda"]


def section(rows: Sequence[Row]) -> str:
    """The GPU section: for each stage its tables, or "not measured"."""
    parts = []
    for stage in stages():
        of_stage = [row for row in rows if row.stage == stage.letter]
        parts.append(f"### Stage {stage.letter}: {stage.title}")
        line = f"```sh\npython -m {stage.module} --device cuda\n```"
        parts += [line, markdown(of_stage) if of_stage else "Not measured."]
    return "\n\n".join(parts)


def markdown(rows: Iterable[Row]) -> str:
    """Tables of the rows, one for each heading, with chip, versions and date below them."""
    rows = list(rows)
    parts = []
    for table in dict.fromkeys(row.table for row in rows):
        of_table = [row for row in rows if row.table == table]
        measures = list(dict.fromkeys(row.measure for row in of_table if row.status == MEASURED and row.measure))
        head = [table, *(measures or ["result"])]
        lines = [head, ["---"] * len(head)]
        for name in dict.fromkeys(row.row for row in of_table):
            of_name = [row for row in of_table if row.row == name]
            cells = [_cell(of_name, measure) for measure in measures or [""]]
            if not any(row.value for row in of_name):  # one reason, not the same one in every column
                cells[1:] = [""] * len(cells[1:])
            lines.append([name, *cells])
        parts.append("\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines))
    on = {(row.date, row.chip, row.versions) for row in rows if row.status == MEASURED}
    parts += [f"Measured on {date}, {chip or 'an unnamed chip'}; {names}." for date, chip, names in sorted(on)]
    return "\n\n".join(parts)


def _cell(rows: Sequence[Row], measure: str) -> str:
    values = [float(row.value) for row in rows if row.measure == measure and row.value]
    if not values:
        (status, note) = next(((row.status, row.note) for row in rows if row.status != MEASURED), ("", ""))
        return f"{status}: {_short(note)}" if status and note else status or "not measured"
    median = _number(statistics.median(values))
    return median if len(values) == 1 else f"{median} ({_number(min(values))} to {_number(max(values))})"


def _short(note: str) -> str:
    return note if len(note) <= 120 else f"{note[:60]} … {note[-55:]}"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"


def filled(page: str, rows: Sequence[Row]) -> str:
    """The page with its GPU section made anew."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    assert rest, f"the page has no line {BEGIN}"
    return f"{before}{BEGIN}\n\n{section(rows)}\n\n{END}{after}"


def main(
    write: Annotated[bool, typer.Option("--write", help="Put the section into docs/lab/performance.md.")] = False,
    source: Annotated[Path, typer.Option("--from", help="Folder of the CSV files.")] = RESULTS["cuda"],
) -> None:
    """Make the GPU section of the page about performance from the CSV files."""
    rows = rows_of_a_gpu(source)
    if not write:
        typer.echo(section(rows))
        return
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    typer.echo(f"written: {PAGE}, from {len(rows)} rows")


if __name__ == "__main__":
    typer.run(main)
