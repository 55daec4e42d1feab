"""Write docs/lab/evidence.md's tables, and its plots, from the CSV files beside it; and the guide's table of seeds.

A page has a place for each part: ``<!-- made: NAME -->``, what was made, ``<!-- end: NAME -->``.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from entropy_fork.common.output_folder import write_whole
from examples.cpu_demo.run import REPOSITORY
from examples.research.experiment.arms import (
    ALL,
    ARMS,
    BOTTOM80,
    GRADIENT,
    MATCHED,
    NEXT20,
    QUESTIONS,
    RANDOM20,
    SURPRISAL,
    TOP20,
    UNCLIPPED,
    Question,
)
from examples.research.experiment.comparison import (
    by_arm,
    common_tokens,
    headline,
    minus,
    missing,
    of_question,
    told,
)
from examples.research.experiment.power import pairs_needed
from examples.research.experiment.results import Result, read_csv
from examples.research.experiment.statistics import FEWEST_SEEDS, Difference, Floats, late, spread, spread_interval
from examples.research.experiment.tasks import TASKS, Task

PAGE = REPOSITORY / "docs/lab/evidence.md"
GUIDE = REPOSITORY / "docs/guide/is_it_working.md"
EVIDENCE = PAGE.with_suffix("")
PLACE = re.compile(r"(<!-- made: (\w+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)
TITLES = {
    "accuracy": "accuracy on held-out problems, sampled at T = 1",
    "reward": "mean reward of the step's answers",
    "entropy": "mean entropy of the step's tokens (nats)",
    "response_length": "mean response length (tokens)",
    "kept_ratio": "share of tokens in the policy gradient",
}
#: the largest norm of a gradient that is not clipped, in recipes/recipe/dapo.yaml
CLIP = 1.0
#: what two arms are compared in: its words, digits, and the factor that makes percentage points of a share
COMPARED = {
    "accuracy": ("final accuracy, points", 1, 100),
    "area": ("mean height of the accuracy curve, points", 1, 100),
    "equal_tokens": ("accuracy at equal tokens, points", 1, 100),
    "entropy": ("entropy, nats", 3, 1),
    "response_length": ("length, tokens", 1, 1),
}


def with_spread(values: Iterable[float], digits: int, factor: float = 1.0, sign: str = "") -> str:
    """``mean ± standard deviation``. A single seed has no spread; without a value there is nothing."""
    known = factor * np.array([value for value in values if not math.isnan(value)])
    if not len(known):
        return ""
    deviation = spread(known)
    return f"{known.mean():{sign},.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:,.{digits}f}")


def arm_rows(results: Sequence[Result]) -> list[dict[str, str]]:
    """A row per arm, by heading: its mean over the seeds, and its spread."""
    table = by_arm(results)
    rows = []
    for arm, values in table.items():
        runs = [one for one in results if one.arm == arm]
        final, of_all = values["accuracy"], table.get(ALL.name, {}).get("accuracy", {})
        paired = [final[seed] - of_all[seed] for seed in final if arm != ALL.name and seed in of_all]
        row = {
            "tokens": f"`{arm}`",
            "seeds": str(len(runs)),
            "accuracy, %": with_spread(final.values(), 1, 100),
            "by seed": ", ".join(f"{100 * value:.1f}" for value in final.values()),
            "minus `all`": with_spread(paired, 1, 100, "+"),
            "mean height, %": with_spread(values["area"].values(), 1, 100),
            "at equal tokens, %": with_spread(values["equal_tokens"].values(), 1, 100),
            "entropy, nats": with_spread(values["entropy"].values(), 3),
            "length, tokens": with_spread(values["response_length"].values(), 1),
            "kept": f"{np.mean([late(one.curves['kept_ratio']) for one in runs]):.3f}",
            "tokens trained on": with_spread([one.tokens[-1] for one in runs], 0),
        }
        rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping[str, str]], head: Iterable[str] | None = None) -> str:
    """A table in Markdown; a column without a value is left out."""
    columns = [name for name in head or rows[0] if any(row[name] for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def differences(results: Sequence[Result], question: Question) -> str:
    """A row per arm that ``top20`` is compared with, a column per quantity."""
    table = by_arm(results)
    rows = []
    for arm in (one.name for one in question.arms if one != TOP20):
        found = {name: minus(table, TOP20.name, arm, name) for name in COMPARED}
        row = {"`top20` minus": f"`{arm}`", "seeds": str(found["accuracy"].seeds)}
        if found["accuracy"].seeds:
            rows.append(row | {COMPARED[name][0]: intervals(one, name) for name, one in found.items()})
    return markdown(rows) if rows else "No seed has `top20` and another arm, so there is nothing to compare."


def what_else_differs(results: Sequence[Result]) -> str:
    """A row per arm, over its runs that logged it: the size of its gradients, and the groups that it dropped."""
    rows = []
    for arm in dict.fromkeys(one.arm for one in results):
        runs = [one.curves for one in results if one.arm == arm and not np.isnan(one.curves["grad_norm"]).all()]
        if runs:
            clipped = [float((curves["grad_norm"] > CLIP).sum()) for curves in runs]
            row = {
                "tokens": f"`{arm}`",
                "runs": str(len(runs)),
                "gradient norm": with_spread([float(np.nanmean(curves["grad_norm"])) for curves in runs], 2),
                f"steps with a norm above {CLIP:g}": with_spread(clipped, 1),
                "groups dropped": with_spread([float(np.nansum(curves["dropped_groups"])) for curves in runs], 0),
            }
            rows.append(row)
    return markdown(rows) if rows else "No run here has logged the size of its gradients."


def intervals(found: Difference, name: str) -> str:
    """The mean difference, then its bootstrap interval, then that of the t test, if there are any."""
    _, digits, factor = COMPARED[name]
    if math.isnan(found.mean):
        return ""
    # + 0.0 makes 0.0 of -0.0
    mean, *ends = (
        f"{round(factor * value, digits) + 0.0:+.{digits}f}" for value in (found.mean, *found.bootstrap, *found.t)
    )
    if math.isnan(found.t[0]):
        return mean
    return f"**{mean}**<br>[{ends[0]}, {ends[1]}]<br>({ends[2]}, {ends[3]})"


def paragraph(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def provenance(results: Sequence[Result]) -> str:
    """How many runs there are, and at which commits they were made."""
    made = Counter(one.commit for one in results)
    known = ", ".join(f"`{commit}` ({runs})" for commit, runs in sorted(made.items()) if commit != "unknown")
    unrecorded = f"{made['unknown']} did not record their commit" if "unknown" in made else ""
    at = "; ".join(filter(None, [f"made at {known}" if known else "", unrecorded]))
    before = np.mean([one.accuracy[0] for one in results])
    return f"{len(results)} runs, {at}. Before training the accuracy was {100 * before:.1f}%."


def shares_or_scores(results: Sequence[Result]) -> str:
    """The part of a question that has no headline."""
    head = ("tokens", "seeds", "accuracy, %", "by seed", "minus `all`", "entropy, nats", "length, tokens", "kept")
    return f"{markdown(arm_rows(results), head)}\n\n{paragraph(provenance(results))}"


def controls(results: Sequence[Result], task: Task, question: Question) -> str:
    """The part of one task: the headline, what is missing, the arms, the differences, the plot."""
    absent = missing(results, question, task)
    if not results:
        return paragraph(f"No run is there yet: `make controls TASK={task.name}` makes them.")
    seeds = "; ".join(f"`{arm}` {', '.join(map(str, of_arm))}" for arm, of_arm in absent.items())
    at = common_tokens(results)
    about = "" if math.isnan(at) else f" Every run reached {at:,.0f} trained tokens: that is where tokens are equal."
    return "\n\n".join(
        [
            paragraph(f"**{verdict(results, task, question)}**"),
            paragraph(provenance(results) + about),
            paragraph(f"Missing seeds: {seeds}." if seeds else "No run is missing."),
            markdown(arm_rows(results)),
            differences(results, question),
            what_else_differs(results),
            f"![learning curves on {task.words}: a line for each choice of tokens](evidence/{task.name}.png)",
            f"([{task.name}.csv](evidence/{task.name}.csv), [{task.name}.svg](evidence/{task.name}.svg))",
        ]
    )


def verdict(results: Sequence[Result], task: Task, question: Question) -> str:
    """The headline of a task."""
    return headline(task.words, minus(by_arm(results), TOP20.name, MATCHED.name, "accuracy"), question.seeds)


def another_score(results: Sequence[Result], task: Task) -> str:
    """The other sentence at the top of the page: a fifth by surprisal beside a fifth by entropy, and all tokens."""
    table = by_arm(results)
    beside = (
        told(minus(table, SURPRISAL.name, other.name, "accuracy"), words)
        for other, words in ((TOP20, "the top 20% by entropy"), (ALL, "all tokens"))
    )
    return f"On {task.words}, the top 20% by surprisal ends {', and '.join(beside)}."


def together(runs: Mapping[str, Sequence[Result]], question: Question) -> str:
    """A line for each comparison: where the first arm's final accuracy is beside the other's, on each task."""
    lines: list[str] = []
    fifths: list[str] = []
    for ours, theirs, asks in (
        (TOP20, MATCHED, "Which tokens of an answer?"),
        (MATCHED, RANDOM20, "How many in which answer?"),
        (TOP20, ALL, "Is a fifth enough?"),
        (TOP20, BOTTOM80, "Is the rest useless?"),
        (TOP20, NEXT20, "Does the rank among uncertain tokens matter?"),
        (NEXT20, MATCHED, "Do the next uncertain tokens beat the lot?"),
        (TOP20, UNCLIPPED, "Is it the clipping?"),
        (UNCLIPPED, ALL, "Is a fifth enough without clipping?"),
        (TOP20, SURPRISAL, "Is another score as good?"),
        (SURPRISAL, ALL, "And is a fifth by that score enough?"),
        (TOP20, GRADIENT, "And a third one?"),
    ):
        found = {
            TASKS[name].words: minus(by_arm(of_task), ours.name, theirs.name, "accuracy")
            for name, of_task in runs.items()
            if {ours, theirs} <= set(TASKS[name].planned(question))
        }
        places = " ".join(
            f"On {words}, `{ours.name}` ends {told(one, f'`{theirs.name}`')}." for words, one in found.items()
        )
        lines.append(paragraph(f"- **{asks}** {places}", "  "))
    for name, of_task in runs.items():
        ahead = (
            f"`{fifth.name}` is {told(minus(by_arm(of_task), fifth.name, ALL.name, 'equal_tokens'), f'`{ALL.name}`')}"
            for fifth in (TOP20, MATCHED, RANDOM20)
        )
        fifths.append(f"On {TASKS[name].words}, {', '.join(ahead)}.")
    lines.append(paragraph(f"- **Which fifth is ahead at equal trained tokens?** {' '.join(fifths)}", "  "))
    planned = sum(len(TASKS[name].planned(question)) * question.seeds for name in runs)
    absent = sum(len(seeds) for name, found in runs.items() for seeds in missing(found, question, TASKS[name]).values())
    lines.append(f"- {planned - absent} of {planned} planned runs are there.")
    return "\n".join(lines)


def seeds_needed(runs: Mapping[str, Sequence[Result]]) -> str:
    """How many seeds show which difference, for each spread that is known: a row per task and arm.

    In brackets: with a spread at the upper end of its interval.
    """
    rows = []
    for name, results in runs.items():
        table = by_arm(results)
        for arm in table:
            found = minus(table, TOP20.name, arm, "accuracy")
            if arm != TOP20.name and found.seeds >= FEWEST_SEEDS:
                row = {"`top20` minus": f"`{arm}`", "on": TASKS[name].words, "s measured on": f"{found.seeds} seeds"}
                low, high = (100 * end for end in spread_interval(found.spread, found.seeds))
                row["s, points"] = f"{100 * found.spread:.1f} ({low:.1f} to {high:.1f})"
                for points in (1, 2, 3, 5, 10):
                    seeds, at_most = (pairs_needed(points / s) for s in (100 * found.spread, high))
                    row[f"δ = {points}"] = f"{seeds} ({at_most})"
                rows.append(row)
    return markdown(rows) if rows else "No two arms have three seeds yet, so no spread is known."


def arms_table(question: Question) -> str:
    """What the arms are."""
    command = {arm: " ".join(f"`{word}`" for word in arm.overrides) for arm in question.arms}
    return markdown(
        [{"arm": f"`{arm.name}`", "tokens": arm.tokens, "command line": command[arm]} for arm in question.arms]
    )


def parts(evidence: Path) -> dict[str, str]:
    """Each part of the page that is made, by its name."""
    question = QUESTIONS["controls"]
    runs = {name: of_question(read_csv(evidence / f"{name}.csv"), question) for name in TASKS}
    made = {
        name: shares_or_scores(of_question(read_csv(evidence / f"{name}.csv"), QUESTIONS[name]))
        for name in ("ratios", "scores")
    }
    said = [f"**{verdict(runs[name], task, question)}**" for name, task in TASKS.items()]
    said += [f"**{another_score(runs[name], task)}**" for name, task in TASKS.items()]
    made["headlines"] = "\n\n".join(map(paragraph, said))
    made["arms"] = arms_table(question)
    made["together"] = together(runs, question)
    made["power"] = seeds_needed(runs)
    made["controls"] = "\n\n".join(
        f"### On {task.words}\n\n{controls(runs[name], task, question)}" for name, task in TASKS.items()
    )
    return made


def filled(page: str, made: Mapping[str, str]) -> str:
    """The page with each part in its place.

    Raises:
        KeyError: the page has a place for a part that is not made.
    """
    return PLACE.sub(lambda place: f"{place[1]}\n{made[place[2]]}\n\n{place[3]}", page)


def write(page: Path = PAGE, guide: Path = GUIDE) -> list[Path]:
    """Write the tables of both pages and the plots beside the first. Returns the files that it has written."""
    evidence = page.with_suffix("")
    written = [page, guide]
    made = parts(evidence)
    for file in written:
        write_whole(file, filled(file.read_text(encoding="utf-8"), made))
    for name in ("ratios", "scores", *TASKS):
        results = of_question(read_csv(evidence / f"{name}.csv"), QUESTIONS.get(name, QUESTIONS["controls"]))
        if results:
            written += draw(results, evidence / name)
    return written


def draw(results: Sequence[Result], file: Path) -> list[Path]:
    """A panel per curve: a line for the mean over the seeds, a band from the lowest to the highest seed.

    The first curve is drawn twice: over the steps, and over the tokens that were trained on, if the runs logged them.
    """
    by_tokens = not math.isnan(common_tokens(results))
    figure, axes = plt.subplots(2, 3, figsize=(15, 9), layout="constrained")
    panels = dict(zip(TITLES, axes.flat, strict=False))
    for arm in dict.fromkeys(one.arm for one in results):
        runs = [one for one in results if one.arm == arm]
        for name, panel in panels.items():
            curves = np.array([one.curves[name] for one in runs])
            steps = np.flatnonzero(~np.isnan(curves).any(0))
            _line(panel, steps, curves[:, steps], arm, "o" if name == "accuracy" else "")
        if by_tokens:
            tokens = np.array([one.tokens for one in runs]).mean(0)
            _line(axes.flat[-1], tokens, np.array([one.accuracy for one in runs]), arm, "o")
    for name, panel in panels.items():
        panel.set(title=TITLES[name], xlabel="step")
    if by_tokens:
        axes.flat[-1].axvline(common_tokens(results), color="grey", linewidth=0.8, linestyle=":")
        axes.flat[-1].set(title="accuracy over the tokens trained on", xlabel="tokens trained on (mean over the seeds)")
    else:
        axes.flat[-1].set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    written = [file.with_suffix(".png"), file.with_suffix(".svg")]
    with plt.rc_context({"svg.hashsalt": file.name}):  # the same runs make the same file
        figure.savefig(written[0], dpi=90)
        figure.savefig(written[1], metadata={"Date": None})
    plt.close(figure)
    return written


def _line(panel: plt.Axes, x: Floats, seeds: Floats, arm: str, marker: str) -> None:
    colour = ARMS[arm].colour
    panel.plot(x, seeds.mean(0), color=colour, marker=marker, label=f"{arm}: {ARMS[arm].tokens}")
    panel.fill_between(x, seeds.min(0), seeds.max(0), color=colour, alpha=0.12, linewidth=0)
