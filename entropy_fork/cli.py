"""The command ``entropy-fork``. Each command imports what it needs when it is called, so that ``--help`` is quick."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import entropy_fork

if TYPE_CHECKING:
    from rich.console import Console

    from entropy_fork.common.progress import Task

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
    """Options of the command itself. Each command imports verl: with one that we refuse, it could only fail."""
    import contextlib
    import importlib.metadata
    import os

    from entropy_fork.common.cores import waiting_passively
    from entropy_fork.common.supported import why_unsupported

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a checkout on PYTHONPATH tells when imported
        if problem := why_unsupported(importlib.metadata.version("verl")):
            _fail(problem)
    os.environ.update(waiting_passively(os.environ))  # before torch is imported: OpenMP reads it once


data_app = typer.Typer(no_args_is_help=True, help="Training and evaluation data as verl's parquet.")
app.add_typer(data_app, name="data")


@data_app.command("list")
def data_list() -> None:
    """The data sets that 'entropy-fork data prepare' knows."""
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
            metavar="SOURCE...", help="From 'entropy-fork data list'; 'benchmarks' means all for evaluation."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder; SOURCE/train.parquet or SOURCE/test.parquet is made in it.")],
    local: Annotated[
        Path | None, typer.Option("--from", help="A local file or folder of the source, instead of the hub.")
    ] = None,
    revision: Annotated[
        str, typer.Option(help="Branch, tag or commit on the hub; the manifest names the commit that it was.")
    ] = "main",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows, the first ones.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Turn data sets into verl's parquet: cleaned, deduplicated, with a manifest and a list of unusable rows."""
    from rich.console import Console

    console = Console(stderr=True)
    with _at_work("data prepare", console):
        from entropy_fork.common.errors import EntropyForkError
        from entropy_fork.common.progress import paused
        from entropy_fork.data.prepare import check_free, prepare
        from entropy_fork.data.read import from_files, from_hub
        from entropy_fork.data.sources import named

        sources = named(names)
        if local is not None and len(sources) != 1:
            raise EntropyForkError("--from names the files of one data set: write one SOURCE with it")
        if local is not None and revision != "main":
            raise EntropyForkError("--revision is of the hub: write either it or --from")
        for source in sources:
            check_free(output.absolute() / source.name, overwrite)
        for source in sources:
            with paused(lines_too=False):  # the hub's libraries have bars of their own
                rows = from_hub(source, revision) if local is None else from_files(source, local)
            manifest = prepare(source, rows, output, console, limit=limit, overwrite=overwrite)
            dropped = ", ".join(f"{count:,} {reason}" for reason, count in manifest["dropped"].items())
            file = output / source.name / manifest["file"]
            typer.echo(
                f"{file}: {manifest['rows_out']:,} of {manifest['rows_in']:,} rows ({dropped or 'none dropped'})"
            )


class EngineName(str, Enum):
    """What samples."""

    auto = "auto"
    vllm = "vllm"
    transformers = "transformers"


class PaperModel(str, Enum):
    """The models of the paper's table."""

    qwen3_8b = "8b"
    qwen3_14b = "14b"
    qwen3_32b = "32b"


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder, or verl's checkpoint …/global_step_N/actor.")],
    data: Annotated[list[Path], typer.Option(help="A parquet file in verl's format; may be repeated.")],
    output: Annotated[Path, typer.Option(help="Folder for answers and results; a second call goes on there.")],
    answers: Annotated[int, typer.Option(help="Answers per question: k of Acc@k.")] = 16,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_p: float = 1.0,
    top_k: Annotated[int, typer.Option(help="-1: off.")] = -1,
    max_tokens: Annotated[int, typer.Option(help="Length limit of an answer.")] = 20480,
    seed: Annotated[int, typer.Option(help="Of all answers; each has its own, derived from it.")] = 0,
    engine: Annotated[EngineName, typer.Option(help="auto: vLLM where it is installed.")] = EngineName.auto,
    chat_template: Annotated[
        str | None, typer.Option(help="'paper', or a Jinja file or text, as in training; else the tokenizer's own.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), bfloat16, float16 or float32.")] = "auto",
    merged: Annotated[
        Path | None, typer.Option(help="Keep the Hugging Face folder made of a sharded checkpoint here.")
    ] = None,
    compare: Annotated[PaperModel | None, typer.Option(help="Show the paper's numbers of this model beside.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at once, engine transformers.")] = 64,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs per copy of the model, engine vllm.")] = 1,
    vllm: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A further argument of vllm.LLM; may be repeated.")
    ] = None,
) -> None:
    """Accuracy with its uncertainty, length and pass@k of a checkpoint, per benchmark and on average."""
    from rich.console import Console

    console = Console()
    with _at_work("evaluate", console, goes_on_in=output):
        from entropy_fork.evaluation import report, run
        from entropy_fork.evaluation.engines import Sampling, parse_arguments

        settings = run.Settings(
            model=model,
            data=data,
            output=output,
            answers=answers,
            sampling=Sampling(temperature, top_p, top_k, max_tokens, seed),
            engine=engine.value,
            chat_template=chat_template,
            dtype=dtype,
            merged=merged,
            batch_size=batch_size,
            tensor_parallel=tensor_parallel,
            vllm=parse_arguments(vllm or []),
        )
        evaluation = run.evaluate(settings, console)
        report.write(evaluation, output, compare and compare.value)
    for table in report.tables(evaluation, compare and compare.value):
        console.print(table.rich())
    console.print(
        f"written: {output / report.RESULTS}, {report.TABLES}, answers.jsonl",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


@app.command()
def analyze(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder, or verl's checkpoint …/global_step_N/actor.")],
    output: Annotated[Path, typer.Option(help="Folder for the tokens; the same command goes on there.")],
    prompts: Annotated[
        list[Path] | None, typer.Option(help="Parquet in verl's format; the model answers. May be repeated.")
    ] = None,
    rollouts: Annotated[
        Path | None, typer.Option(help="What a run dumped with trainer.rollout_data_dir; its texts are measured.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="A folder that was measured; the same tokens are measured with this model.")
    ] = None,
    top_ratio: Annotated[float, typer.Option(help="The share of all tokens that is marked as forks.")] = 0.2,
    temperature: Annotated[
        float | None, typer.Option(help="T, of sampling and of p = softmax(z/T); 1, or that of --like.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most so many questions, answers of each step, or answers of --like.")
    ] = None,
    steps: Annotated[list[int] | None, typer.Option(help="A step of --rollouts; may be repeated.")] = None,
    answers: Annotated[int, typer.Option(help="Answers per question of --prompts.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Length limit of an answer.")] = 20480,
    top_p: float = 1.0,
    top_k: Annotated[int, typer.Option(help="-1: off.")] = -1,
    seed: Annotated[int, typer.Option(help="Of all answers.")] = 0,
    chat_template: Annotated[
        str | None, typer.Option(help="'paper', or a Jinja file or text, as in training; else the tokenizer's own.")
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="What answers; auto: vLLM where it is installed.")] = (
        EngineName.auto
    ),
    dtype: Annotated[str, typer.Option(help="auto (as stored), bfloat16, float16 or float32.")] = "auto",
    merged: Annotated[
        Path | None, typer.Option(help="Keep the Hugging Face folder made of a sharded checkpoint here.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at once when answering, engine transformers.")] = 64,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of one forward pass when measuring.")] = 32768,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs per copy of the model, engine vllm.")] = 1,
    vllm: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A further argument of vllm.LLM; may be repeated.")
    ] = None,
    min_count: Annotated[
        int, typer.Option(min=1, help="How often a token must be seen for the tables of highest and lowest.")
    ] = 101,
) -> None:
    """Entropy, log-prob and rank of every response token, and what they say: distribution, forks, words, parts."""
    from rich.console import Console

    console = Console()
    with _at_work("analyze", console, goes_on_in=output):
        from entropy_fork.analysis import report_files

        report_files.check_installed()
        from entropy_fork.analysis import run
        from entropy_fork.analysis.summary import summarise
        from entropy_fork.common.progress import task
        from entropy_fork.evaluation.engines import Sampling, parse_arguments
        from entropy_fork.evaluation.run import Settings as Drawing
        from entropy_fork.tokens.store import parts

        drawing = None
        if prompts:
            sampling = Sampling(1.0 if temperature is None else temperature, top_p, top_k, max_tokens, seed)
            drawing = Drawing(
                model, prompts, output, answers, sampling, engine.value, chat_template, dtype, merged, batch_size,
                tensor_parallel, parse_arguments(vllm or []),
            )  # fmt: skip
        settings = run.Settings(
            model, output, drawing, rollouts, like, tuple(steps or ()), limit, temperature, top_ratio, dtype,
            batch_tokens, merged,
        )  # fmt: skip
        run.analyze(settings, console)
        with task("summary", len(parts(output))) as shown:
            summary = summarise(output, min_count, advance=shown.advance)
        with task("figures"):
            report_files.write_summary(summary, output)
    _print_tables(console, report_files.summary_tables(summary))
    console.print(f"written: {output / report_files.SUMMARY}, *.csv, {report_files.FIGURES}/", soft_wrap=True,
                  highlight=False, markup=False)  # fmt: skip


@app.command()
def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Measured on the same tokens, in the order of training.")
    ],
    output: Annotated[Path | None, typer.Option(help="Folder for JSON, CSV and figures.")] = None,
    top_ratio: Annotated[float, typer.Option(help="ρ: the positions that are compared.")] = 0.2,
) -> None:
    """Checkpoints of one run on the same texts: do the forks stay, and where does the entropy change?"""
    from rich.console import Console

    console = Console()
    with _at_work("compare", console):
        from entropy_fork.analysis import report_files

        report_files.check_installed()
        from entropy_fork.analysis.compare import compare as compare_folders

        comparison = compare_folders(folders, top_ratio)
        if output is not None:
            report_files.write_comparison(comparison, output)
    _print_tables(console, report_files.comparison_tables(comparison))


@app.command()
def report(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT.html", help="The file to write.")],
    tokens: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Of 'analyze', or a run's entropy_fork.dump_dir; may be repeated."),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="Training curves from tensorboard files; may be repeated."),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Twice or more, in the order of training: as the command 'compare'."),
    ] = None,
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help="The figures as SVG and PNG, too.")] = None,
    top_ratio: Annotated[float, typer.Option(help="ρ of --compare.")] = 0.2,
    min_count: Annotated[
        int, typer.Option(min=1, help="How often a token must be seen for the tables of highest and lowest.")
    ] = 101,
    answers: Annotated[int, typer.Option(min=1, help="To look at, per folder, evenly spread; figures use all.")] = 200,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Forking tokens",
) -> None:
    """One self-contained HTML file: coloured tokens, the analyses' figures and tables, training curves."""
    from rich.console import Console

    with _at_work("report", Console(stderr=True)) as shown:
        from entropy_fork.report import curves, page

        settings = page.Settings(
            output=output,
            tokens=tokens or [],
            runs=[curves.parse_run(text) for text in run or []],
            compare=compare or [],
            top_ratio=top_ratio,
            min_count=min_count,
            figures=figures,
            answers=answers,
            title=title,
        )
        page.write(settings, shown.say)
    typer.echo(f"written: {output} ({output.stat().st_size / 1e6:.1f} MB)")


@app.command()
def temperatures(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder, or verl's checkpoint …/global_step_N/actor.")],
    data: Annotated[list[Path], typer.Option(help="A parquet file in verl's format; may be repeated.")],
    output: Annotated[Path, typer.Option(help="Folder for answers and results; a second call goes on there.")],
    high: Annotated[str, typer.Option(help="Values of T_high, T_low fixed; '' for none.")] = "0,0.05,0.3,0.6,1,2,3,5",
    low: Annotated[str, typer.Option(help="Values of T_low, T_high fixed; '' for none.")] = "0,0.05,0.3,0.6,1,2,3,5",
    fixed_high: Annotated[float, typer.Option(help="T_high while T_low is varied.")] = 1.0,
    fixed_low: Annotated[float, typer.Option(help="T_low while T_high is varied.")] = 1.0,
    threshold: Annotated[
        float | None, typer.Option(help="τ in nats; T_high is used above it.", show_default="0.672, Qwen3-8B's")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="Take τ from this folder of tokens ('entropy-fork analyze'): its top ρ's.")
    ] = None,
    answers: Annotated[int, typer.Option(help="Answers per question: k of Acc@k.")] = 16,
    temperature: Annotated[float, typer.Option(help="T, which entropies are measured at.")] = 1.0,
    top_p: float = 1.0,
    top_k: Annotated[int, typer.Option(help="-1: off.")] = -1,
    max_tokens: Annotated[int, typer.Option(help="Length limit of an answer.")] = 20480,
    seed: Annotated[int, typer.Option(help="Of all answers; each has its own, derived from it.")] = 0,
    engine: Annotated[EngineName, typer.Option(help="auto: vLLM where it is installed.")] = EngineName.auto,
    chat_template: Annotated[
        str | None, typer.Option(help="'paper', or a Jinja file or text, as in training; else the tokenizer's own.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), bfloat16, float16 or float32.")] = "auto",
    merged: Annotated[
        Path | None, typer.Option(help="Keep the Hugging Face folder made of a sharded checkpoint here.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at once, engine transformers.")] = 64,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs per copy of the model, engine vllm.")] = 1,
    vllm: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A further argument of vllm.LLM; may be repeated.")
    ] = None,
) -> None:
    """One temperature above an entropy and another below it (the paper's Eq. 5): accuracy over either of them."""
    from rich.console import Console

    console = Console()
    with _at_work("temperatures", console, goes_on_in=output):
        from entropy_fork.common.errors import EntropyForkError
        from entropy_fork.evaluation import run
        from entropy_fork.evaluation import temperatures as sweeping
        from entropy_fork.evaluation.engines import Sampling, parse_arguments
        from entropy_fork.sampling.temperature import PAPER_THRESHOLD

        if threshold is not None and like is not None:
            raise EntropyForkError("--threshold and --like both name τ: write one of them")
        tau = sweeping.threshold_of(like) if like is not None else PAPER_THRESHOLD if threshold is None else threshold
        sweep = sweeping.Sweep(
            high=sweeping.parse_values(high, "--high"),
            low=sweeping.parse_values(low, "--low"),
            fixed_high=fixed_high,
            fixed_low=fixed_low,
            threshold=tau,
        )
        settings = run.Settings(
            model=model,
            data=data,
            output=output,
            answers=answers,
            sampling=Sampling(temperature, top_p, top_k, max_tokens, seed, sweep.points()[0][1]),
            engine=engine.value,
            chat_template=chat_template,
            dtype=dtype,
            merged=merged,
            batch_size=batch_size,
            tensor_parallel=tensor_parallel,
            vllm=parse_arguments(vllm or []),
        )
        points = sweeping.run_sweep(settings, sweep, console)
    console.print(sweeping.table(points).rich())
    console.print(
        f"written: {output / sweeping.CSV}, {sweeping.JSON}, {', '.join(sweeping.PLOTS)}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


#: Hydra's overrides pass through as they are
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=OVERRIDES)
def plan(
    context: typer.Context,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="what you would write after 'python -m verl.trainer.main_ppo'")
    ] = None,
    config_name: Annotated[str, typer.Option(help="verl's config, as main_ppo's --config-name")] = "ppo_trainer",
    model_config: Annotated[
        str | None, typer.Option(help="a config.json or a built-in shape (qwen3-8b, …), where the model is not here")
    ] = None,
    gpu_memory_gib: Annotated[float, typer.Option(help="of one accelerator")] = 80.0,
    json: Annotated[bool, typer.Option("--json", help="all of it, for a program")] = False,
) -> None:
    """What a run would do to a cluster: what would stop it, tokens and memory per GPU. Starts nothing.

    entropy-fork plan +recipe=qwen3_14b_20k +cluster=paper_16x8 entropy_fork.top_ratio=0.1
    """
    with _at_work("plan"):
        from entropy_fork.preflight import plan as planning

        made = planning.make_plan([*(overrides or []), *context.args], config_name, model_config, gpu_memory_gib)
    if json:
        _print_json(made.to_json())
    else:
        from entropy_fork.preflight.tables import print_plan

        print_plan(made)
    raise typer.Exit(code=1 if made.errors else 0)


@app.command(context_settings=OVERRIDES)
def doctor(
    context: typer.Context,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="a command line of main_ppo, to be told what it would mask")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="a running Ray cluster ('auto', 'HOST:6379'): one worker per node is asked")
    ] = None,
    config_name: Annotated[str, typer.Option(help="verl's config, as main_ppo's --config-name")] = "ppo_trainer",
    json: Annotated[bool, typer.Option("--json", help="all of it, for a program")] = False,
) -> None:
    """Is everything here that a run needs? Asks this process and a Ray worker; ends with 1 if something is wrong.

    entropy-fork doctor +recipe=qwen3_14b_20k entropy_fork.top_ratio=0.1
    """
    with _at_work("doctor"):
        from entropy_fork.preflight.doctor import diagnose

        found = diagnose([*(overrides or []), *context.args], address, config_name)
    if json:
        _print_json(found.to_json())
    else:
        from entropy_fork.preflight.doctor_tables import print_diagnosis

        print_diagnosis(found)
    raise typer.Exit(code=1 if found.problems else 0)


@contextmanager
def _at_work(what: str, console: Console | None = None, goes_on_in: Path | None = None) -> Iterator[Task]:
    """Show that a command is at work, its imports included; an error of ours becomes one line and an exit status.

    Args:
        what: the command.
        console: as for :func:`entropy_fork.common.progress.task`.
        goes_on_in: the folder with which the same command goes on when it was stopped.
    """
    from entropy_fork.common.progress import task

    try:
        with task(what, console=console) as shown:
            yield shown
    except Exception as error:
        from entropy_fork.common.errors import EntropyForkError  # imports verl, which takes long

        if isinstance(error, EntropyForkError):
            _fail(error)
        raise
    except KeyboardInterrupt:
        if goes_on_in is None:
            raise
        typer.secho(f"stopped; the same command goes on with what is in {goes_on_in}", err=True)
        raise typer.Exit(130) from None


def _print_tables(console: Any, tables: list[tuple[str, Any]]) -> None:
    from rich.markup import escape

    for title, table in tables:
        console.print(f"\n[bold]{escape(title)}[/bold]", highlight=False)
        console.print(table.rich())


def _print_json(value: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))


def _fail(error: Exception | str) -> NoReturn:
    from entropy_fork.common.foreign_text import visible

    typer.secho(f"error: {visible(str(error), kept=chr(10))}", fg="red", err=True)
    raise typer.Exit(code=1) from None


if __name__ == "__main__":
    app()
