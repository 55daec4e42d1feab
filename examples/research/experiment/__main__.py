"""Train with several choices of tokens and several seeds each, in stock verl's main_ppo: CSV, tables, plots.

Every run has the same model, questions, learning rate and number of steps. Only the seed and the tokens in the policy
gradient differ, and what follows from these tokens. Finished runs are not repeated, so an interrupted experiment
continues with the next missing run. docs/lab/evidence.md says what the results show and what they do not show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.progress import paused
from entropy_fork.common.progress import task as progress
from examples.research.experiment import page as pages
from examples.research.experiment.arms import ARMS, MATCHED, QUESTIONS, TOP20
from examples.research.experiment.comparison import by_arm, minus, of_question
from examples.research.experiment.power import pairs_needed
from examples.research.experiment.results import finished, merged, read_csv, write_csv
from examples.research.experiment.runs import (
    METRICS_FILE,
    command,
    estimate,
    folder_of,
    keep_to,
    run_folder,
    train_once,
    wanted,
    world_of,
)
from examples.research.experiment.statistics import FEWEST_SEEDS, spread_interval
from examples.research.experiment.tasks import TASKS, Task

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, no_args_is_help=True, add_completion=False)
OneTask = Annotated[str, typer.Option("--task", help=f"The model and its problems: {', '.join(TASKS)}.")]
#: of the table on the terminal
COLUMNS = ("tokens", "seeds", "accuracy, %", "minus `all`", "entropy, nats", "length, tokens", "kept")


def one_of(name: str, table: dict[str, Task], option: str) -> Task:
    if name not in table:
        raise typer.BadParameter(f"{name}: write {' or '.join(table)}", param_hint=option)
    return table[name]


@app.command()
def run(
    task: OneTask = "demo",
    question: Annotated[str, typer.Option(help=f"What to compare: {', '.join(QUESTIONS)}.")] = "controls",
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm; may be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed; may be repeated.")] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs of each arm, with the seeds 1, 2, …. Default: the question's.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=4, help="Training steps of each run. Default: the question's.")
    ] = None,
    test_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between two validations. Default: the question's.")
    ] = None,
    at_most: Annotated[
        int | None, typer.Option(min=0, help="Make at most so many runs now, then show what is there.")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Where the world and the runs are kept. Default: the task's.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="A further Hydra override of every run; may be repeated.")
    ] = None,
) -> None:
    """Say how long the missing runs will take, make them, and show a table."""
    console = Console()
    on = one_of(task, TASKS, "--task")
    if question not in QUESTIONS:
        raise typer.BadParameter(f"{question}: write {' or '.join(QUESTIONS)}", param_hint="--question")
    asked = QUESTIONS[question]
    names = [one.name for one in asked.arms]
    if unknown := set(arm or ()) - set(names):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: the arms are {', '.join(names)}", param_hint="--arm")
    place, steps = directory or on.directory, steps or asked.steps
    folder, world = folder_of(place, asked, steps), world_of(place, asked)
    keep_to(folder, override or [])
    runs = wanted(on, asked, arm or (), seed or range(1, (seeds or asked.seeds) + 1))
    absent = [pair for pair in runs if not (run_folder(folder, *pair) / METRICS_FILE).exists()]
    console.print(estimate(folder, len(absent), len(runs), on, steps), highlight=False, soft_wrap=True)
    now = absent[:at_most]
    if now:
        on.build(world, console, asked.problems)
    with progress("runs", len(now), console=console) as everything:
        for done, (one, number) in enumerate(now, 1):
            console.rule(f"{one.name} ({one.tokens}), seed {number}: {' '.join(one.overrides)}")
            every, output = test_every or asked.test_every(steps), run_folder(folder, one, number)
            arguments = command(on, one, number, steps, every, asked.answers, world, output, override or [])
            with paused():  # the run shows itself
                train_once(arguments, output, steps)
            everything.update(done)
    show(folder, on, question, console)
    if left := len(absent) - len(now):
        console.print(f"{left} of {len(runs)} runs are missing: the same command makes them.")


def show(folder: Path, task: Task, question: str, console: Console) -> None:
    """Print the table of a folder's runs, and write their CSV and plot there."""
    arms = [arm.name for arm in QUESTIONS[question].arms]
    results = [one for one in finished(folder, task, "unknown") if one.arm in arms]
    if not results:
        console.print("no run is there yet")
        return
    results.sort(key=lambda one: (arms.index(one.arm), one.seed))
    write_csv(results, folder / f"{question}.csv")
    pages.draw(results, folder / question)
    title = f"After {results[0].steps} steps: mean ± standard deviation over the seeds"
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for column in COLUMNS:
        shown.add_column(column.replace("`", ""), justify="left" if column == "tokens" else "right", no_wrap=True)
    for row in pages.arm_rows(results):
        shown.add_row(*(row[column].replace("`", "") for column in COLUMNS))
    console.print(shown)
    console.print(f"{folder}: {question}.csv, {question}.png, {question}.svg", highlight=False, soft_wrap=True)


@app.command()
def collect(
    folder: Annotated[
        Path | None, typer.Argument(help="The runs, in ARM-seedSEED. Default: where `run` makes those of `controls`.")
    ] = None,
    task: OneTask = "demo",
    into: Annotated[Path | None, typer.Option(help="The CSV. Default: TASK.csv in docs/lab/evidence.")] = None,
    made_at: Annotated[
        str | None, typer.Option(help="The commit of the runs that do not record it (those before this option).")
    ] = None,
) -> None:
    """Add the finished runs of a folder to the CSV of their task."""
    console = Console()
    on, controls = one_of(task, TASKS, "--task"), QUESTIONS["controls"]
    file = into or pages.EVIDENCE / f"{task}.csv"
    place = folder or folder_of(on.directory, controls, controls.steps)
    if not (found := finished(place, on, made_at)):
        if folder is None:  # 'make evidence' draws the page all the same
            console.print(f"{place} has no finished run, so {file} stays as it is", highlight=False, soft_wrap=True)
            return
        raise EntropyForkError(f"{folder} has no finished run, that is no ARM-seedSEED/{METRICS_FILE}")
    before = read_csv(file)
    after = merged(before, found)
    write_csv(after, file)
    new = len(after) - len(before)
    console.print(f"{file}: {len(after)} runs, {new} of them new", highlight=False, soft_wrap=True)


@app.command()
def page() -> None:
    """Write the tables of docs/lab/evidence.md and its plots, and the guide's table of seeds, from the CSV files."""
    for file in pages.write():
        Console().print(str(file.relative_to(pages.REPOSITORY)), highlight=False, soft_wrap=True)


@app.command()
def power(
    csv: Annotated[Path, typer.Option(help="Measured runs.")] = pages.EVIDENCE / "demo.csv",
    arm: Annotated[str, typer.Option(help="One arm.")] = TOP20.name,
    against: Annotated[str, typer.Option(help="The other arm.")] = MATCHED.name,
    sd: Annotated[
        float | None,
        typer.Option(min=0.01, help="The standard deviation of the paired differences, in points; not of the CSV."),
    ] = None,
    points: Annotated[list[float] | None, typer.Option(min=0.01, help="A true difference; may be repeated.")] = None,
    wanted: Annotated[float, typer.Option("--power", min=0.1, max=0.999, help="The probability to find it.")] = 0.8,
    level: Annotated[
        float, typer.Option(min=0.0001, max=0.5, help="The probability to find a difference that is not there.")
    ] = 0.05,
) -> None:
    """Say how many seeds a paired comparison of two arms needs, by the size of the difference."""
    console = Console()
    spreads = {"final accuracy": sd} if sd is not None else measured_spreads(csv, arm, against, console)
    shown = Table(
        title=f"Seeds of each arm for {wanted:.0%} power at {level:.0%} (two-sided paired t test)", box=box.SIMPLE_HEAD
    )
    shown.add_column("true difference, points", justify="right")
    for name, spread in spreads.items():
        shown.add_column(f"{name} (sd {spread:.1f})", justify="right")
    for size in points or (1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0):
        shown.add_row(f"{size:g}", *(str(pairs_needed(size / spread, wanted, level)) for spread in spreads.values()))
    console.print(shown)


def measured_spreads(csv: Path, arm: str, against: str, console: Console) -> dict[str, float]:
    """The standard deviations of the paired differences of two arms, in points.

    Raises:
        EntropyForkError: an arm is unknown, or too few seeds have both.
    """
    if unknown := {arm, against} - set(ARMS):
        raise EntropyForkError(f"{', '.join(sorted(unknown))}: the arms are {', '.join(ARMS)}")
    table = by_arm(of_question(read_csv(csv), QUESTIONS["controls"]))
    found = {"final accuracy": "accuracy", "mean height of the curve": "area"}
    measured = {words: minus(table, arm, against, name) for words, name in found.items()}
    seeds = measured["final accuracy"].seeds
    if seeds < FEWEST_SEEDS:
        raise EntropyForkError(
            f"{csv} has {seeds} seeds of both {arm} and {against}, and a spread needs {FEWEST_SEEDS}: make more runs, "
            "or give the standard deviation of the paired differences with --sd"
        )
    low, high = spread_interval(1.0, seeds)
    console.print(
        f"The spread (sd) is that of {arm} minus {against} over {seeds} seeds of {csv.name}. The true one is {low:.1f} "
        f"to {high:.1f} times as large (95%), and the numbers of seeds below change with its square.",
        highlight=False,
    )
    return {words: 100 * one.spread for words, one in measured.items()}


if __name__ == "__main__":
    try:
        app()
    except EntropyForkError as error:
        raise SystemExit(f"error: {error}") from None
