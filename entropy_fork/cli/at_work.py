"""What every command does around its work: show that it runs, turn an error into one line, print results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from entropy_fork.common.errors import EntropyForkError

if TYPE_CHECKING:
    from rich.console import Console

    from entropy_fork.common.progress import Task


@contextmanager
def at_work(what: str, console: Console | None = None, goes_on_in: Path | None = None) -> Iterator[Task]:
    """Show that a command is at work, its imports included. An error of ours becomes one line and exit status 1.

    Args:
        what: the command.
        console: as for :func:`entropy_fork.common.progress.task`.
        goes_on_in: the folder in which the same command continues after a stop; None if it starts anew.

    Raises:
        Exit: with status 1 after an error of ours, and with status 130 after Ctrl-C if the command can continue.
    """
    from entropy_fork.common.progress import task

    try:
        with task(what, console=console) as shown:
            yield shown
    except EntropyForkError as error:
        fail(error)
    except KeyboardInterrupt:
        if goes_on_in is None:
            raise
        typer.secho(f"stopped; the same command goes on with what is in {goes_on_in}", err=True)
        raise typer.Exit(130) from None


def fail(error: Exception | str) -> NoReturn:
    """Print one error and end the command with exit status 1.

    Raises:
        Exit: always.
    """
    from entropy_fork.common.foreign_text import visible

    typer.secho(f"error: {visible(str(error), kept=chr(10))}", fg="red", err=True)
    raise typer.Exit(code=1) from None


def print_written(console: Console, what: str) -> None:
    """Say which files were written, on one line that can be copied."""
    console.print(f"written: {what}", soft_wrap=True, highlight=False, markup=False)


def print_tables(console: Console, tables: list[tuple[str, Any]]) -> None:
    """Print tables, each under its title."""
    from rich.markup import escape

    for title, table in tables:
        console.print(f"\n[bold]{escape(title)}[/bold]", highlight=False)
        console.print(table.rich())


def print_json(value: dict[str, Any]) -> None:
    """Print a result for a program to read."""
    typer.echo(json.dumps(value, indent=2))
