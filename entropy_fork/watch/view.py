"""What a person sees of a run: what is masked, a line per step, each warning once, and a table at the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console
from rich.table import Table
from rich.text import Text

from entropy_fork.common.foreign_text import visible
from entropy_fork.common.progress import Task, task
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

#: seconds without a line after which the view says that the run goes on; doubled each time, until the next step
QUIET_SECONDS = 10.0

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
        console: where to. A terminal has a bar at the bottom; elsewhere a line says now and then that the run goes on.
        total: the number of training steps, where it is known.
        place: of everything that verl prints, for hints.
    """

    console: Console
    total: int | None = None
    place: str = ""
    reader: Reader = field(default_factory=Reader)
    _warnings: int = 0
    _task: Task | None = None
    _stack: ExitStack = field(default_factory=ExitStack)
    _doing: str = "starting Ray, the model and the rollout"

    def __enter__(self) -> View:
        self._began = self._last = time.monotonic()
        self._patience = QUIET_SECONDS
        self._done = threading.Event()
        if self.console.is_interactive:
            self._task = self._stack.enter_context(task(self._doing, self.total, console=self.console))
        else:
            threading.Thread(target=self._say_that_it_goes_on, name="entropy_fork view", daemon=True).start()
        return self

    def _say_that_it_goes_on(self) -> None:
        while not self._done.wait(min(1.0, self._patience / 2)):
            now = time.monotonic()
            if now - self._last >= self._patience:
                self._patience *= 2
                self.say(f"{timedelta(seconds=round(now - self._began))}  {self._doing}")

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._stack.close()

    def set_total(self, total: int) -> None:
        """The number of training steps is known now."""
        self.total = total
        if self._task is not None:
            self._task.update(total=total)

    def feed(self, line: str) -> None:
        """A line of the output."""
        seen = self.reader.read(line)
        if isinstance(seen, Step):
            self.say(line_of(seen))
            self._doing, self._patience = f"training, {seen.number} steps are done", QUIET_SECONDS
            if self._task is not None:
                self._task.what = "training"
                self._task.update(seen.number)
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
        self._last = time.monotonic()
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
