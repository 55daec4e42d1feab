"""``entropy-fork report``: one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from entropy_fork.cli import options
from entropy_fork.cli.at_work import at_work


def report(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT.html", help="The file to write.")],
    tokens: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER", help="A folder of 'analyze', or entropy_fork.dump_dir of a run; may be repeated."
        ),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="Training curves from tensorboard files; may be repeated."),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="A checkpoint's folder of 'analyze', for a comparison; given twice or more, in the order of training.",
        ),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder to write the figures to as well, as SVG and PNG.")
    ] = None,
    top_ratio: Annotated[float, typer.Option(help="ρ of --compare.")] = 0.2,
    min_count: options.MinCount = 101,
    answers: Annotated[
        int, typer.Option(min=1, help="Answers per folder that the page shows, evenly spread. Figures use all answers.")
    ] = 200,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Forking tokens",
    score: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="The score that the tokens are marked by at first: a built-in one, or a function of yours, "
            "package.module:function; may be repeated. Default: that of the run, or the entropy.",
        ),
    ] = None,
) -> None:
    """Write one self-contained HTML file: coloured tokens, figures and tables of the analyses, training curves."""
    from rich.console import Console

    with at_work("report", Console(emoji=False, stderr=True)) as shown:
        from entropy_fork.report import curves, page

        settings = page.ReportSettings(
            output=output,
            tokens=tokens or [],
            runs=[curves.parse_run(text) for text in run or []],
            compare=compare or [],
            top_ratio=top_ratio,
            min_count=min_count,
            figures=figures,
            answers=answers,
            title=title,
            scores=score or [],
        )
        page.write(settings, shown.say)
    typer.echo(f"written: {output} ({output.stat().st_size / 1e6:.1f} MB)")
