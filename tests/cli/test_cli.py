"""The command ``entropy-fork`` as a whole: what it loads, and how it is started."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import typer

Python = Callable[..., subprocess.CompletedProcess[str]]
HEAVY = {"torch", "transformers", "pyarrow", "matplotlib", "numpy", "verl", "ray", "hydra"}


def test_help_loads_nothing_heavy(python: Python) -> None:
    """So it is quick: each command imports what it needs when it is called."""
    run = python("-c", "import sys, entropy_fork.cli; print(*{name.split('.')[0] for name in sys.modules})")
    assert run.returncode == 0, run.stderr
    assert "typer" in run.stdout.split()
    assert HEAVY & set(run.stdout.split()) == set()


def test_the_command_and_the_module_are_the_same(python: Python) -> None:
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    script = re.search(r'^entropy-fork = "([\w.]+):(\w+)"$', project, re.MULTILINE)
    assert script is not None
    app = getattr(import_module(script[1]), script[2])
    assert isinstance(app, typer.Typer)
    run = python("-m", "entropy_fork.cli", "--version")
    assert run.stdout.startswith("entropy-fork "), run.stderr
