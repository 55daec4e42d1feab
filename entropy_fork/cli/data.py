"""``entropy-fork data``: the data sets, and how they become verl's parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from entropy_fork.cli.at_work import at_work
from entropy_fork.common.errors import EntropyForkError

data_app = typer.Typer(no_args_is_help=True, help="Prepare training and evaluation data as parquet files for verl.")


@data_app.command("list")
def data_list() -> None:
    """List the data sets that 'entropy-fork data prepare' knows."""
    from rich.console import Console
    from rich.table import Column, Table

    from entropy_fork.data.sources import SOURCES

    table = Table(
        Column("source", no_wrap=True), "what", Column("on the hub", overflow="fold"), "rows", "use", "license"
    )
    for source in SOURCES.values():
        place = " ".join(part for part in (source.hub, source.config or source.file) if part)
        table.add_row(source.name, source.title, place, source.rows, source.use, source.license)
    Console().print(table)


@data_app.command("prepare")
def data_prepare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Names from 'entropy-fork data list'; 'benchmarks' means all evaluation sets.",
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder in which SOURCE/train.parquet or SOURCE/test.parquet is written.")
    ],
    local: Annotated[
        Path | None, typer.Option("--from", help="A local file or folder of the source; the hub is then not asked.")
    ] = None,
    revision: Annotated[
        str, typer.Option(help="Branch, tag or commit on the hub. The manifest records the commit.")
    ] = "main",
    limit: Annotated[int | None, typer.Option(min=1, help="Keep at most this many rows, the first ones.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier call wrote.")] = False,
) -> None:
    """Turn data sets into verl's parquet: cleaned, without duplicates, with a manifest and a list of unusable rows."""
    from rich.console import Console

    console = Console(stderr=True)
    with at_work("data prepare", console):
        from entropy_fork.common.progress import paused
        from entropy_fork.data.prepare import check_free, prepare
        from entropy_fork.data.read import from_files, from_hub
        from entropy_fork.data.sources import named

        sources = named(names)
        if local is not None and len(sources) != 1:
            raise EntropyForkError("--from names the files of one data set: write one SOURCE with it")
        if local is not None and revision != "main":
            raise EntropyForkError("--revision is for the hub, and --from does not ask the hub: write one of the two")
        for source in sources:
            check_free(output.absolute() / source.name, overwrite)
        for source in sources:
            with paused(lines_too=False):  # the hub's libraries draw bars of their own
                rows = from_hub(source, revision) if local is None else from_files(source, local)
            manifest = prepare(source, rows, output, console, limit=limit, overwrite=overwrite)
            dropped = ", ".join(f"{count:,} {reason}" for reason, count in manifest["dropped"].items())
            file = output / source.name / manifest["file"]
            typer.echo(
                f"{file}: {manifest['rows_out']:,} of {manifest['rows_in']:,} rows ({dropped or 'none dropped'})"
            )
