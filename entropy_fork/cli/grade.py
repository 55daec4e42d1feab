"""``entropy-fork grade``: is an answer right, and which rule says so? For one pair, or for a file of pairs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from entropy_fork.cli.at_work import at_work, fail
from entropy_fork.common.errors import EntropyForkError


class ConventionName(str, Enum):
    """The names of :data:`entropy_fork.reward.convention.CONVENTIONS`."""

    strict = "strict"
    math = "math"


def grade(
    answer: Annotated[
        str | None,
        typer.Argument(metavar="ANSWER", help="What stands in the box. A minus sign first? Write -- before."),
    ] = None,
    truth: Annotated[str | None, typer.Argument(metavar="TRUTH", help="The ground truth.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="A table of pairs (tabs between columns) with a header: answer, ground_truth, maybe wanted."),
    ] = None,
    why: Annotated[bool, typer.Option("--why", help="Say which rule decided, and how both sides were read.")] = False,
    convention: Annotated[
        ConventionName, typer.Option(help="What counts as equal where people differ: units, percent, order.")
    ] = ConventionName.strict,
) -> None:
    """Say whether an answer equals a ground truth, as the reward does. Exit status 1: it does not."""
    from rich.console import Console

    if (file is None) == (answer is None or truth is None) or (file is not None and answer is not None):
        fail("write ANSWER and TRUTH, or --file PAIRS.tsv")
    with at_work("grade", Console(emoji=False, stderr=True)):
        from entropy_fork.reward import pairs
        from entropy_fork.reward.judge import JudgeError

        try:
            if file is None:
                one = pairs.grade_pair(str(answer), str(truth), convention.value)
            else:
                result = pairs.grade_file(file, convention.value)
        except (EntropyForkError, JudgeError) as error:
            fail(error)
    if file is None:
        _say(one, why)
        raise typer.Exit(0 if one.verdict.equal else 1)
    for graded in result.graded:
        if why or graded.wanted not in (None, pairs.SIGNS[graded.verdict.equal]):
            _say(graded, why, pair_too=True)
    typer.echo(result.summary())
    if result.disagreed:
        raise typer.Exit(1)


def _say(graded: Any, why: bool, pair_too: bool = False) -> None:
    from entropy_fork.common.foreign_text import visible
    from entropy_fork.reward.pairs import SIGNS, reading_of

    words = SIGNS[graded.verdict.equal] if pair_too else ("equal" if graded.verdict.equal else "not equal")
    line = f"{words}\t{visible(graded.answer)}\t{visible(graded.truth)}" if pair_too else words
    if graded.wanted not in (None, SIGNS[graded.verdict.equal]):
        line += f"\twanted {graded.wanted}"
    typer.echo(f"{line}{': ' * (not pair_too) or chr(9)}{visible(graded.verdict.why)}" if why else line)
    if why and not pair_too:
        for name, text in (("answer", graded.answer), ("truth", graded.truth)):
            typer.echo(f"  {name:<7}{visible(reading_of(text))}")
