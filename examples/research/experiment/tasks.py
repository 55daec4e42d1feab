"""On what it is compared: a row per task. To add a task, add a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from examples.cpu_demo.run import build_world
from examples.research.experiment.arms import GRADIENT, NEXT20, UNCLIPPED, Arm, Question


@dataclass(frozen=True)
class Task:
    """A model and its problems.

    Attributes:
        name: on the command line, and of the CSV.
        words: for "on WORDS" in a sentence.
        directory: where the world and the runs are kept, by default.
        build: makes the world in a folder if it is missing, with so many held-out problems (None: its own number).
        recipe, overrides: of the training command, which also gets the world as ``demo.dir``.
        accuracy: verl's name of the held-out accuracy, up to the number of answers.
        without: names of arms that are not planned on this task; ``--arm`` makes them all the same.
        run_seconds: of one run of 30 steps on two cores; the estimate of hours uses it until a run is there.
    """

    name: str
    words: str
    directory: Path
    build: Callable[[Path, Console, int | None], None]
    recipe: str
    overrides: tuple[str, ...]
    accuracy: str
    run_seconds: float
    without: tuple[str, ...] = ()

    def planned(self, question: Question) -> tuple[Arm, ...]:
        """The arms of a question that are planned on this task."""
        return tuple(arm for arm in question.arms if arm.name not in self.without)


def build_demo(world: Path, console: Console, problems: int | None) -> None:
    build_world(world, console, *([] if problems is None else [f"--test-problems={problems}"]))


def build_sorting(world: Path, console: Console, problems: int | None) -> None:
    build_world(world, console, *([] if problems is None else [f"--test-problems={problems}"]), task="sorting")


TASKS = {
    task.name: task
    for task in [
        Task(
            name="demo",
            words="the demo's order of operations",
            directory=Path(".demo"),
            build=build_demo,
            recipe="demo_cpu",
            overrides=(),
            accuracy="val-core/cpu_demo/acc/mean@",
            run_seconds=170.0,
            # asked where most tokens are choices, and where every step of top20 is clipped
            without=(NEXT20.name, UNCLIPPED.name),
        ),
        Task(
            name="sorting",
            words="sorting six numbers",
            directory=Path(".demo/sorting"),
            build=build_sorting,
            recipe="sorting_cpu",
            overrides=(),
            accuracy="val-core/reasoning_gym/number_sorting/acc/mean@",
            run_seconds=140.0,
            without=(GRADIENT.name,),  # asked on the demo's task
        ),
    ]
}
