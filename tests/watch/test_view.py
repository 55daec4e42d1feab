"""What is shown of a run's output, from lines as verl, Ray and libraries write them."""

from __future__ import annotations

import io
import math
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.watch.follow import BEGIN, ELSEWHERE, END, lines_of, output_of, steps_of, watch
from entropy_fork.watch.output import Reader, Step
from entropy_fork.watch.view import MOST_WARNINGS, View, line_of

RUNNER = "\x1b[36m(TaskRunnerV1 pid=13414)\x1b[0m "
STEP = (
    f"{RUNNER}step:21 - actor/entropy:np.float64(0.163) - critic/score/mean:0.547 - entropy_fork/kept_ratio:0.2 - "
    f"entropy_fork/threshold:4.39e-01 - response_length/mean:25.92 - timing_s/step:5.344 - training/odd:nan\n"
)
VALIDATED = (
    f"{RUNNER}step:0 - val-core/gsm8k/acc/mean@4:0.25 - val-core/aime/acc/mean@8:0.75 - val-aux/aime/x/mean@8:9\n"
)


def shown(*lines: str) -> list[str]:
    text = io.StringIO()
    view = View(Console(file=text, width=200), place="verl.log")
    with view:
        for line in lines:
            view.feed(line)
    return text.getvalue().splitlines()


def test_a_step_is_one_line() -> None:
    assert shown(STEP) == ["step   21  reward 0.547  kept 0.200  τ 0.439  entropy 0.163  length 25.9  seconds 5.3"]
    step = Reader().read(STEP)
    assert isinstance(step, Step)
    assert math.isnan(step.metrics["training/odd"])


def test_accuracy_is_the_mean_over_data_sets() -> None:
    assert shown(VALIDATED) == ["step    0  accuracy 0.500"]


@pytest.mark.parametrize("text", ["First, step:3 - reward:9", "step:3 - we add the numbers"])
def test_an_answer_that_verl_prints_is_no_step(text: str) -> None:
    """verl's line begins with the step, and has metrics."""
    assert shown(f"{RUNNER}{text}\n") == []


def test_a_step_that_was_not_masked_has_no_share() -> None:
    assert "kept" not in line_of(Step(1, {"critic/score/mean": 1.0}))


@pytest.mark.parametrize(
    "line",
    [
        "WARNING:2026-11-25 23:50:37,131:{}",
        "2026-11-25 23:50:37,131 - WARNING - transfer_queue.utils.common - {}",
        "2026-11-25 23:48:24,533\tWARNING authentication_token_setup.py:85 -- {}",
        "/a/b.py:12: FutureWarning: {}",
        "Warning: {}",
        "WARNING:2026-11-25 23:50:37,131:{} [repeated 489x across cluster]\x1b[32m (Ray deduplicates logs)\x1b[0m",
    ],
)
def test_a_warning_is_shown_once_from_whomever_it_comes(line: str) -> None:
    """Each of these loggers, several processes, other numbers."""
    first, again = (
        f"{RUNNER}{line.format('8 threads of 2')}\n",
        f"(W pid=2, ip=10.0.0.2) {line.format('4 threads of 2')}\n",
    )
    assert shown(first, again, first) == ["warning: 8 threads of 2"]


def test_many_kinds_of_warnings_are_not_all_shown() -> None:
    lines = shown(*(f"Warning: {'x' * number}\n" for number in range(1, MOST_WARNINGS + 20)))
    assert len(lines) == MOST_WARNINGS + 1
    assert lines[-1] == "warning: more kinds of warnings are in verl.log"


def test_everything_else_is_not_shown_and_ours_is() -> None:
    assert shown(
        "ray init kwargs: {'num_cpus': 32}\n", f"{RUNNER}{{'actor': 1}}\n", f"{RUNNER}entropy_fork: is active\n"
    ) == ["is active"]


def test_a_quiet_run_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no bar. Fewer and fewer lines, until the next step."""
    monkeypatch.setattr("entropy_fork.watch.view.QUIET_SECONDS", 0.1)
    text = io.StringIO()
    with View(Console(file=text, width=200)) as view:
        time.sleep(0.5)
        before = text.getvalue().count("starting Ray")
        view.feed(STEP)
        time.sleep(0.3)
    assert 1 <= before <= 3
    assert "training, 21 steps are done" in text.getvalue()


def test_a_line_cannot_command_the_terminal() -> None:
    assert shown("Warning: \x1b]0;title\x07 [bold]x[/bold]\n") == [r"warning: \x1b]0;title\x07 [bold]x[/bold]"]


def test_an_error_of_ours_is_shown() -> None:
    """The fork server's, for example: the launcher prints it, and no traceback follows."""
    assert shown("EntropyForkError: the fork server ended\n", "  its last line\n") == [
        "EntropyForkError: the fork server ended"
    ]


def test_the_first_error_is_remembered_not_the_last() -> None:
    reader = Reader()
    lines = [
        "(RewardLoopWorker pid=7) Traceback (most recent call last):\n",
        "(Other pid=8) Traceback (most recent call last):\n",
        '(RewardLoopWorker pid=7)   File "/x/reward.py", line 3, in score\n',
        "(RewardLoopWorker pid=7) KeyError: 'answer'\n",
        "(Other pid=8) ray.exceptions.RayTaskError(KeyError): ray::score() (pid=7)\n",
        "(TaskRunner pid=9) Traceback (most recent call last):\n",
        "(TaskRunner pid=9) RuntimeError: Sync replay buffer selected terminal groups\n",
    ]
    for line in lines:
        reader.read(line)
    assert reader.first_failure is not None
    assert (reader.first_failure.text, reader.first_failure.process, reader.first_failure.line) == (
        "KeyError: 'answer'", "RewardLoopWorker pid 7", 4,
    )  # fmt: skip


def test_a_line_that_only_looks_like_an_error_is_none() -> None:
    reader = Reader()
    reader.read("ValueError: in a text of the model\n")
    assert reader.first_failure is None


def test_a_file_is_followed_to_its_end(tmp_path: Path) -> None:
    """A run that goes on from a checkpoint appends; what is being written is not read in halves."""
    file = tmp_path / "verl.log"
    file.write_text(
        f"{BEGIN}, total_training_steps=9: x\n{VALIDATED}{END}\n{BEGIN}, total_training_steps=30: x\n{STEP[:90]}"
    )

    def write_on() -> None:
        time.sleep(0.3)
        with file.open("a") as appended:
            appended.write(f"{STEP[90:]}{END}\n")

    writer = threading.Thread(target=write_on)
    writer.start()
    lines = list(lines_of(file, follow=True))
    writer.join()
    assert lines == [f"{BEGIN}, total_training_steps=30: x\n", STEP, f"{END}\n"]
    assert [step.number for step in steps_of(tmp_path)] == [0, 21]


def test_a_run_is_found_by_its_folder_or_by_a_file_that_names_it(tmp_path: Path) -> None:
    run = tmp_path / "checkpoints" / "run"
    run.mkdir(parents=True)
    (run / "verl.log").write_text(STEP)
    (tmp_path / "slurm-1.out").write_text(f"{ELSEWHERE}{run / 'verl.log'}\nstep 21\n")
    (tmp_path / "stock.out").write_text(STEP)
    for given in (run, tmp_path, run / "verl.log", tmp_path / "slurm-1.out"):
        assert output_of(given) == run / "verl.log"
    assert output_of(tmp_path / "stock.out") == tmp_path / "stock.out"
    text = io.StringIO()
    watch(run, View(Console(file=text, width=200)), follow=False)
    assert "reward 0.547" in text.getvalue()


@pytest.mark.parametrize("how", ["empty", "two", "missing"])
def test_what_is_no_run_is_one_clear_error(tmp_path: Path, how: str) -> None:
    if how == "two":
        for name in "ab":
            (tmp_path / name).mkdir()
            (tmp_path / name / "verl.log").write_text("")
    with pytest.raises(EntropyForkError, match=r"Give a run's trainer\.default_local_dir"):
        output_of(tmp_path / "missing" if how == "missing" else tmp_path)
