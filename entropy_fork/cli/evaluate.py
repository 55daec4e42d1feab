"""``entropy-fork evaluate`` and ``compare-evaluations``: a checkpoint on benchmarks, and two of them compared."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from entropy_fork.cli import options
from entropy_fork.cli.at_work import at_work, print_written


class PaperModel(str, Enum):
    """The models of the paper's table."""

    qwen3_8b = "8b"
    qwen3_14b = "14b"
    qwen3_32b = "32b"


def evaluate(
    model: options.Model,
    data: options.Data,
    output: options.AnswersFolder,
    answers: options.Answers = 16,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = -1,
    max_tokens: options.MaxTokens = 20480,
    seed: options.Seed = 0,
    engine: options.Engine = options.EngineName.auto,
    tokenizer: options.Tokenizer = None,
    chat_template: options.ChatTemplate = None,
    dtype: options.Dtype = "auto",
    merged: options.Merged = None,
    compare: Annotated[
        PaperModel | None, typer.Option(help="Show the paper's numbers for this model beside yours.")
    ] = None,
    batch_size: options.BatchSize = 64,
    tensor_parallel: options.TensorParallel = 1,
    vllm: options.VllmArguments = None,
) -> None:
    """Measure a checkpoint on benchmarks: accuracy with its uncertainty, length of the answers, pass@k."""
    from rich.console import Console

    console = Console(emoji=False)
    with at_work("evaluate", console, goes_on_in=output):
        from entropy_fork.evaluation import evaluate as evaluation
        from entropy_fork.evaluation import results
        from entropy_fork.evaluation.engines import SamplingSettings, parse_arguments

        settings = evaluation.EvaluationSettings(
            model=model,
            data=data,
            output=output,
            answers=answers,
            sampling=SamplingSettings(temperature, top_p, top_k, max_tokens, seed),
            engine=engine.value,
            chat_template=chat_template,
            dtype=dtype,
            merged=merged,
            batch_size=batch_size,
            tensor_parallel=tensor_parallel,
            vllm=parse_arguments(vllm or []),
            tokenizer=tokenizer,
        )
        evaluated = evaluation.evaluate(settings, console)
        results.write(evaluated, output, compare and compare.value)
    for table in results.tables(evaluated, compare and compare.value):
        console.print(table.rich())
    print_written(console, f"{output / results.RESULTS}, {results.TABLES}, answers.jsonl")


def compare_evaluations(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="A folder of 'evaluate'.")],
    after: Annotated[
        Path, typer.Argument(metavar="AFTER", help="Another one, with the same questions, k and sampling settings.")
    ],
    output: Annotated[Path | None, typer.Option(help="Folder for JSON, Markdown and the figure.")] = None,
) -> None:
    """Compare two folders of 'evaluate' question by question: differences with intervals, questions won and lost."""
    from rich.console import Console

    from entropy_fork.common.foreign_text import visible

    console = Console(emoji=False)
    with at_work("compare-evaluations", console):
        from entropy_fork.evaluation import compare, compare_results

        if output is not None:
            compare_results.check_installed()
        paired = compare.compare_evaluations(before, after)
        if output is not None:
            compare_results.write(paired, output)
    for table in compare_results.tables(paired):
        console.print(table.rich())
    for note in paired.notes:
        console.print(f"{visible(note)}.", soft_wrap=True, highlight=False, markup=False)
    if output is not None:
        print_written(
            console, f"{output / compare_results.JSON}, {', '.join([compare_results.TABLES, *compare_results.PLOTS])}"
        )
