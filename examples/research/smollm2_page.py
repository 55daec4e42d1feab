"""Write the tables of docs/lab/smollm2.md from the files beside it, and the table of tasks in docs/guide/real_model.md.

The files come from `smollm2_forks.sh`, `smollm2_tasks.sh` and `smollm2_checkpoints.sh` of this folder, and from
`make demo MODEL=smollm2`. The options copy them.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from entropy_fork.common.output_folder import write_whole
from entropy_fork.evaluation.questions import read_questions
from examples.cpu_demo.run import PHASES, REPOSITORY, Run, largest_difference
from examples.research.experiment.page import filled, markdown, paragraph

PAGE = REPOSITORY / "docs/lab/smollm2.md"
GUIDE = REPOSITORY / "docs/guide/real_model.md"
FILES = PAGE.with_suffix("")
RUN = "run.json"
TASKS = "tasks.csv"
#: what is kept of the run: names of verl's metrics, or their beginnings
KEPT = (
    "val-core/", "critic/score/mean", "response_length/mean", "actor/entropy", "entropy_fork/kept_ratio",
    "entropy_fork/threshold", "entropy_fork/entropy_kept", "entropy_fork/entropy_dropped",
    "training/rollout_probs_diff_max", "timing_s/step", "timing_s/testing", *PHASES.values(),
)  # fmt: skip
#: what is copied as it is, of `analyze` and of `compare`
OF_FORKS = (
    "percentiles.csv", "scores.csv", "tokens_highest.csv", "tokens_lowest.csv",
    "figures/words_highest.png", "figures/words_lowest.png", "figures/entropy_histogram.png",
)  # fmt: skip
OF_COMPARISON = ("overlap.csv", "change.csv", "figures/entropy_change.png")


def keep_run(folder: Path, world: Path, file: Path) -> None:
    """Write what the page needs of a finished run: its metrics by step, the seconds, the commit that made it."""
    run = Run.load(folder / "metrics.json")
    warm_up = json.loads((world / "manifest.json").read_text())["report"]["warmup_seconds"]
    metrics = {
        step: {name: value for name, value in values.items() if name in KEPT or name.startswith(KEPT[0])}
        for step, values in sorted(run.metrics.items())
    }
    saved = {"commit": run.commit, "seconds": run.seconds, "warmup_seconds": warm_up, "metrics": metrics}
    write_whole(file, json.dumps(saved, indent=1) + "\n")


def keep_summary(summary: Path, file: Path) -> None:
    """Write what the page needs of the summary that `entropy-fork analyze` writes."""
    everything = json.loads(summary.read_text())
    kept = {name: everything[name] for name in ("answers", "tokens", "mean_entropy", "share_below", "percentiles")}
    write_whole(file, json.dumps(kept, indent=1) + "\n")


def keep_tasks(evaluation: Path, data: Path, file: Path) -> None:
    """Write what the page needs of the answers to several tasks, one row per task.

    ``commonest`` is how many questions have the ground truth that most of the task's questions have: what a model
    would get right that always writes the same.
    """
    questions = read_questions([data])
    truths = {
        task: Counter(question.truth_text for question in questions if question.data_source == task)
        for task in dict.fromkeys(question.data_source for question in questions)
    }
    with (evaluation / "answers.jsonl").open(encoding="utf-8") as lines:
        answers = [json.loads(line) for line in lines]
    with file.open("w", newline="") as handle:
        columns = ["task", "questions", "right", "low", "high", "commonest", "partly", "boxed", "tokens"]
        writer = csv.DictWriter(handle, columns, lineterminator="\n")
        writer.writeheader()
        for task, summary in json.loads((evaluation / "results.json").read_text())["benchmarks"].items():
            scores = [answer["score"] for answer in answers if answer["data_source"] == task]
            writer.writerow({
                "task": task.rsplit("/", 1)[-1],
                "questions": summary["questions"],
                "right": sum(score == 1 for score in scores),
                **{name: f"{bound:.4f}" for name, bound in zip(("low", "high"), summary["interval"], strict=True)},
                "commonest": truths[task].most_common(1)[0][1],
                "partly": sum(0 < score < 1 for score in scores),
                "boxed": round(summary["boxed"] * len(scores)),
                "tokens": f"{summary['mean_tokens']:.2f}",
            })  # fmt: skip


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def keep_temperatures(tables: Sequence[Path], file: Path) -> None:
    """Write the pairs of temperatures of several tables into one."""
    first, *others = (table.read_text().splitlines(keepends=True) for table in tables)
    write_whole(file, "".join([*first, *(line for lines in others for line in lines[1:])]))


def copied(names: Iterable[str], folder: Path) -> None:
    """Copy files of a folder beside the page."""
    for name in names:
        shutil.copyfile(folder / name, FILES / Path(name).name)


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


#: what stands in a question of each task that smollm2_tasks.sh asks for
ASKED = {
    "chain_sum": "the sum or the difference of two digits",
    "products": "the product of two digits",
    "gcd": "the greatest common divisor of two numbers up to 20",
    "simple_equations": "8·e − 5 = 3: what is e?",
    "number_sequence": "the next of four to eight numbers",
    "calendar_arithmetic": "which weekday, how many days",
    "letter_counting": "how often a letter is in five words",
    "leg_counting": "the legs of up to 30 animals of one or two kinds",
    "spell_backward": "a word of three or four letters, from its end",
    "word_sorting": "three words by the alphabet",
    "needle_haystack": "who of three to five people likes what",
    "syllogism": "yes or no: does it follow?",
}


def tasks(file: Path) -> str:
    """How often the model is right on each task, best first."""
    rows = sorted(rows_of(file), key=lambda row: -int(row["right"]))
    return markdown([
        {
            "task": f"`{row['task']}`",
            "a question": ASKED[row["task"]],
            f"right, of {row['questions']}": row["right"],
            "95% interval, %": f"{100 * float(row['low']):.0f} to {100 * float(row['high']):.0f}",
            "one answer to all would get": row["commonest"],
            "partly right": row["partly"],
            "with a box": row["boxed"],
        }
        for row in rows
    ])  # fmt: skip


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
        "tasks": tasks(files / TASKS),
        "run": run_part(json.loads((files / RUN).read_text())),
        "checkpoints": checkpoints(files / "overlap.csv"),
    }


def main(
    measured: Annotated[Path | None, typer.Option(help="The output folder of smollm2_forks.sh, to copy from.")] = None,
    answered: Annotated[Path | None, typer.Option(help="The output folder of smollm2_tasks.sh, to copy from.")] = None,
    compared: Annotated[
        Path | None, typer.Option(help="The output folder of smollm2_checkpoints.sh, to copy from.")
    ] = None,
    demo: Annotated[Path | None, typer.Option(help="The folder of `make demo MODEL=smollm2`, to copy from.")] = None,
    run: Annotated[str, typer.Option(help="The name of its run.")] = "global-seed1-transformers",
) -> None:
    """Copy new results, if there are any, and write the tables."""
    if measured:
        copied(OF_FORKS, measured / "forks")
        keep_summary(measured / "forks/summary.json", FILES / "summary.json")
        tables = [measured / name / "temperatures.csv" for name in ("temperatures", "temperatures-cool")]
        keep_temperatures(tables, FILES / "temperatures.csv")
    if answered:
        keep_tasks(answered / "tasks", answered / "twelve/test.parquet", FILES / TASKS)
    if compared:
        copied(OF_COMPARISON, compared / "comparison")
    if demo:
        keep_run(demo / run, demo / "world", FILES / RUN)
    made = parts(FILES)
    for page in (PAGE, GUIDE):
        write_whole(page, filled(page.read_text(encoding="utf-8"), made))


if __name__ == "__main__":
    typer.run(main)
