"""The command ``entropy-fork`` as a whole: what it loads, and how it is started."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import entropy_fork
from entropy_fork.cli import app

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
    named = getattr(import_module(script[1]), script[2])
    assert isinstance(named, typer.Typer)
    for module in ("entropy_fork", "entropy_fork.cli"):
        run = python("-m", module, "--version")
        assert run.stdout.startswith("entropy-fork "), run.stderr


PRINT_LOADED = "; import sys; print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"


def test_version_names_what_is_installed_and_imports_none_of_it(python: Python) -> None:
    code = "from entropy_fork.cli import app; app(['version'], standalone_mode=False)"
    run = python("-c", code + PRINT_LOADED)
    assert run.returncode == 0, run.stderr
    said = dict(line.split(maxsplit=1) for line in run.stdout.splitlines())
    for name in ("verl", "torch", "ray", "transformers"):
        assert said[name] == importlib.metadata.version(name)
    assert said["entropy-fork"] == entropy_fork.__version__
    assert said["python"].startswith(platform.python_version())
    assert said["folder"] == str(Path(entropy_fork.__file__).parent)
    assert HEAVY & set(run.stderr.splitlines()[-1].split()) == set()


def test_version_as_json() -> None:
    result = CliRunner().invoke(app, ["version", "--json"])
    found = json.loads(result.stdout)
    assert found["packages"]["verl"] == importlib.metadata.version("verl")
    assert found["packages"]["sglang"] is None
    assert found["python"] == platform.python_version()


def test_version_answers_where_another_verl_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All other commands refuse it; a report of that needs the versions."""
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.8.0")
    result = CliRunner().invoke(app, ["version"])
    assert result.exit_code == 0
    assert re.search(r"^verl +0\.8\.0$", result.output, re.MULTILINE)
    assert "this is verl 0.8.0" in result.output
    assert CliRunner().invoke(app, ["data", "list"]).exit_code == 1


def test_version_says_what_can_be_imported_without_being_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    output = CliRunner().invoke(app, ["version"]).output
    assert re.search(r"^verl +no version: not installed, but at /.*verl/__init__.py$", output, re.MULTILINE)
    assert re.search(r"^flash-attn +not installed$", output, re.MULTILINE)


def test_a_shell_completes_commands_and_options(python: Python) -> None:
    code = "from entropy_fork.cli import app; app(prog_name='entropy-fork')"
    for typed, expected in (("entropy-fork da", {"data"}), ("entropy-fork report --to", {"--tokens", "--top-ratio"})):
        place = str(len(typed.split()) - 1)
        run = python("-c", code, _ENTROPY_FORK_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=place)
        assert expected <= set(run.stdout.split()), run.stderr
    undetected = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # the shell above may be make's
    script = python("-m", "entropy_fork", "--show-completion", "bash", **undetected).stdout
    assert script.rstrip().endswith("entropy-fork"), "also where the module is run, the script is what is completed"
