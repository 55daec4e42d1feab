"""What a command is doing and how far it is: a bar on a terminal, and elsewhere a line every few seconds.

    with task("answers", total=960, console=console) as shown:
        for batch in batches:
            shown.advance(len(batch), note="812 tokens/s")

A task within a task, in whatever module, joins the display of the outermost one. Where the console is a terminal the
bar is drawn there. Otherwise bar or lines go to stderr, so that nothing comes between the results on stdout.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from entropy_fork.common.foreign_text import visible

#: seconds between two lines on the same task; seconds between lines on two tasks, and before the first line
EVERY, SOON = 10.0, 3.0

Item = TypeVar("Item")


@dataclass(eq=False)
class Task:
    """A piece of work that is shown, as :func:`task` yields it.

    Attributes:
        what: what is being done, in a few words.
        total: how much there is to do; None if that is not known.
        completed: how much of it is done.
        note: a remark on its present state, such as a speed.
    """

    what: str
    total: int | None
    completed: int
    note: str = ""
    _changed: Callable[[], None] = lambda: None
    _clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._began, self._completed_before = self._clock(), self.completed

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Add to what is done."""
        self.update(self.completed + count, note)

    def update(self, completed: int | None = None, note: str | None = None, total: int | None = None) -> None:
        """Set how much is done; None leaves a value as it is."""
        self.completed = self.completed if completed is None else completed
        self.note = self.note if note is None else note
        self.total = self.total if total is None else total
        self._changed()

    def say(self, what: str) -> None:
        """Say that something else is being done now."""
        self.what = what
        self._changed()

    def text(self) -> str:
        """The text beside a bar."""
        count = "" if self.total is None else f"{self.completed:,}/{self.total:,}"
        return "  ".join(part for part in (count, visible(self.note)) if part)

    def line(self) -> str:
        """The line that is written where there is no bar."""
        parts = [visible(self.what), self.text()]
        new = self.completed - self._completed_before
        if self.total is not None and new > 0 and self.completed < self.total:
            left = (self._clock() - self._began) / new * (self.total - self.completed)
            parts.append(f"{_duration(left)} left")
        return "  ".join(part for part in parts if part)


@dataclass
class _Lines:
    """Writes a line on the innermost task when one is due. ``write`` gets whole lines."""

    write: Callable[[str], object]
    clock: Callable[[], float] = time.monotonic
    tasks: list[Task] = field(default_factory=list)
    paused: bool = False

    def __post_init__(self) -> None:
        self._began = self._last = self.clock()
        self._said: tuple[Task, str] | None = None
        self._lock = threading.Lock()

    def tick(self, ended: Task | None = None) -> None:
        """Called often. A task that has ended gets a line with its final count, if the last line was on it as well."""
        with self._lock, suppress(IndexError, OSError, ValueError):  # no task is left, or stderr is closed
            task = ended or self.tasks[-1]
            name, now = (task, task.what), self.clock()
            is_same = name == self._said
            if ended is not None:
                due = is_same and task.total is not None
            else:
                due = now - self._last >= (EVERY if is_same else SOON)
            if due and not self.paused:
                self._last, self._said = now, name
                self.write(f"{_duration(now - self._began)}  {task.line()}\n")


@dataclass
class _Display:
    """Where the present tasks are shown: a live display of rich, or lines that a thread writes."""

    screen: Console
    bars: Progress | None
    lines: _Lines

    @contextmanager
    def running(self) -> Iterator[None]:
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.5):
                self.lines.tick()

        watcher = threading.Thread(target=watch, name="progress", daemon=True)
        with self.bars or nullcontext():
            if self.bars is None and not self.screen.quiet:
                watcher.start()
            try:
                yield
            finally:
                done.set()
                if watcher.ident is not None:
                    watcher.join(timeout=1)  # it may be blocked by a pipe that nobody reads

    @contextmanager
    def task(self, task: Task) -> Iterator[Task]:
        bar = None if self.bars is None else self.bars.add_task("", total=None, said="")
        task._changed = lambda: self._draw(bar, task)
        task._changed()
        self.lines.tasks.append(task)
        try:
            yield task
            if self.bars is None and not self.screen.quiet:
                self.lines.tick(ended=task)
        finally:
            self.lines.tasks.remove(task)
            if self.bars is not None and bar is not None:
                self.bars.remove_task(bar)

    def _draw(self, bar: TaskID | None, task: Task) -> None:
        if self.bars is not None and bar is not None:
            self.bars.update(
                bar, description=visible(task.what), completed=task.completed, total=task.total, said=task.text()
            )


_display: _Display | None = None


@contextmanager
def task(
    what: str, total: int | None = None, completed: int = 0, note: str = "", console: Console | None = None
) -> Iterator[Task]:
    """Show what is done in this block.

    Args:
        what: what is being done, in a few words; plain text, not rich's markup.
        total: how much there is to do; None if that is not known.
        completed: how much of it was done before.
        note: a remark on its present state.
        console: the console of the results. The bar is drawn on its terminal, and its ``quiet`` means no display. None
            takes stderr. A task within another one is shown where the outer one is.
    """
    global _display
    if _display is not None:
        with _display.task(Task(what, total, completed, note)) as shown:
            yield shown
        return
    _display = _display_on(console or Console(emoji=False, stderr=True))
    try:
        with _display.running(), _display.task(Task(what, total, completed, note)) as shown:
            yield shown
    finally:
        _display = None


@contextmanager
def paused(lines_too: bool = True) -> Iterator[None]:
    """Draw no bar during this block, because a child process or a library draws its own.

    Args:
        lines_too: where lines are written in place of a bar, write none either.
    """
    if _display is None:
        yield
        return
    _display.lines.paused = lines_too
    if _display.bars is not None:
        _display.bars.stop()
    try:
        yield
    finally:
        _display.lines.paused = False
        if _display.bars is not None:
            _display.bars.start()


def track(what: str, items: Iterable[Item], total: int | None = None, console: Console | None = None) -> Iterator[Item]:
    """The items one by one, counted as they are done.

    Args:
        what: as for :func:`task`.
        items: the items.
        total: how many there are; None asks the items themselves, if they have a length.
        console: as for :func:`task`.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with task(what, total, console=console) as shown:
        for item in items:
            yield item
            shown.advance()


def _display_on(console: Console) -> _Display:
    screen = console if console.is_interactive or console.quiet else Console(emoji=False, stderr=True)
    bars = None
    if screen.is_interactive and not screen.quiet:
        what, said = (TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[said]"))
        # rich prints above the bar. Output that the user sent to a file must still go to that file.
        bars = Progress(
            what, BarColumn(), said, TimeElapsedColumn(), TimeRemainingColumn(), console=screen,
            refresh_per_second=4, transient=True,
            redirect_stdout=sys.stdout.isatty(), redirect_stderr=sys.stderr.isatty(),
        )  # fmt: skip

    def write(line: str) -> None:
        screen.file.write(line)
        screen.file.flush()

    return _Display(screen, bars, _Lines(write))


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
