"""What the plugin itself costs: the share of a training step's time that a run with ρ = 1.0 spends in this package.

    VERL_PLATFORM=cpu python benchmarks/plugin_cost.py --world .demo/world        (after 'make demo')

With ρ = 1.0 the update is stock verl's, bit for bit (a test shows it), so the plugin adds only time. This script
measures it in a real run of main_ppo: the seconds in our functions, divided by the seconds of the same step. It also
repeats the run without the plugin's node, and prints the median step of both runs.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from report import chip, median_and_spread, print_table, write_csv

from entropy_fork.common.progress import task

#: the first step also does what is done only once
SKIP = 1


def train(overrides: list[str], world: Path, steps: int, times: Path) -> list[dict[str, float]]:
    """One run of the demo: verl's timings of each step."""
    folder = tempfile.mkdtemp(prefix="ef")  # short: Ray puts sockets there
    command = [
        sys.executable, "-m", "verl.trainer.main_ppo", "+recipe=demo_cpu", f"demo.dir={world.absolute()}",
        f"trainer.total_training_steps={steps}", "trainer.test_freq=-1", "trainer.save_freq=-1",
        "trainer.val_before_train=false", "trainer.logger=[console]", f"trainer.default_local_dir={folder}/checkpoints",
        f"hydra.run.dir={folder}/hydra", *overrides,
    ]  # fmt: skip
    environment = {
        "VERL_USE_EXTERNAL_MODULES": "plugin_timer",
        "PYTHONPATH": str(Path(__file__).parent),
        "ENTROPY_FORK_TIMES": str(times),
        "RAY_TMPDIR": folder,
    }
    try:
        run = subprocess.run(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if run.returncode != 0:
            raise SystemExit(run.stdout[-5000:])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lines = re.findall(r"step:[1-9]\d* - (.*)", run.stdout)
    numbers = [dict(re.findall(r"(timing_s/\w+):(?:np\.\w+\()?([\d.]+)", line)) for line in lines]
    return [{name: float(value) for name, value in step.items()} for step in numbers]


def main(
    world: Annotated[Path, typer.Option(help="Folder of examples/cpu_demo/build.py.")] = Path(".demo/world"),
    steps: int = 15,
    output: Annotated[Path, typer.Option(help="Folder of plugin_cost.csv.")] = Path("docs/lab/performance"),
) -> None:
    """Run with ρ = 1.0 and without the node, print the table, write the CSV."""
    with tempfile.TemporaryDirectory() as folder, task("run with ρ = 1.0"):
        ours = train(["entropy_fork.top_ratio=1.0"], world, steps, Path(folder))
        entries = [line.split() for file in Path(folder).iterdir() for line in file.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder, task("run of stock verl"):
        stock = train(["~entropy_fork", "~entropy_fork_guards"], world, steps, Path(folder))
    driver = [float(seconds) for name, seconds in entries if name == "_entropy_fork_write_weights"][SKIP:]
    loss = [float(seconds) for name, seconds in entries if name == "kept_sums"]
    per_step = len(loss) / steps  # of micro-batches; the demo has one rank, so these are all
    in_loss = statistics.median(loss) * per_step
    rows: list[dict[str, Any]] = [
        {"step": i + 1 + SKIP, "driver_seconds": d, "loss_seconds": in_loss, "step_seconds": step["timing_s/step"],
         "share": (d + in_loss) / step["timing_s/step"], "stock_step_seconds": without["timing_s/step"]}
        for i, (d, step, without) in enumerate(zip(driver, ours[SKIP:], stock[SKIP:], strict=True))
    ]  # fmt: skip
    write_csv(rows, output / "plugin_cost.csv")

    def column(name: str, digits: int = 3) -> str:
        return median_and_spread([row[name] for row in rows], digits)

    shown = {
        "on the driver, s per step": column("driver_seconds", 4),
        "in the loss, s per step": f"{in_loss:.4f}",
        "step with ρ = 1.0, s": column("step_seconds"),
        "step of stock verl, s": column("stock_step_seconds"),
        "share of a step": median_and_spread([100 * row["share"] for row in rows], 2) + " %",
    }
    print_table(
        f"{len(rows)} steps of the demo, {chip('cpu')}",
        [{"": n, "median (lowest to highest)": v} for n, v in shown.items()],
    )


if __name__ == "__main__":
    typer.run(main)
