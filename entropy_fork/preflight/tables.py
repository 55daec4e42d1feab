"""A plan as tables for a person."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from entropy_fork.preflight.plan import Plan, in_gib

Rows = list[tuple[str, str]]


def print_plan(plan: Plan) -> None:
    """What runs where, a step, memory, the LM head, the rollout; then notes, and errors last."""
    console = Console(highlight=False, soft_wrap=True)
    for line in _head_lines(plan):
        console.print(line)
    for title, rows in (
        ("A step, if every response were as long as it may be", _step(plan.step)),
        ("Memory of one accelerator, at the peak of each phase", _phases(plan)),
        ("Logits of the LM head", _logits(plan.head)),
        ("Rollout", _rollout(plan.rollout)),
    ):
        if rows:
            table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
            table.add_column()
            table.add_column(justify="right")
            for row in rows:
                table.add_row(*row)
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


def _head_lines(plan: Plan) -> list[str]:
    lines = []
    if model := plan.model:
        adapters = ""
        if model["trained_parameters"] != model["parameters"]:
            adapters = f", {_count(model['trained_parameters'])} in adapters are trained"
        lines.append(
            f"[bold]Model[/] {_count(model['parameters'])} parameters{adapters}, {model['layers']} layers, vocabulary "
            f"{model['vocabulary']}, context {model['context']} ({escape(model['source'])})"
        )
    if layout := plan.layout:
        cut = f"each parameter over {layout['shard']}, sequence parallelism {layout['sequence']}"
        if layout["strategy"] == "megatron":
            cut = f"tensor {layout['tensor']} × pipeline {layout['pipeline']} × context {layout['sequence']}"
        ranks = _many(layout["data_parallel"], "data-parallel rank")
        lines.append(
            f"[bold]Trainer[/] {layout['strategy']} on {_many(layout['world'], 'accelerator')}: {ranks}, {cut}"
        )
        lines.append(f"[bold]Mask[/] {escape(plan.mask)}")
    return lines


def _step(step: dict[str, Any]) -> Rows:
    if not step:
        return []
    per_rank = f"{step['sequences_per_rank_per_gradient_step']:g} per rank"
    rows = [
        ("sequences", f"{step['sequences']:,} ({step['prompts']} prompts × {step['responses']})"),
        ("padding rows that verl adds", f"{step['padding_sequences']:,}"),
        ("longest sequence, tokens", f"{step['longest_sequence']:,}"),
        ("gradient steps", f"{step['gradient_steps_per_batch']}"),
        ("sequences per gradient step", f"{step['sequences_per_gradient_step']:,}, {per_rank}"),
        ("micro-batches per gradient step", f"{step['micro_batches_per_gradient_step_at_most']}"),
        ("tokens per accelerator: step", f"{step['tokens_per_gpu_per_step_at_most']:,}"),
        ("… gradient step", f"{step['tokens_per_gpu_per_gradient_step_at_most']:,}"),
        ("… micro-batch", f"{step['tokens_per_gpu_per_micro_batch_at_most']:,}"),
        ("… micro-batch of the log-prob pass", f"{step['tokens_per_gpu_in_log_prob_pass_at_most']:,}"),
    ]
    return [row for row in rows if step["padding_sequences"] or not row[0].startswith("padding")]


def _phases(plan: Plan) -> Rows:
    rows = []
    for phase in plan.phases:
        limit = "" if plan.on_cpu else f" of {in_gib(plan.accelerator_bytes)}"
        rows.append((f"[bold]{phase['name']}[/]", f"[bold]{in_gib(phase['total'])}[/]{limit}"))
        rows += [(f"  {name}", in_gib(size)) for name, size in phase["parts"].items() if size]
    return rows


def _logits(head: dict[str, Any]) -> Rows:
    if not head:
        return []
    dense, now = head["gradient_step_bytes_dense"], head["gradient_step_bytes"]
    why = head["dense_because"]
    where = f"kept positions ({head['kept_ratio']:.0%})" if why is None else f"every position: {why}"
    rows = [(f"gradient step: {where}", in_gib(now))]
    if dense != now:
        rows.append((f"… at all {head['tokens']:,} × {head['vocabulary']:,}", in_gib(dense)))
    rows.append(("log-prob pass", in_gib(head["log_prob_pass_bytes"])))
    if head["log_prob_pass_bytes"] != head["log_prob_pass_bytes_dense"]:
        rows.append(("… at all positions", in_gib(head["log_prob_pass_bytes_dense"])))
    return rows


def _rollout(rollout: dict[str, Any]) -> Rows:
    if not rollout:
        return []
    per_token = f"{rollout['cache_bytes_per_token'] / 1024:.0f} KiB per token"
    return [
        ("engines", f"{rollout['engines']} × {_many(rollout['accelerators_per_engine'], 'accelerator')}"),
        ("share of an accelerator", in_gib(rollout["share_bytes"])),
        ("  weights", in_gib(rollout["weights_bytes"])),
        ("  key-value cache", f"{in_gib(rollout['cache_bytes'])}, {per_token}"),
        ("full-length sequences in an engine's cache", f"{rollout['full_length_sequences_per_engine']:,}"),
        ("sequences per engine per step", f"{rollout['sequences_per_engine_per_step']:,}"),
    ]


def _many(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
