"""``entropy-fork temperatures``: accuracy over either of two temperatures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from entropy_fork.cli import options
from entropy_fork.cli.at_work import at_work, print_written


def temperatures(
    model: options.Model,
    data: options.Data,
    output: options.AnswersFolder,
    high: Annotated[
        str, typer.Option(help="Values of T_high, while T_low is fixed; '' for none.")
    ] = "0,0.05,0.3,0.6,1,2,3,5",
    low: Annotated[
        str, typer.Option(help="Values of T_low, while T_high is fixed; '' for none.")
    ] = "0,0.05,0.3,0.6,1,2,3,5",
    fixed_high: Annotated[float, typer.Option(help="T_high while T_low is varied.")] = 1.0,
    fixed_low: Annotated[float, typer.Option(help="T_low while T_high is varied.")] = 1.0,
    threshold: Annotated[
        float | None,
        typer.Option(help="τ in nats: T_high is used where the entropy is above it.", show_default="0.672, Qwen3-8B's"),
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="A folder of 'entropy-fork analyze' to take τ from: the threshold of its top ρ.")
    ] = None,
    answers: options.Answers = 16,
    temperature: Annotated[float, typer.Option(help="T at which entropies are measured.")] = 1.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = -1,
    max_tokens: options.MaxTokens = 20480,
    seed: options.Seed = 0,
    engine: options.Engine = options.EngineName.auto,
    tokenizer: options.Tokenizer = None,
    chat_template: options.ChatTemplate = None,
    dtype: options.Dtype = "auto",
    merged: options.Merged = None,
    batch_size: options.BatchSize = 64,
    tensor_parallel: options.TensorParallel = 1,
    vllm: options.VllmArguments = None,
) -> None:
    """Measure accuracy with one temperature above an entropy threshold and another below it (the paper's Eq. 5)."""
    from rich.console import Console

    console = Console(emoji=False)
    with at_work("temperatures", console, goes_on_in=output):
        from entropy_fork.evaluation import temperature_sweep
        from entropy_fork.evaluation.engines import SamplingSettings, parse_arguments
        from entropy_fork.evaluation.evaluate import EvaluationSettings

        sweep = temperature_sweep.TemperatureSweep(
            high=temperature_sweep.parse_values(high, "--high"),
            low=temperature_sweep.parse_values(low, "--low"),
            fixed_high=fixed_high,
            fixed_low=fixed_low,
            threshold=temperature_sweep.choose_threshold(threshold, like),
        )
        settings = EvaluationSettings(
            model=model,
            data=data,
            output=output,
            answers=answers,
            sampling=SamplingSettings(temperature, top_p, top_k, max_tokens, seed, sweep.points()[0][1]),
            engine=engine.value,
            chat_template=chat_template,
            dtype=dtype,
            merged=merged,
            batch_size=batch_size,
            tensor_parallel=tensor_parallel,
            vllm=parse_arguments(vllm or []),
            tokenizer=tokenizer,
        )
        points = temperature_sweep.run_sweep(settings, sweep, console)
    console.print(temperature_sweep.table(points).rich())
    for note in temperature_sweep.notes(points):
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    names = (temperature_sweep.JSON, *temperature_sweep.PLOTS)
    print_written(console, f"{output / temperature_sweep.CSV}, {', '.join(names)}")
