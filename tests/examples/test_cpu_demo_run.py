"""What the demo prints at its end: each command runs as it is printed."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer

from entropy_fork.cli import app

RUN = Path(__file__).resolve().parents[2] / "examples" / "cpu_demo" / "run.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    specification = importlib.util.spec_from_file_location("cpu_demo_run", RUN)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["cpu_demo_run"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def test_the_commands_at_the_end_can_be_typed(demo: ModuleType, tmp_path: Path) -> None:
    for name in ("tokens", "tensorboard"):
        (tmp_path / name).mkdir()
    (tmp_path / "tokens" / "manifest.json").write_text(json.dumps({"source": "training"}))
    report, tensorboard = demo.next_commands(tmp_path, "global")
    for program in (report[0], tensorboard[0]):
        assert os.access(program, os.X_OK), program
    command = typer.main.get_command(app).commands[report[1]]  # type: ignore[attr-defined]
    arguments = command.make_context("report", report[2:]).params  # raises for an option or a file that is not there
    assert tmp_path / "tokens" in map(Path, arguments["tokens"])
    assert tensorboard[1:] == ["--logdir", str(tmp_path / "tensorboard")]
