"""``entropy-fork version``: the versions of this package and of what it works with."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

import entropy_fork
from entropy_fork.cli.at_work import print_json


def version(json: Annotated[bool, typer.Option("--json", help="Print JSON, for a program.")] = False) -> None:
    """Print the versions of this package, verl, torch, ray, transformers and others, without importing them."""
    from entropy_fork.common.supported import why_unsupported
    from entropy_fork.preflight.probe import PACKAGES

    found = {name: _version_of(name) for name in PACKAGES} | {"entropy-fork": entropy_fork.__version__}
    place = str(Path(entropy_fork.__file__).parent)
    if json:
        return print_json({"packages": found, "python": platform.python_version(), "folder": place})
    for name, number in found.items():
        typer.echo(f"{name:<16}{number or _missing(name)}")
    typer.echo(f"{'python':<16}{platform.python_version()}, {sys.executable}")
    typer.echo(f"{'folder':<16}{place}")
    if (verl := found["verl"]) is not None and (problem := why_unsupported(verl)):
        typer.secho(problem, fg="yellow", err=True)
    return None


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _missing(name: str) -> str:
    """The words for a package that pip did not install. Python may still import it, from a checkout on PYTHONPATH."""
    there = find_spec(name) if name.isidentifier() else None
    return "not installed" if there is None or not there.origin else f"no version: not installed, but at {there.origin}"
