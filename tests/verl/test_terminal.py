"""The launcher's terminal, in processes of their own: stdout and stderr are taken and given back."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from omegaconf import OmegaConf

from entropy_fork.cli import app
from entropy_fork.verl.terminal import next_commands

PROGRAM = """
import subprocess, sys, threading
from omegaconf import OmegaConf
from entropy_fork.verl.terminal import short_output

config = OmegaConf.create({
    "trainer": {"default_local_dir": sys.argv[1], "logger": json.loads(sys.argv[2]), "total_training_steps": 2,
                "project_name": "p", "experiment_name": "e"},
    "data": {"val_files": ["v.parquet"], "max_response_length": 7},
    "entropy_fork": {"dump_every": 0, "dump_dir": None},
})
STEP = "(TaskRunner pid=1) step:{} - critic/score/mean:0.5 - timing_s/step:1.0"
with short_output(config):
    print("much that verl prints")
    print(STEP.format(1))
    subprocess.run([sys.executable, "-c", "import sys; print('from a child', file=sys.stderr)"])
    WORK
    threading.Thread(target=print, args=(STEP.format(2),)).start()
print("the terminal is back")
"""
FAILS = """
print("(Reward pid=5) Traceback (most recent call last):\\n(Reward pid=5) KeyError: 'answer'")
    raise RuntimeError("a consequence")
"""

Python = Callable[..., "subprocess.CompletedProcess[str]"]


def run(
    python: Python, folder: Path, work: str = "pass", logger: tuple[str, ...] = ("console",)
) -> subprocess.CompletedProcess[str]:
    program = "import json\n" + PROGRAM.replace("WORK", work.strip())
    return python("-c", program, str(folder), json.dumps(logger))


def test_the_terminal_has_the_steps_and_the_file_has_everything(python: Python, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / "global_step_2" / "actor").mkdir(parents=True)
    done = run(python, folder)
    assert done.returncode == 0, done.stderr
    assert f"everything that verl prints: {folder / 'verl.log'}" in done.stdout
    assert "step    1  reward 0.500  seconds 1.0\nstep    2" in done.stdout
    assert "much that verl prints" not in done.stdout
    assert "the terminal is back" in done.stdout
    assert f"evaluate {folder}/global_step_2/actor --data v.parquet" in done.stdout
    written = (folder / "verl.log").read_text()
    for text in ("much that verl prints", "from a child", "step:2", "entropy_fork: the run ended"):
        assert text in written
    assert "the terminal is back" not in written
    assert run(python, folder).returncode == 0
    assert (folder / "verl.log").read_text().startswith(written), "a run that goes on must append"


def test_a_run_that_fails_ends_with_the_first_cause(python: Python, tmp_path: Path) -> None:
    done = run(python, tmp_path, FAILS)
    assert done.returncode == 1
    written = (tmp_path / "verl.log").read_text()
    line = 1 + written.splitlines().index("(Reward pid=5) KeyError: 'answer'")
    said = f"entropy_fork: the first error in Reward pid 5, line {line} of {tmp_path}/verl.log:\nKeyError: 'answer'\n"
    assert done.stderr.endswith(said)
    assert "RuntimeError: a consequence" in done.stderr
    assert "the run ended with RuntimeError" in written


@pytest.mark.parametrize("why", ["no console", "no folder"])
def test_where_it_cannot_be_the_terminal_stays_verls(python: Python, tmp_path: Path, why: str) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "x" if why == "no folder" else tmp_path
    done = run(python, folder, logger=("console",) if why == "no folder" else ("tensorboard",))
    assert done.returncode == 0
    assert "entropy_fork: no lines per step, because" in done.stdout
    assert "much that verl prints" in done.stdout


def test_the_commands_at_the_end_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that are there, options that they have, folders that the run has made."""
    (tmp_path / "global_step_9" / "actor").mkdir(parents=True)
    (tmp_path / "global_step_10" / "actor").mkdir(parents=True)
    for name in ("tokens", "curves"):
        (tmp_path / name).mkdir()
    (tmp_path / "tokens" / "manifest.json").write_text(json.dumps({"source": "training"}))
    (tmp_path / "v.parquet").write_text("")
    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "curves"))
    trainer = {"default_local_dir": str(tmp_path), "logger": ["console", "tensorboard"]}
    config = {
        "trainer": {**trainer, "project_name": "p", "experiment_name": "run"},
        "data": {"val_files": str(tmp_path / "v.parquet"), "max_response_length": 7},
        "entropy_fork": {"dump_every": 1, "dump_dir": None},
    }
    commands = [shlex.split(command) for command in next_commands(OmegaConf.create(config))]
    assert [Path(words[0]).name for words in commands] == ["entropy-fork", "tensorboard", "entropy-fork"]
    for words in commands:
        assert os.access(words[0], os.X_OK), words[0]
        if Path(words[0]).name == "entropy-fork":  # raises for an option or a file that is not there
            typer.main.get_command(app).commands[words[1]].make_context(words[1], words[2:])  # type: ignore[attr-defined]
    assert str(tmp_path / "global_step_10" / "actor") in commands[2]


@pytest.mark.parametrize("work", ["os.close(1), os.close(2)", "sys.stdout = None"])
def test_a_run_without_a_terminal_runs(python: Python, tmp_path: Path, work: str) -> None:
    """Services start programs without stdout and stderr. Stock verl runs there too."""
    program = PROGRAM.replace("with short_output", f"import os; {work}\nwith short_output").replace("WORK", "")
    program = program.replace("print(", "max(").replace("file=sys.stderr", "key=str")
    program += "\nopen(sys.argv[1] + '/over', 'w').close()"
    done = python("-c", f"import json\n{program}", str(tmp_path), json.dumps(["console"]))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "over").exists()
    assert not (tmp_path / "verl.log").exists(), "a file would have taken the number of stdout"


def test_a_folder_that_is_no_checkpoint_does_not_fail_a_finished_run(python: Python, tmp_path: Path) -> None:
    for name in ("global_step_2", "global_step_9.kept", "global_step_"):
        (tmp_path / name / "actor").mkdir(parents=True)
    done = run(python, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"evaluate {tmp_path}/global_step_2/actor" in done.stdout


def test_a_full_disk_does_not_stop_a_run(python: Python, tmp_path: Path) -> None:
    """The pipe must be read whatever happens to the file: otherwise the run would wait for ever to print."""
    work = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); print('x' * 500_000)"
    import signal

    done = run(python, tmp_path, f"import signal; signal.signal({int(signal.SIGXFSZ)}, signal.SIG_IGN); {work}")
    assert done.returncode == 0, done.stderr
    assert "step    2" in done.stdout
