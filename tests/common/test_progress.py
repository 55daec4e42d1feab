"""Every command shows progress: a bar on a terminal, else lines on stderr, and nothing between the results."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from entropy_fork import cli
from entropy_fork.common import progress
from entropy_fork.common.progress import EVERY, SOON, Task, _Lines, paused, task, track

REPOSITORY = Path(__file__).resolve().parents[2]


class Told:
    """Collects the lines that are written, with a clock that the test sets."""

    def __init__(self) -> None:
        self.now, self.lines = 100.0, list[tuple[float, str]]()
        self.writer = _Lines(lambda line: self.lines.append((self.now - 100, line)), self.clock)

    def clock(self) -> float:
        return self.now

    def begin(self, what: str, total: int | None = None, completed: int = 0) -> Task:
        begun = Task(what, total, completed, _clock=self.clock)
        self.writer.tasks.append(begun)
        return begun

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds * 2)):
            self.now += 0.5
            self.writer.tick()


def test_the_first_line_comes_within_seconds_and_then_one_every_ten() -> None:
    told = Told()
    told.begin("loading")
    told.wait(SOON - 0.5)
    assert told.lines == [], "what is over at once says nothing"
    told.wait(120)
    times = [moment for moment, _ in told.lines]
    assert times[0] == SOON
    assert {after - before for before, after in pairwise(times)} == {EVERY}
    assert len(times) == 12
    assert told.lines[1][1] == "0:00:13  loading\n"


def test_another_phase_is_told_within_seconds_and_never_more_often() -> None:
    told = Told()
    told.begin("evaluate")
    for _ in range(30):
        told.begin("loading").update(note="a")
        told.wait(2)
        told.writer.tasks.pop()
        told.begin("answers", 10)
        told.wait(2)
        told.writer.tasks.pop()
    times = [moment for moment, _ in told.lines]
    assert min(after - before for before, after in pairwise(times)) == SOON
    assert max(after - before for before, after in pairwise(times)) <= 4


def test_a_line_says_what_is_done_and_what_is_left() -> None:
    told = Told()
    answers = told.begin("answers", 960, completed=160)
    told.wait(4)
    answers.advance(40, note="31.2% right\x1b[2J")
    told.wait(10)  # 40 in 14 seconds, 760 to go
    assert [line for _, line in told.lines] == [
        "0:00:03  answers  160/960\n",
        "0:00:13  answers  200/960  31.2% right\\x1b[2J  0:04:07 left\n",
    ]
    answers.update(completed=960)
    told.writer.tick(ended=answers)
    assert told.lines[-1] == (14.0, "0:00:14  answers  960/960  31.2% right\\x1b[2J\n")


def test_the_end_is_told_of_what_was_told_before() -> None:
    told = Told()
    quick = told.begin("answers", 3)
    told.wait(1)
    told.writer.tick(ended=quick)
    assert told.lines == []


def test_a_closed_stderr_does_not_end_the_work() -> None:
    def closed(_: str) -> None:
        raise BrokenPipeError

    lines = _Lines(closed, clock=iter(range(0, 1000, 5)).__next__)
    lines.tasks.append(Task("x", None, 0))
    lines.tick()


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=120)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_a_terminal_gets_a_bar_with_all_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    console = terminal()
    with task("analyze [red]x[/]", console=console):
        for _ in track("answers", range(4)):
            with task("deeper"):
                time.sleep(0.3)
    text = shown(console)
    assert "━" in text
    assert "analyze [red]x[/]" in text
    assert re.search(r"answers .*[1-3]/4", text)
    assert "deeper" in text
    assert capsys.readouterr() == ("", "")
    assert progress._display is None


def test_quiet_is_quiet(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SOON", 0.0)
    with task("x", console=Console(quiet=True)), task("y", 3) as inner:
        time.sleep(0.7)
        inner.advance()
    assert capfd.readouterr() == ("", "")


def test_a_failure_ends_the_display() -> None:
    with pytest.raises(ZeroDivisionError), task("x", console=terminal()), task("y"):
        print(1 / 0)
    assert progress._display is None


@pytest.mark.process
def test_a_redirected_run_says_lines_on_stderr_alone(tmp_path: Path) -> None:
    """A whole process whose main thread is busy."""
    script = (
        "import time\nfrom entropy_fork.common.progress import task\n"
        "with task('outer'), task('inner', 7): time.sleep(4.5)\n"
        "print('result')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "result\n"
    assert re.fullmatch(r"0:00:0\d  inner  0/7\n(0:00:\d\d  inner  0/7\n)+", done.stderr), done.stderr


@pytest.mark.process
def test_a_file_gets_the_results_and_a_terminal_the_bar(tmp_path: Path) -> None:
    """``command > file`` on a terminal: output goes to the file, not above the bar, where rich would draw it."""
    script = (
        "import time, sys\nfrom rich.console import Console\nfrom entropy_fork.common.progress import task\n"
        "with task('work', console=Console()):\n    print('result'); time.sleep(1)\n"
    )
    ours, theirs = pty.openpty()
    with (tmp_path / "out").open("w") as out:
        subprocess.run(
            [sys.executable, "-c", script], stdout=out, stderr=theirs, check=True, cwd=tmp_path,
            env={**os.environ, "TERM": "xterm"},
        )  # fmt: skip
    os.close(theirs)
    drawn = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert (tmp_path / "out").read_text() == "result\n"
    assert "work" in drawn
    assert "━" in drawn
    assert "result" not in drawn


def test_a_child_that_shows_what_it_does_has_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    told.begin("analyze")
    console = terminal()
    monkeypatch.setattr(progress, "_display", progress._Display(console, None, told.writer))
    with paused():
        told.wait(30)
    assert told.lines == []
    with paused(lines_too=False):
        told.wait(30)
    assert len(told.lines) > 2
    with task("x", console=terminal()) as x, paused():
        x.advance()


# ---- every command -----------------------------------------------------------------------------------------------


def commands() -> list[str]:
    found = []
    for app, prefix in ((cli.app, ""), (cli.data_app, "data "), (cli.model_app, "model ")):
        for command in app.registered_commands:
            assert command.callback is not None
            found.append(prefix + (command.name or command.callback.__name__.replace("_", "-")))
    return found


#: the arguments with which each command gets as far as its imports
ARGUMENTS = {
    "evaluate": ["m", "--data", "d", "--output", "o"],
    "analyze": ["m", "--output", "o", "--rollouts", "r"],
    "compare": ["a", "b"],
    "compare-evaluations": ["a", "b"],
    "report": ["o.html"],
    "temperatures": ["m", "--data", "d", "--output", "o"],
    "plan": [],
    "doctor": [],
    "data prepare": ["aime24", "--output", "o"],
    "data tasks": [],
    "model fetch": ["smollm2"],
    "grade": ["1", "1"],
}


#: the commands that import torch or verl
HEAVY = (
    "torch",
    "verl",
    *(f"entropy_fork.{name}" for name in ("analysis", "data", "evaluation", "preflight", "report", "verl")),
)


def test_the_commands_are_these() -> None:
    quick = {"data list", "version", "watch"}  # the run that 'watch' shows says how far it is
    assert set(commands()) == {*ARGUMENTS, *quick}, "a new command says what it does: cli.at_work"


@pytest.mark.parametrize("command", ARGUMENTS)
def test_every_command_says_that_it_is_at_work(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so from its first import on, before any long work."""
    begun, imported, before = list[str](), set[str](), set(sys.modules)

    def stop(what: str, *_: Any, **__: Any) -> Any:
        begun.append(what)
        imported.update(name for name in set(sys.modules) - before if name.startswith(HEAVY))
        raise typer.Exit(7)

    monkeypatch.setattr(progress, "task", stop)
    result = CliRunner().invoke(cli.app, [*command.split(), *ARGUMENTS[command]])
    assert result.exit_code == 7, result.output
    assert begun == [command]
    assert result.output == ""
    assert imported == set()


def test_there_is_one_way_to_show_progress() -> None:
    """A bar of rich or tqdm, or a status, shows nothing if the output is no terminal."""
    private = re.compile(r"from rich\.(progress|status|live) import|rich\.progress\.|tqdm\(|\.status\(\"|\.status\(f\"")
    files = [file for folder in ("entropy_fork", "examples", "benchmarks")
             for file in (REPOSITORY / folder).rglob("*.py")]  # fmt: skip
    assert len(files) > 80
    found = {file.relative_to(REPOSITORY).as_posix() for file in files if private.search(file.read_text("utf-8"))}
    assert found == {"entropy_fork/common/progress.py"}


def test_every_script_that_takes_long_says_how_far_it_is() -> None:
    """Except scripts that are quick, or that start a command which shows progress."""
    uses: Callable[[Path], bool] = lambda file: "entropy_fork.common.progress import" in file.read_text("utf-8")  # noqa: E731
    by_report = {"lm_head.py", "top_ratio.py"}  # seconds_in_turn, in benchmarks/report.py
    quick = {"__init__.py", "engine.py", "live_bytes.py", "token_budget.py", "plugin_timer.py", "prepare_data.py"}
    scripts = [file for file in (REPOSITORY / "benchmarks").glob("*.py") if file.name not in by_report | quick]
    scripts += [REPOSITORY / "examples" / name for name in (
        "smoke.py", "tiny_world.py", "smollm2/build.py", "research/experiment/__main__.py",
        "research/policy_gradient_ladder/ladder.py")]  # fmt: skip
    assert [file.name for file in scripts if not uses(file)] == []
