"""The view of a run from the file that its output goes to: ``entropy-fork watch``, and what comes of a finished run."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.watch.output import Reader, Step
from entropy_fork.watch.view import View

#: in a run's ``trainer.default_local_dir``: everything that verl prints
OUTPUT = "verl.log"

#: the first and the last line that ``entropy_fork/verl/terminal.py`` writes to it
BEGIN, END = "entropy_fork: a run begins", "entropy_fork: the run ended"

#: what a launcher says of its own file, for a terminal or a scheduler's file that holds the view alone
ELSEWHERE = "everything that verl prints: "

POLL_SECONDS = 0.5


def output_of(run: Path) -> Path:
    """The file with a run's output.

    Args:
        run: the file; or a folder that has it: ``trainer.default_local_dir``, or a folder above it with one run. A file
            that holds the view alone (a scheduler's) names the file.

    Raises:
        EntropyForkError: there is none, or there are several.
    """
    if run.is_dir():
        found = [run / OUTPUT] if (run / OUTPUT).is_file() else sorted(run.rglob(OUTPUT))
        if len(found) != 1:
            which = f"several: {', '.join(map(str, found[:5]))}" if found else f"no {OUTPUT}"
            raise EntropyForkError(
                f"{run} has {which}. Give a run's trainer.default_local_dir, or a file with the output of a run."
            )
        return found[0]
    if not run.is_file():
        raise EntropyForkError(f"{run} is not there. Give a run's trainer.default_local_dir, or its output.")
    with run.open(errors="replace") as file:
        for _, line in zip(range(1000), file, strict=False):
            if ELSEWHERE in line and (other := Path(line.split(ELSEWHERE)[1].strip())).is_file():
                return other
    return run


def steps_of(run: Path) -> list[Step]:
    """The steps of a run so far, in order.

    Raises:
        EntropyForkError: as :func:`output_of`.
    """
    reader = Reader()
    with output_of(run).open(errors="replace") as file:
        for line in file:
            reader.read(line)
    return [reader.steps[number] for number in sorted(reader.steps)]


def lines_of(file: Path, follow: bool, sleep: Callable[[float], object] = time.sleep) -> Iterator[str]:
    """The lines of the last run in a file, also those that come later.

    Args:
        file: see :func:`output_of`.
        follow: wait for more until the run has ended; False stops at the end of the file.
        sleep: waits for a number of seconds.
    """
    with file.open(errors="replace") as lines:
        lines.seek(_last_begin(file))
        part = ""
        while True:
            if not (read := lines.readline()):
                if not follow:
                    return
                sleep(POLL_SECONDS)
                continue
            part += read
            if not part.endswith("\n"):  # it is being written
                continue
            yield part
            if part.startswith(END):
                return
            part = ""


def watch(run: Path, view: View, follow: bool = True) -> None:
    """Show a run from its file, to its end.

    Raises:
        EntropyForkError: as :func:`output_of`.
    """
    file = output_of(run)
    view.place = str(file)
    view.say(f"reading {file}")
    with view:
        for line in lines_of(file, follow):
            if total := re.search(r"total_training_steps=(\d+)", line) if line.startswith(BEGIN) else None:
                view.set_total(int(total[1]))
            view.feed(line)
    view.finish()


def _last_begin(file: Path) -> int:
    """Where the last run in a file begins: a run that goes on from a checkpoint appends to the file."""
    last, mark = 0, BEGIN.encode()
    with file.open("rb") as lines:
        place = 0
        for line in lines:
            if line.startswith(mark):
                last = place
            place += len(line)
    return last
