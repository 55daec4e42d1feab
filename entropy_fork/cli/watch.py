"""``entropy-fork watch``: a run on one line per step, from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from entropy_fork.cli.at_work import fail
from entropy_fork.common.errors import EntropyForkError


def watch(
    run: Annotated[
        Path,
        typer.Argument(help="The run's trainer.default_local_dir, or a file with its output (Slurm's)."),
    ],
    once: Annotated[bool, typer.Option("--once", help="Show what is there, and end.")] = False,
) -> None:
    """Show a run on one line per step while it trains, from another terminal or another node. Ctrl-C ends this only."""
    from rich.console import Console

    from entropy_fork.watch.follow import watch as show
    from entropy_fork.watch.view import View

    try:
        show(run, View(Console(emoji=False)), follow=not once)
    except EntropyForkError as error:
        fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
