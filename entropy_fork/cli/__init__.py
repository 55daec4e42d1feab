"""The command ``entropy-fork``, one file per family of commands.

A command imports what it needs when it is called, so that ``--help`` is quick: no module here imports torch,
transformers, pyarrow, matplotlib or verl at its top.
"""

from __future__ import annotations

from typing import Annotated

import typer

import entropy_fork
from entropy_fork.cli.analyze import analyze, compare
from entropy_fork.cli.at_work import fail
from entropy_fork.cli.data import data_app
from entropy_fork.cli.evaluate import compare_evaluations, evaluate
from entropy_fork.cli.grade import grade
from entropy_fork.cli.model import model_app
from entropy_fork.cli.preflight import OVERRIDES, doctor, plan
from entropy_fork.cli.report import report
from entropy_fork.cli.temperatures import temperatures
from entropy_fork.cli.version import version
from entropy_fork.cli.watch import watch

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Train on forking tokens in an unmodified verl: prepare data, check a run before it starts, evaluate it "
    "afterwards.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"entropy-fork {entropy_fork.__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Refuse a verl that we do not support before any command imports it, and set up OpenMP."""
    import contextlib
    import importlib.metadata
    import os

    from entropy_fork.common.cores import waiting_passively
    from entropy_fork.common.supported import why_unsupported

    if context.invoked_subcommand == "version":
        return  # it says which verl is there, supported or not
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # verl on PYTHONPATH is checked when imported
        if problem := why_unsupported(importlib.metadata.version("verl")):
            fail(problem)
    os.environ.update(waiting_passively(os.environ))  # before torch is imported: OpenMP reads it once


app.command()(evaluate)
app.command()(compare_evaluations)
app.command()(analyze)
app.command()(compare)
app.command()(report)
app.command()(temperatures)
app.command(context_settings=OVERRIDES)(plan)
app.command(context_settings=OVERRIDES)(doctor)
app.command()(grade)
app.command()(watch)
app.command()(version)
app.add_typer(data_app, name="data")
app.add_typer(model_app, name="model")
