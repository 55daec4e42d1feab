"""The launcher's terminal: one line per step, and everything that verl prints in a file.

Hook: none. Ray brings all output to the launcher's stdout and stderr, so both are put into a pipe while ``run_ppo``
runs (see ``launch.py``). A thread reads the pipe, writes the file and shows the view. verl's loggers are untouched.
``entropy_fork.short_output=False`` leaves the terminal to verl.
"""

from __future__ import annotations

import atexit
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from entropy_fork.common.foreign_text import visible
from entropy_fork.sweep.jobs import MARK
from entropy_fork.watch.follow import BEGIN, ELSEWHERE, END, OUTPUT
from entropy_fork.watch.output import Failure
from entropy_fork.watch.view import View

#: Ray brings the last lines of its workers in this time
DRAIN_SECONDS = 1.5


@contextmanager
def short_output(config: DictConfig) -> Iterator[None]:
    """Show the view of a run instead of verl's output, during this block.

    Args:
        config: the root of a run that asks for it.
    """
    # In a job of a sweep, the sweep shows the lines, and has a file of its own for the output.
    if MARK in os.environ or not _has_terminal():
        yield
        return
    if "console" not in _loggers(config):
        print(
            f"entropy_fork: no lines per step, because trainer.logger={_loggers(config)} has no console. Everything "
            f"that verl prints follows.",
            flush=True,
        )
        yield
        return
    place = Path(str(config.trainer.default_local_dir)).absolute() / OUTPUT
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        file = place.open("a", errors="replace")
        with place.open("rb") as there:  # a run that goes on from a checkpoint appends
            lines_before = sum(1 for _ in there)
    except OSError as error:
        print(f"entropy_fork: no lines per step, because {place} cannot be written: {error}", flush=True)
        yield
        return
    with _closing(file), _Terminal(file, _total(config)) as terminal:
        terminal.view.place = os.fspath(place)
        terminal.view.reader.lines = lines_before + 1  # and the line that says that a run begins
        with suppress(Exception):  # a terminal that has been closed does not stop a run
            terminal.view.say(f"{ELSEWHERE}{place}")
        steps = f"total_training_steps={_total(config)}"
        _write(file, f"{BEGIN}, {datetime.now().isoformat(timespec='seconds')}, {steps}: {shlex.join(sys.argv)}\n")
        try:
            yield
        except BaseException as error:
            time.sleep(DRAIN_SECONDS)
            terminal.close()
            _write(file, f"{END} with {type(error).__name__}\n")
            if isinstance(error, Exception):
                atexit.register(_say_first_cause, terminal.view.reader.first_failure, place)
            raise
        time.sleep(DRAIN_SECONDS)
        terminal.close()
        _write(file, f"{END}\n")
        with suppress(Exception):  # the run is over and good, whatever its last words meet
            terminal.view.finish(next_commands(config))


def _has_terminal() -> bool:
    """Whether this process has a stdout and a stderr. A service may start it without."""
    try:
        for number in (1, 2):
            os.fstat(number)
    except OSError:
        return False
    return sys.stdout is not None and sys.stderr is not None


def _loggers(config: DictConfig) -> list[str]:
    logger = OmegaConf.select(config, "trainer.logger", default=[])
    return [logger] if isinstance(logger, str) else list(logger or [])


def _total(config: DictConfig) -> int | None:
    total = OmegaConf.select(config, "trainer.total_training_steps", default=None)
    return int(total) if isinstance(total, int) else None


def next_commands(config: DictConfig) -> list[str]:
    """What can be typed after a run: its report, its curves, an evaluation of its last checkpoint."""
    trainer, commands = config.trainer, []
    tokens = _tokens(config)
    curves = os.environ.get("TENSORBOARD_DIR", f"tensorboard_log/{trainer.project_name}/{trainer.experiment_name}")
    has_curves = "tensorboard" in _loggers(config) and Path(curves).is_dir()
    if tokens is not None or has_curves:
        page = [str(Path(trainer.default_local_dir) / "report.html")]
        page += ["--tokens", str(tokens)] if tokens is not None else []
        page += ["--run", f"{trainer.experiment_name}={curves}"] if has_curves else []
        commands.append([_program("entropy-fork"), "report", *page])
    if has_curves:
        commands.append([_program("tensorboard"), "--logdir", curves])
    found = [path for path in Path(trainer.default_local_dir).glob("global_step_*") if path.name[12:].isdecimal()]
    if checkpoints := sorted(found, key=lambda path: int(path.name[12:])):
        files = config.data.val_files
        data = [word for f in ([files] if isinstance(files, str) else files or []) for word in ("--data", str(f))]
        into = Path(trainer.default_local_dir) / f"evaluation_of_step_{checkpoints[-1].name[12:]}"
        line = [_program("entropy-fork"), "evaluate", str(checkpoints[-1] / "actor"), *data, "--output", str(into)]
        commands.append([*line, "--max-tokens", str(config.data.max_response_length)])
    return [shlex.join(command) for command in commands]


def _tokens(config: DictConfig) -> Path | None:
    node = config.get("entropy_fork")
    if not node or not node.dump_every:
        return None
    folder = Path(node.dump_dir or Path(config.trainer.default_local_dir) / "tokens")
    return folder if folder.is_dir() else None


def _program(name: str) -> str:
    """A program of this environment, as short as it can be typed."""
    program = Path(sys.executable).parent / name
    return os.fspath(program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program)


def _say_first_cause(failure: Failure | None, place: Path) -> None:
    if failure is None:
        print(f"entropy_fork: everything that verl printed: {place}", file=sys.stderr, flush=True)
        return
    who = f" in {failure.process}" if failure.process else ""
    where = f"the first error{who}, line {failure.line} of {place}"
    print(f"entropy_fork: {where}:\n{visible(failure.text)}", file=sys.stderr, flush=True)


def _write(file: IO[str], text: str) -> None:
    with suppress(OSError, ValueError):
        file.write(text)
        file.flush()


@contextmanager
def _closing(file: IO[str]) -> Iterator[None]:
    """Close a file at the end, also where the disk is full."""
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            file.close()


class _Terminal:
    """Puts this process's stdout and stderr into a pipe, and a thread behind it. The thread reads whatever happens."""

    def __init__(self, file: IO[str], total: int | None):
        self._file = file
        self._total = total
        self._closed = False

    def __enter__(self) -> _Terminal:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._saved = {number: os.dup(number) for number in (1, 2)}
        self._out = os.fdopen(os.dup(1), "w", errors="replace")
        read, write = os.pipe()
        for number in (1, 2):
            os.dup2(write, number)
        os.close(write)
        self.view = View(Console(emoji=False, file=self._out), self._total)
        self.view.__enter__()
        self._thread = threading.Thread(target=self._read, args=(read,), name="entropy_fork output", daemon=True)
        self._thread.start()
        return self

    def _read(self, read: int) -> None:
        with os.fdopen(read, errors="replace", newline="\n") as lines:
            for line in lines:
                _write(self._file, line)
                with suppress(Exception):  # whatever a terminal does, the run must be able to write on
                    self.view.feed(line)

    def close(self) -> None:
        """Give stdout and stderr back. The thread ends when nobody has the pipe any more."""
        if self._closed:
            return
        self._closed = True
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        for number, saved in self._saved.items():
            os.dup2(saved, number)
            os.close(saved)
        self._thread.join(timeout=2)  # a process of Ray's may hold the pipe for a while
        self.view.__exit__()

    def __exit__(self, *error: Any) -> None:
        self.close()
        with suppress(OSError, ValueError):
            self._out.flush()
