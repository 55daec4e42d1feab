"""Write the tables of docs/lab/smollm2.md from the files beside it: SmolLM2's forks, two temperatures, the run.

The files come from `examples/research/smollm2_forks.sh` and from `make demo MODEL=smollm2`; the options copy them.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from entropy_fork.common.output_folder import write_whole
from examples.cpu_demo.run import PHASES, REPOSITORY, Run, largest_difference
from examples.research.experiment.page import filled, markdown, paragraph
from examples.research.experiment.runs import commit

PAGE = REPOSITORY / "docs/lab/smollm2.md"
FILES = PAGE.with_suffix("")
RUN = "run.json"
#: what is kept of the run: names of verl's metrics, or their beginnings
KEPT = (
    "val-core/", "critic/score/mean", "response_length/mean", "actor/entropy", "entropy_fork/kept_ratio",
    "entropy_fork/threshold", "entropy_fork/entropy_kept", "entropy_fork/entropy_dropped",
    "training/rollout_probs_diff_max", "timing_s/step", "timing_s/testing", *PHASES.values(),
)  # fmt: skip


def keep_run(folder: Path, world: Path, file: Path, made_at: str) -> None:
    """Write what the page needs of a finished run: its metrics by step, the seconds, the commit that made it."""
    run = Run.load(folder / "metrics.json")
    warm_up = json.loads((world / "manifest.json").read_text())["report"]["warmup_seconds"]
    metrics = {
        step: {name: value for name, value in values.items() if name in KEPT or name.startswith(KEPT[0])}
        for step, values in sorted(run.metrics.items())
    }
    saved = {"commit": made_at, "seconds": run.seconds, "warmup_seconds": warm_up, "metrics": metrics}
    write_whole(file, json.dumps(saved, indent=1) + "\n")


def keep_summary(summary: Path, file: Path) -> None:
    """Write what the page needs of the summary that `entropy-fork analyze` writes."""
    everything = json.loads(summary.read_text())
    kept = {name: everything[name] for name in ("answers", "tokens", "mean_entropy", "share_below", "percentiles")}
    write_whole(file, json.dumps(kept, indent=1) + "\n")


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def forks(summary: dict[str, Any]) -> str:
    """How the entropies are spread, beside the paper's."""
    half, tau = (f"{summary['percentiles'][name]:.3f}" for name in ("50", "80"))
    rows = [
        ("tokens", f"{summary['tokens']:,}", ""),
        ("mean entropy, nats", f"{summary['mean_entropy']:.3f}", ""),
        ("tokens below 0.01 nats", f"{summary['share_below']['0.01']:.2%}", "50.64%"),
        ("50th percentile, nats", half, ""),
        ("80th percentile: τ, nats", tau, "0.672"),
    ]
    return markdown([{" ": what, "SmolLM2": ours, "Qwen3-8B in the paper": theirs} for what, ours, theirs in rows])


def temperatures(file: Path) -> str:
    """The share of right answers of each pair of temperatures."""
    rows = {
        (row["temperature_high"], row["temperature_low"]): {
            "T_high": f"{float(row['temperature_high']):g}",
            "T_low": f"{float(row['temperature_low']):g}",
            "right, %": f"{100 * float(row['accuracy']):.1f}",
            "95% interval": f"{100 * float(row['interval_low']):.1f} to {100 * float(row['interval_high']):.1f}",
            "tokens of an answer": f"{float(row['mean_tokens']):.0f}",
            "tokens above τ, %": f"{100 * float(row['above']):.1f}",
        }
        for row in rows_of(file)
    }
    return markdown(list(rows.values()))


def run_part(saved: dict[str, Any]) -> str:
    """The accuracies of the run, and what else it logged."""
    run = Run({int(step): values for step, values in saved["metrics"].items()}, saved["seconds"])
    table = {"": "right"} | {
        "before" if step == 0 else f"after step {step}": f"{accuracy:.1%}" for step, accuracy in run.accuracies
    }
    last = max(run.metrics)
    first_length, last_length = (run.metrics[step]["response_length/mean"] for step in (1, last))
    phases = "; ".join(f"{words} {run.mean(name, skip_first=True):.0f} s" for words, name in PHASES.items())
    text = (
        f"One seed, made at `{saved['commit']}`. Kept share {run.mean('entropy_fork/kept_ratio'):.4f}, τ "
        f"{run.mean('entropy_fork/threshold'):.3f} nats, mean entropy of kept tokens "
        f"{run.mean('entropy_fork/entropy_kept'):.3f} nats and of dropped ones "
        f"{run.mean('entropy_fork/entropy_dropped'):.3f}, largest difference between the rollout's and the trainer's "
        f"probabilities {largest_difference(run)}. The mean answer had {first_length:.0f} tokens in step 1 and "
        f"{last_length:.0f} in step {last}. A step took {run.mean('timing_s/step', skip_first=True):.0f} s ({phases}). "
        f"**With the fetch of the model it took {minutes(saved['seconds'])}**, of which the warm-up "
        f"{minutes(saved['warmup_seconds'])}."
    )
    return f"{markdown([table], table)}\n\n{paragraph(text)}"


def checkpoints(file: Path) -> str:
    """Table 1's overlap between the checkpoints of the run."""
    rows = rows_of(file)
    columns = {
        "mean entropy, nats": [f"{float(row['mean_entropy']):.3f}" for row in rows],
        "80th percentile, nats": [f"{float(row['threshold']):.3f}" for row in rows],
        "of its top 20%, in the start's (Table 1)": [f"{float(row['overlap_base']):.1%}" for row in rows],
        "… in the last one's": [f"{float(row['overlap_final']):.1%}" for row in rows],
    }
    names = [row["name"].replace("step", "step ") for row in rows]
    return markdown([{" ": what, **dict(zip(names, cells, strict=True))} for what, cells in columns.items()])


def parts(files: Path) -> dict[str, str]:
    """Each part of the page that is made, by its name."""
    return {
        "forks": forks(json.loads((files / "summary.json").read_text())),
        "temperatures": temperatures(files / "temperatures.csv"),
        "run": run_part(json.loads((files / RUN).read_text())),
        "checkpoints": checkpoints(files / "overlap.csv"),
    }


def main(
    measured: Annotated[Path | None, typer.Option(help="The output folder of smollm2_forks.sh, to copy from.")] = None,
    demo: Annotated[Path | None, typer.Option(help="The folder of `make demo MODEL=smollm2`, to copy from.")] = None,
    run: Annotated[str, typer.Option(help="The name of its run.")] = "global-seed1-transformers",
    made_at: Annotated[str | None, typer.Option(help="The commit that made this run. Default: the checkout's.")] = None,
) -> None:
    """Copy new results, if there are any, and write the tables."""
    if measured:
        for name in ("percentiles.csv", "scores.csv", "tokens_highest.csv", "tokens_lowest.csv"):
            shutil.copyfile(measured / "forks" / name, FILES / name)
        keep_summary(measured / "forks/summary.json", FILES / "summary.json")
        shutil.copyfile(measured / "temperatures/temperatures.csv", FILES / "temperatures.csv")
    if demo:
        keep_run(demo / run, demo / "world", FILES / RUN, made_at or commit())
    write_whole(PAGE, filled(PAGE.read_text(encoding="utf-8"), parts(FILES)))


if __name__ == "__main__":
    typer.run(main)
