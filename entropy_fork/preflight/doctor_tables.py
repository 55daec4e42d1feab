"""Prints a diagnosis as tables, for a person."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from entropy_fork.preflight.doctor import Diagnosis
from entropy_fork.preflight.probe import PACKAGES, Answer


def print_diagnosis(found: Diagnosis) -> None:
    """Print versions, presets, the mask; then the notes, and the problems last."""
    console = Console(emoji=False, highlight=False, soft_wrap=True)
    table = Table(title="Versions", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("verl and we need")
    for name in found.processes:
        table.add_column(name)
    answers = list(found.processes.values())
    table.add_row("python", "", *[answer["python"] for answer in answers])
    for package in PACKAGES:
        versions = [answer["packages"][package] for answer in answers]
        if any(versions) or package in found.needs:
            table.add_row(package, found.needs.get(package, ""), *[version or "–" for version in versions])
    table.add_row(
        "plugin", "active", *["active" if not a["plugin"]["inactive"] else "[red]not active[/]" for a in answers]
    )
    table.add_row("FSDP engine", "masked", *[str(a["plugin"]["engine"] or "–") for a in answers])
    table.add_row("accelerators", "", *[_devices(answer) for answer in answers])
    console.print(table)
    for group, names in found.groups.items():
        console.print(f"[bold]{group}[/] {', '.join(names)}")
    if found.mask:
        mask = Table(title="What would be masked", title_justify="left", title_style="bold", show_header=False)
        for row in found.mask:
            mask.add_row(*row)
        console.print(mask)
    for note in found.notes:
        console.print(f"[yellow]note[/] {escape(note)}")
    for problem in found.problems:
        console.print(f"[bold red]problem[/] {escape(problem)}")
    if found.problems:
        console.print(f"[bold red]{len(found.problems)} problem{'s'[: len(found.problems) > 1]}.[/]")
    else:
        console.print("[bold green]All is well.[/]")


def _devices(answer: Answer) -> str:
    if answer["platform"] == "cpu":
        return "CPU (VERL_PLATFORM=cpu)"
    devices = answer["accelerators"]
    return f"{len(devices)} × {devices[0]['name']}, {devices[0]['bytes'] / 2**30:.0f} GiB" if devices else "none"
