"""What a person sees of a run: what is masked, a line per step, each warning once, and a table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from entropy_fork.common.foreign_text import visible
from entropy_fork.watch.output import Reader, Step

#: what stands in the line of a step: label, metric, how it is written
SHOWN = (
    ("reward", "critic/score/mean", "{:.3f}"),
    ("kept", "entropy_fork/kept_ratio", "{:.3f}"),
    ("τ", "entropy_fork/threshold", "{:.3f}"),
    ("entropy", "actor/entropy", "{:.3f}"),
    ("length", "response_length/mean", "{:.1f}"),
    ("seconds", "timing_s/step", "{:.1f}"),
)

#: warnings that are shown; a run whose libraries warn more often says only where they are
MOST_WARNINGS = 10


def line_of(step: Step) -> str:
    """``step   21  reward 0.547  accuracy 0.613  kept 0.200  τ 0.439  entropy 0.163  length 25.9  seconds 5.3``"""
    parts = [f"step {step.number:4d}"]
    if step.accuracy is not None:
        parts.append(f"accuracy {step.accuracy:.3f}")
    parts += [f"{label} {form.format(step.metrics[name])}" for label, name, form in SHOWN if name in step.metrics]
    return "  ".join(parts)


def table_of(steps: Sequence[Step]) -> Table:
    """The run in a table: first and last training step, and the validations."""
    table = Table("", "first", "last", title=f"{steps[-1].number} steps" if steps else "no step was finished")
    trained = [step for step in steps if step.number > 0]
    accuracies = [(step.number, step.accuracy) for step in steps if step.accuracy is not None]
    if accuracies:
        table.add_row(
            "accuracy", *(f"{value:.1%} (step {number})" for number, value in (accuracies[0], accuracies[-1]))
        )
    for label, name, form in SHOWN:
        found = [step.metrics[name] for step in trained if name in step.metrics]
        if found:
            table.add_row(label, form.format(found[0]), form.format(found[-1]))
    return table


@dataclass
class View:
    """Shows a run's output as it comes.

    Args:
        console: where to. On a terminal it has a bar at the bottom.
        total: the number of training steps, where it is known.
        place: of everything that verl prints, for hints.
    """

    console: Console
    total: int | None = None
    place: str = ""
    reader: Reader = field(default_factory=Reader)
    _warnings: int = 0
    _bar: Progress | None = None

    def __enter__(self) -> View:
        if self.console.is_interactive:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(
                *columns, console=self.console, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._task = self._bar.add_task("starting Ray, the model and the rollout", total=self.total)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def set_total(self, total: int) -> None:
        """The number of training steps is known now."""
        self.total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def feed(self, line: str) -> None:
        """A line of the output."""
        seen = self.reader.read(line)
        if isinstance(seen, Step):
            self.say(line_of(seen))
            if self._bar is not None:
                self._bar.update(self._task, description="training", completed=seen.number)
        elif seen is not None and seen.startswith("warning: "):
            self._warnings += 1
            if self._warnings <= MOST_WARNINGS:
                self.say(seen if len(seen) <= 300 else f"{seen[:297]}…")
            elif self._warnings == MOST_WARNINGS + 1:
                self.say(f"warning: more kinds of warnings are in {self.place}")
        elif seen is not None:
            self.say(seen)

    def say(self, text: str) -> None:
        """A line, as text."""
        self.console.print(Text(visible(text)), soft_wrap=True)

    def finish(self, commands: Sequence[str] = ()) -> None:
        """The table, and what can be typed next."""
        steps = [self.reader.steps[number] for number in sorted(self.reader.steps)]
        if not steps:
            return
        self.console.print(table_of(steps))
        if commands:
            self.say("next:")
        for command in commands:
            self.say(f"  {command}")
