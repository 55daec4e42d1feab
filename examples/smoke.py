"""Run every recipe of the paper in the real main_ppo on two CPU cores, one after the other; print a table at the end.

Each run is ``VERL_PLATFORM=cpu python -m verl.trainer.main_ppo +recipe=NAME +cluster=cpu_smoke demo.dir=…``: two
training steps and a validation on the demo's tiny model, with dynamic sampling and overlong shaping as in the recipe.
A failed recipe does not stop the next one. The exit status is 1 if any recipe failed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from entropy_fork.common.progress import task
from examples.cpu_demo.run import build_world

RECIPES = [f"qwen3_{size}_{length}" for length in ("20k", "29k") for size in ("8b", "14b", "32b")]
TIMEOUT_SECONDS = 900


@dataclass
class Run:
    """A finished run of one recipe."""

    recipe: str
    status: int
    seconds: float
    output: str

    def metric(self, name: str) -> list[float]:
        """A metric by training step, as verl's console logger printed it."""
        pattern = re.compile(rf"step:[1-9]\d* - .*?{re.escape(name)}:(?:np\.\w+\()?([-\d.e+]+)")
        return [float(value) for value in pattern.findall(self.output)]

    def row(self) -> list[str]:
        def shown(name: str, digits: int) -> str:
            return "  ".join(f"{value:.{digits}f}" for value in self.metric(name)) or "–"

        verdict = "[green]ok[/green]" if self.status == 0 else f"[red]failed ({self.status})[/red]"
        evicted = sum(self.metric("training/filter_groups/evicted_samples"))
        kept, answer = shown("entropy_fork/kept_ratio", 4), shown("response_length/mean", 1)
        return [
            self.recipe,
            verdict,
            f"{self.seconds:.0f}",
            kept,
            f"{evicted:.0f}",
            shown("critic/score/min", 2),
            answer,
        ]


def train(recipe: str, world: Path, log: Path, overrides: list[str]) -> Run:
    """Run one recipe in its own process and Ray session; write its output to ``log``."""
    ray_folder = tempfile.mkdtemp(prefix="ef")  # short: Ray puts sockets there
    command = [sys.executable, "-m", "verl.trainer.main_ppo", f"+recipe={recipe}", "+cluster=cpu_smoke"]
    command += [f"demo.dir={world}", f"hydra.run.dir={log.parent / recipe}", *overrides]
    began = time.monotonic()
    try:
        with log.open("w") as file:
            status = subprocess.run(
                command,
                env={**os.environ, "VERL_PLATFORM": "cpu", "RAY_TMPDIR": ray_folder, "PYTHONWARNINGS": "ignore"},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT_SECONDS,
                check=False,
            ).returncode
    except subprocess.TimeoutExpired:
        status = 124
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
    return Run(recipe, status, time.monotonic() - began, log.read_text(errors="replace"))


def main(
    recipe: Annotated[list[str] | None, typer.Option(help="Only this recipe; may be repeated.")] = None,
    directory: Annotated[Path, typer.Option(help="Where the world and the logs are kept.")] = Path(".demo"),
    override: Annotated[list[str] | None, typer.Option(help="A further Hydra override; may be repeated.")] = None,
) -> None:
    """Build the demo's world if it is missing, run every recipe, and show a table."""
    console = Console()
    world, logs = (directory / "world").absolute(), (directory / "smoke").absolute()
    build_world(world, console)
    logs.mkdir(parents=True, exist_ok=True)

    table = Table(
        "recipe", "", "s", "kept share by step", "groups dropped", "lowest reward by step", "tokens per answer"
    )
    runs = []
    with task("recipes", len(recipe or RECIPES), console=console) as shown:
        for name in recipe or RECIPES:
            shown.update(note=name)
            runs.append(train(name, world, logs / f"{name}.log", override or []))
            shown.advance()
            table.add_row(*runs[-1].row())
            if runs[-1].status:
                console.print(f"{name} failed; the end of {logs / name}.log:", style="red", highlight=False)
                console.print("\n".join(runs[-1].output.splitlines()[-15:]), markup=False, highlight=False)
    console.print(table)
    raise typer.Exit(int(any(run.status for run in runs)))


if __name__ == "__main__":
    typer.run(main)
