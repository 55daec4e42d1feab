"""Count the answers that reasoning-gym's scorer calls right and that are not exact: it lets each number be off by 1.

The answers are those of a run's validations: give the run ``trainer.validation_data_dir=FOLDER``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from examples.sorting.world import Direction, Problem, sorts_exactly

_PROMPT = re.compile(r"Sort (?P<numbers>\d+(?:,\d+)*), (?P<direction>\w+), in")


def count(file: Path) -> tuple[int, int, int]:
    """Count the answers of one validation, the right ones, and the exact ones among the right.

    Raises:
        ValueError: a prompt is not of this task.
    """
    answers = right = exact = 0
    with file.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if not (asked := _PROMPT.search(row["input"])):
                raise ValueError(f"{file}: this prompt is not of the sorting task: {row['input']}")
            problem = Problem(tuple(map(int, asked["numbers"].split(","))), Direction(asked["direction"]))
            answers += 1
            if row["score"] == 1:
                right += 1
                exact += sorts_exactly(problem, row["output"])
    return answers, right, exact


def main(folder: Annotated[Path, typer.Argument(help="trainer.validation_data_dir of a run.")]) -> None:
    """Print a row for each validation."""
    files = sorted(folder.glob("*.jsonl"), key=lambda file: int(file.stem))
    if not files:
        raise typer.BadParameter(f"{folder} has no STEP.jsonl: name the validation_data_dir of a run")
    table = Table("step", "answers", "right", "of these exact")
    for file in files:
        answers, right, exact = count(file)
        table.add_row(file.stem, str(answers), str(right), f"{exact} ({exact / right:.1%})" if right else "")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
