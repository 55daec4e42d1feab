"""Each command that the demo prints at its end runs exactly as printed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import typer

from entropy_fork.cli import app
from examples.cpu_demo.run import next_commands


def test_the_commands_at_the_end_can_be_typed(tmp_path: Path) -> None:
    for name in ("tokens", "tensorboard"):
        (tmp_path / name).mkdir()
    (tmp_path / "tokens" / "manifest.json").write_text(json.dumps({"source": "training"}))
    report, tensorboard = next_commands(tmp_path, "global")
    for program in (report[0], tensorboard[0]):
        assert os.access(program, os.X_OK), program
    command = typer.main.get_command(app).commands[report[1]]  # type: ignore[attr-defined]
    arguments = command.make_context("report", report[2:]).params  # raises if an option or a file does not exist
    assert tmp_path / "tokens" in map(Path, arguments["tokens"])
    assert tensorboard[1:] == ["--logdir", str(tmp_path / "tensorboard")]
