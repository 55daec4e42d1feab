"""Prints a plan as tables, for a person."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from entropy_fork.preflight.add_up import Engines, Logits, ModelSummary
from entropy_fork.preflight.memory import Layout, in_gib
from entropy_fork.preflight.plan import Plan
from entropy_fork.preflight.step import Step

#: a table: what is counted, and the number
Lines = list[tuple[str, str]]


def print_plan(plan: Plan) -> None:
    """Print what runs where, the step, memory, logits and the rollout; then the notes, and the errors last."""
    console = Console(emoji=False, highlight=False, soft_wrap=True)
    for text in _first_lines(plan):
        console.print(text)
    for title, lines in (
        ("A step, if every response were as long as it may be", _step(plan.step)),
        ("Memory of one accelerator, at the peak of each phase", _phases(plan)),
        ("Logits of the LM head", _logits(plan.head)),
        ("Rollout", _rollout(plan.rollout)),
    ):
        if lines:
            table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
            table.add_column()
            table.add_column(justify="right")
            for line in lines:
                table.add_row(*line)
            console.print(table)
    if plan.host_bytes_per_node:
        console.print(f"[bold]Host[/] offloaded states take {in_gib(plan.host_bytes_per_node)} of a node's memory")
    for note in plan.notes:
        console.print(f"[dim]· {escape(note)}[/]")
    for problem in plan.problems:
        if not problem.fatal:
            console.print(f"[yellow]note[/]  {escape(problem.message)}")
    for problem in plan.errors:
        when = f" [dim](verl would stop {problem.when})[/]" if problem.when else ""
        console.print(f"[bold red]error[/] {escape(problem.message)}{when}")
    if plan.errors:
        console.print(f"[bold red]{_many(len(plan.errors), 'error')}: this would not run.[/]")
    else:
        console.print("[bold green]Nothing found that would stop this run.[/]")


def _first_lines(plan: Plan) -> list[str]:
    lines = []
    if plan.model is not None:
        lines.append(f"[bold]Model[/] {_model(plan.model)}")
    if plan.layout is not None:
        lines += [f"[bold]Trainer[/] {_trainer(plan.layout)}", f"[bold]Mask[/] {escape(plan.mask)}"]
    return lines


def _model(model: ModelSummary) -> str:
    adapters = ""
    if model.trained_parameters != model.parameters:
        adapters = f", {_count(model.trained_parameters)} in adapters are trained"
    return (
        f"{_count(model.parameters)} parameters{adapters}, {model.layers} layers, vocabulary {model.vocabulary}, "
        f"context {model.context} ({escape(model.source)})"
    )


def _trainer(layout: Layout) -> str:
    cut = f"each parameter over {layout.shard}, sequence parallelism {layout.sequence}"
    if layout.strategy == "megatron":
        cut = f"tensor {layout.tensor} × pipeline {layout.pipeline} × context {layout.sequence}"
    ranks = _many(layout.data_parallel, "data-parallel rank")
    return f"{layout.strategy} on {_many(layout.world, 'accelerator')}: {ranks}, {cut}"


def _step(step: Step | None) -> Lines:
    if step is None:
        return []
    padding = [("padding rows that verl adds", f"{step.padding_sequences:,}")] if step.padding_sequences else []
    per_rank = f"{step.sequences_per_rank_per_gradient_step:g} per rank"
    return [
        ("sequences", f"{step.sequences:,} ({step.prompts} prompts × {step.responses})"),
        *padding,
        ("longest sequence, tokens", f"{step.longest_sequence:,}"),
        ("gradient steps", f"{step.gradient_steps_per_batch}"),
        ("sequences per gradient step", f"{step.sequences_per_gradient_step:,}, {per_rank}"),
        ("micro-batches per gradient step", f"{step.micro_batches_per_gradient_step_at_most}"),
        ("tokens per accelerator: step", f"{step.tokens_per_gpu_per_step_at_most:,}"),
        ("… gradient step", f"{step.tokens_per_gpu_per_gradient_step_at_most:,}"),
        ("… micro-batch", f"{step.tokens_per_gpu_per_micro_batch_at_most:,}"),
        ("… micro-batch of the log-prob pass", f"{step.tokens_per_gpu_in_log_prob_pass_at_most:,}"),
    ]


def _phases(plan: Plan) -> Lines:
    lines = []
    for phase in plan.phases:
        limit = "" if plan.on_cpu else f" of {in_gib(plan.accelerator_bytes)}"
        lines.append((f"[bold]{phase.name}[/]", f"[bold]{in_gib(phase.total)}[/]{limit}"))
        lines += [(f"  {name}", in_gib(size)) for name, size in phase.parts.items() if size]
    return lines


def _logits(head: Logits | None) -> Lines:
    if head is None:
        return []
    where = f"every position: {head.dense_because}"
    if head.dense_because is None:
        where = f"kept positions ({head.kept_ratio:.0%})"
    lines = [(f"gradient step: {where}", in_gib(head.gradient_step_bytes))]
    if head.gradient_step_bytes != head.gradient_step_bytes_dense:
        lines.append((f"… at all {head.tokens:,} × {head.vocabulary:,}", in_gib(head.gradient_step_bytes_dense)))
    lines.append(("log-prob pass", in_gib(head.log_prob_pass_bytes)))
    if head.log_prob_pass_bytes != head.log_prob_pass_bytes_dense:
        lines.append(("… at all positions", in_gib(head.log_prob_pass_bytes_dense)))
    return lines


def _rollout(rollout: Engines | None) -> Lines:
    if rollout is None:
        return []
    per_token = f"{rollout.cache_bytes_per_token / 1024:.0f} KiB per token"
    return [
        ("engines", f"{rollout.engines} × {_many(rollout.accelerators_per_engine, 'accelerator')}"),
        ("share of an accelerator", in_gib(rollout.share_bytes)),
        ("  weights", in_gib(rollout.weights_bytes)),
        ("  key-value cache", f"{in_gib(rollout.cache_bytes)}, {per_token}"),
        ("full-length sequences in an engine's cache", f"{rollout.full_length_sequences_per_engine:,}"),
        ("sequences per engine per step", f"{rollout.sequences_per_engine_per_step:,}"),
    ]


def _many(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
