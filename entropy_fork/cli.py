"""The command ``entropy-fork``. Each command imports what it needs when it is called, so that ``--help`` is quick."""

from __future__ import annotations

from typing import Annotated

import typer

import entropy_fork

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Train on forking tokens in an unmodified verl: data, checks before a run, evaluation after it.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"entropy-fork {entropy_fork.__version__}")
        raise typer.Exit


@app.callback()
def main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Options of the command itself."""


if __name__ == "__main__":
    app()
