"""``entropy-fork data``: the data sets, and how they become verl's parquet."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from entropy_fork.cli.at_work import at_work
from entropy_fork.common.errors import EntropyForkError

data_app = typer.Typer(no_args_is_help=True, help="Prepare training and evaluation data as parquet files for verl.")


class Split(str, Enum):
    """What rows are for."""

    train = "train"
    test = "test"


@data_app.command("list")
def data_list() -> None:
    """List the data sets that 'entropy-fork data prepare' knows. It takes files of your own too."""
    from rich.console import Console
    from rich.table import Column, Table

    from entropy_fork.data.sources import SOURCES

    table = Table(
        Column("source", no_wrap=True), "what", Column("on the hub", overflow="fold"), "rows", "use", "license"
    )
    for source in SOURCES.values():
        place = " ".join(part for part in (source.hub, source.config or source.file) if part)
        use = source.use if source.test_split is None else f"{source.use}, {source.test_split}"
        table.add_row(source.name, source.title, place, source.rows, use, source.license)
    table.add_row(
        "reasoning_gym", "generated: see 'entropy-fork data tasks'", "not there, but on PyPI", "any number",
        "train, test", "Apache-2.0",
    )  # fmt: skip
    Console(emoji=False).print(table)


@data_app.command("prepare")
def data_prepare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE|FILE...",
            help="Names from 'entropy-fork data list'; 'benchmarks' means all evaluation sets. reasoning_gym generates "
            "questions, see --task. With --question and --answer: your own files or folders (parquet, JSON lines, "
            "JSON, CSV).",
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder in which NAME/train.parquet or NAME/test.parquet is written.")
    ] = Path("data"),
    question: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Your own files: the column with the question; a.b is a field.")
    ] = None,
    answer: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Your own files: the column with the right answer.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Your own files: the name of the data set, its folder and its metrics. reasoning_gym: of the folder."
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="The instruction behind each question, or a text with {question} in it. Default: ours."),
    ] = None,
    split: Annotated[
        Split | None, typer.Option(help="What the rows are for, and which split of the hub is taken.")
    ] = None,
    holdout: Annotated[
        int,
        typer.Option(
            min=0,
            help="Draw this many rows at random, and write them to test.parquet instead. reasoning_gym: as many more "
            "questions of each task.",
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the draw of --holdout. reasoning_gym: of the questions.")] = 0,
    task: Annotated[
        list[str] | None,
        typer.Option(help="reasoning_gym: a task from 'entropy-fork data tasks'; may be repeated."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="reasoning_gym: questions of each task for training. Default: 1000.")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="TASK.OPTION=VALUE",
            help="reasoning_gym: how difficult a task is, such as chain_sum.max_digits=1; may be repeated.",
        ),
    ] = None,
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

    console = Console(emoji=False, stderr=True)
    with at_work("data prepare", console):
        from entropy_fork.common.progress import paused
        from entropy_fork.data.generated import NAME, Wanted, prepare_generated, read_options
        from entropy_fork.data.prepare import Form, check_free, prepare
        from entropy_fork.data.read import from_files, from_hub
        from entropy_fork.data.sources import folder_name, for_evaluation, named, own_source
        from entropy_fork.data.template import INSTRUCTION, asks_for_a_box

        if NAME in names or task or size or options:
            not_for_it = {
                "--question": question, "--answer": answer, "--split": split, "--from": local, "--limit": limit,
                "--revision": revision != "main",
            }  # fmt: skip
            _refuse_others(names, [option for option, given in not_for_it.items() if given], task)
            wanted = Wanted(
                tuple(dict.fromkeys(task or [])), size or 1000, holdout, seed, read_options(options or [], task or []),
                INSTRUCTION if template is None else template, folder_name(name or NAME),
            )  # fmt: skip
            _say_what_was_generated(output / wanted.name, prepare_generated(wanted, output, console, overwrite))
            return
        own = _own_columns(question, answer, name)
        if own is not None:
            if local is not None:
                raise EntropyForkError("--from is for the known sources; write your own files without it")
            if revision != "main":
                raise EntropyForkError("--revision is for the hub, and your own files are local: leave it out")
            sources, paths = [own_source(*own)], [Path(each) for each in names]
        else:
            sources, paths = named(names), [] if local is None else [local]
            if local is not None and len(sources) != 1:
                raise EntropyForkError("--from names the files of one data set: write one SOURCE with it")
            if local is not None and revision != "main":
                raise EntropyForkError(
                    "--revision is for the hub, and --from does not ask the hub: write one of the two"
                )
        if split is Split.test:
            sources = [for_evaluation(source) for source in sources]
        if wrong := [source.name for source in sources if split is Split.train and source.use != "train"]:
            raise EntropyForkError(f"{wrong[0]} is for evaluation: leave --split train out")
        if wrong := [source.name for source in sources if holdout and source.use != "train"]:
            raise EntropyForkError(f"--holdout is for training data, and {wrong[0]} is for evaluation: leave it out")
        form = Form(INSTRUCTION if template is None else template, holdout, seed)
        if not asks_for_a_box(form.template):
            typer.echo(
                "note: the template does not ask for \\boxed{}, and pkg://entropy_fork.reward looks for nothing else: "
                "use a reward function of your own with these data",
                err=True,
            )
        for source in sources:
            check_free(output.absolute() / source.name, overwrite)
        for source in sources:
            with paused(lines_too=False):  # the hub's libraries draw bars of their own
                rows = from_files(source, paths) if paths else from_hub(source, revision)
            manifest = prepare(source, rows, output, console, limit=limit, overwrite=overwrite, form=form)
            _say_what_was_written(output / source.name, manifest)


@data_app.command("tasks")
def data_tasks(
    task: Annotated[str | None, typer.Argument(help="Show this task's options, and one of its questions.")] = None,
) -> None:
    """List the tasks of reasoning-gym, of which 'data prepare reasoning_gym' generates questions."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(emoji=False)
    with at_work("data tasks", Console(emoji=False, stderr=True)):
        from entropy_fork.common.foreign_text import visible
        from entropy_fork.data.generated import example_of, known_tasks, options_of

        if task is None:
            table = Table(Column("task", no_wrap=True), Column("kind", no_wrap=True), "options")
            for name, (dataset, _) in known_tasks().items():
                table.add_row(name, dataset.__module__.split(".")[1], ", ".join(options_of(name)))
        else:
            table = Table("option", "default")
            for option, value in options_of(task).items():
                table.add_row(f"{task}.{option}", repr(value))
            entry = example_of(task)
    console.print(table)
    if task is not None:
        typer.echo(f"{visible(entry['question'].strip(), kept=chr(10))}\nanswer: {visible(str(entry['answer']))}")


def _refuse_others(names: list[str], surplus: list[str], tasks: list[str] | None) -> None:
    """Refuse what does not go together with questions that are generated."""
    if names != ["reasoning_gym"]:
        raise EntropyForkError(
            "--task, --size and --set are for reasoning_gym, which is prepared in a call of its own: write "
            "'entropy-fork data prepare reasoning_gym --task TASK'"
        )
    if surplus:
        raise EntropyForkError(f"{surplus[0]} is not for reasoning_gym, whose questions are generated: leave it out")
    if not tasks:
        raise EntropyForkError(
            "reasoning_gym needs --task TASK, such as --task chain_sum; 'entropy-fork data tasks' lists them"
        )


def _say_what_was_generated(folder: Path, manifest: dict[str, Any]) -> None:
    for name, told in manifest["tasks"].items():
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in told["dropped"].items())
        counts = " and ".join(f"{told[use]:,} for {use}" for use in ("train", "test") if use in told)
        typer.echo(f"{name}: {counts} of {told['drawn']:,} questions ({dropped or 'none dropped'})")
    for told in manifest["files"].values():
        typer.echo(f"{folder / told['file']}: {told['rows']:,} rows (seed {manifest['seed']})")


def _own_columns(question: str | None, answer: str | None, name: str | None) -> tuple[str, str, str] | None:
    """The name and the columns of the user's own data; None if a known source was asked for."""
    if question is None and answer is None and name is None:
        return None
    options = {"--question COLUMN": question, "--answer COLUMN": answer, "--name NAME": name}
    if missing := [option for option, value in options.items() if not value]:
        raise EntropyForkError(f"your own files need --question, --answer and --name: add {', '.join(missing)}")
    return str(name), str(question), str(answer)


def _say_what_was_written(folder: Path, manifest: dict[str, Any]) -> None:
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in manifest["dropped"].items())
    holdout = manifest.get("holdout")
    rows = manifest["rows_out"] - (holdout["rows"] if holdout else 0)
    file = folder / manifest["file"]
    typer.echo(f"{file}: {rows:,} of {manifest['rows_in']:,} rows ({dropped or 'none dropped'})")
    if holdout:
        typer.echo(f"{folder / holdout['file']}: {holdout['rows']:,} rows held out (seed {holdout['seed']})")
    if set(manifest["dropped"]) - {"duplicate", "beyond_limit"}:
        typer.echo(f"{folder / 'rejected.jsonl'}: the rows that cannot be used, each with the reason", err=True)
