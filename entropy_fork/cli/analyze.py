"""``entropy-fork analyze`` and ``compare``: the entropy of every response token, of one checkpoint and of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from entropy_fork.cli import options
from entropy_fork.cli.at_work import at_work, print_tables, print_written


def analyze(
    model: options.Model,
    output: Annotated[Path, typer.Option(help="Folder for the tokens; the same command continues there.")],
    prompts: Annotated[
        list[Path] | None,
        typer.Option(help="A parquet file in verl's format, whose questions the model answers; may be repeated."),
    ] = None,
    rollouts: Annotated[
        Path | None,
        typer.Option(help="The folder that a run wrote with trainer.rollout_data_dir, whose texts are measured."),
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="A folder of 'analyze'; the same tokens are measured with this model.")
    ] = None,
    top_ratio: Annotated[float, typer.Option(help="ρ: the share of all tokens that is marked as forks.")] = 0.2,
    temperature: Annotated[
        float | None,
        typer.Option(help="T, for sampling and for p = softmax(z/T). Default: 1, or the T of --like."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="At most this many questions of --prompts, answers per step of --rollouts, answers of --like."
        ),
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option(help="A step of --rollouts; may be repeated. Default: all steps.")
    ] = None,
    answers: Annotated[int, typer.Option(help="Answers per question of --prompts.")] = 1,
    max_tokens: options.MaxTokens = 20480,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = -1,
    seed: options.Seed = 0,
    tokenizer: options.Tokenizer = None,
    chat_template: options.ChatTemplate = None,
    engine: options.Engine = options.EngineName.auto,
    dtype: options.Dtype = "auto",
    merged: options.Merged = None,
    batch_size: options.BatchSize = 64,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of one forward pass when measuring.")] = 32768,
    tensor_parallel: options.TensorParallel = 1,
    vllm: options.VllmArguments = None,
    min_count: options.MinCount = 101,
    score: options.Scores = None,
) -> None:
    """Measure entropy, log-prob and rank of every response token; show distribution, forks, words and parts."""
    from rich.console import Console

    console = Console(emoji=False)
    with at_work("analyze", console, goes_on_in=output):
        from entropy_fork.analysis import results

        results.check_installed()
        from entropy_fork.analysis.analyze import AnalysisSettings
        from entropy_fork.analysis.analyze import analyze as analyze_tokens
        from entropy_fork.analysis.token_scores import ALWAYS, named_scores
        from entropy_fork.evaluation.engines import SamplingSettings, parse_arguments
        from entropy_fork.evaluation.evaluate import EvaluationSettings

        scores = named_scores(score or [], ALWAYS)
        answering = None
        if prompts:
            sampling = SamplingSettings(1.0 if temperature is None else temperature, top_p, top_k, max_tokens, seed)
            answering = EvaluationSettings(
                model, prompts, output, answers, sampling, engine.value, chat_template, dtype, merged, batch_size,
                tensor_parallel, parse_arguments(vllm or []), tokenizer,
            )  # fmt: skip
        settings = AnalysisSettings(
            model, output, answering, rollouts, like, tuple(steps or ()), limit, temperature, top_ratio, dtype,
            batch_tokens, merged, tokenizer,
        )  # fmt: skip
        analyze_tokens(settings, console)
        summary = results.summarise_and_write(output, min_count, scores, top_ratio)
    print_tables(console, results.summary_tables(summary))
    print_written(console, f"{output / results.SUMMARY}, *.csv, {results.FIGURES}/")


def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...", help="Folders of 'analyze' with the same tokens, in the order of training."
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="Folder for JSON, CSV and figures.")] = None,
    top_ratio: Annotated[float, typer.Option(help="ρ: the share of tokens whose positions are compared.")] = 0.2,
) -> None:
    """Compare checkpoints of one run on the same texts: do the forks stay, and where does the entropy change?"""
    from rich.console import Console

    console = Console(emoji=False)
    with at_work("compare", console):
        from entropy_fork.analysis import results

        results.check_installed()
        from entropy_fork.analysis.compare import compare as compare_folders

        comparison = compare_folders(folders, top_ratio)
        if output is not None:
            results.write_comparison(comparison, output)
    print_tables(console, results.comparison_tables(comparison))
    if output is not None:
        print_written(console, f"{output / results.COMPARISON}, *.csv, {results.FIGURES}/")
