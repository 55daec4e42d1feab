"""A few numbers of each run of a task, and differences that are paired by seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from examples.research.experiment.arms import Question
from examples.research.experiment.results import Result, settings_of
from examples.research.experiment.statistics import (
    FEWEST_SEEDS,
    Difference,
    difference,
    height_at,
    late,
    mean_height,
)
from examples.research.experiment.tasks import Task


def of_question(results: Iterable[Result], question: Question, steps: int | None = None) -> list[Result]:
    """The runs with the question's arms, validations and steps, and without further overrides; in its order of arms."""
    steps = steps or question.steps
    wanted = settings_of(question.answers, question.test_every(steps), ())
    names = [arm.name for arm in question.arms]
    found = [one for one in results if one.arm in names and one.steps == steps and one.settings == wanted]
    return sorted(found, key=lambda one: (names.index(one.arm), one.seed))


def missing(results: Iterable[Result], question: Question, task: Task) -> dict[str, list[int]]:
    """The seeds that are planned and not there, by arm; an arm that is complete is left out."""
    there = {(one.arm, one.seed) for one in results}
    seeds = range(1, question.seeds + 1)
    absent = {arm.name: [seed for seed in seeds if (arm.name, seed) not in there] for arm in task.planned(question)}
    return {name: of_arm for name, of_arm in absent.items() if of_arm}


def common_tokens(results: Iterable[Result]) -> float:
    """The largest number of trained tokens that every run reaches; NaN if one of them did not log it."""
    return float(np.min([one.tokens[-1] for one in results]))


def numbers(result: Result, at_tokens: float) -> dict[str, float]:
    """The quantities of a run. Entropy and length are means over the last quarter of its steps.

    Args:
        result: the run.
        at_tokens: the number of trained tokens at which its accuracy is read, on the straight line between the two
            validations beside it; NaN if it is unknown.
    """
    return {
        "accuracy": float(result.accuracy[-1]),
        "area": mean_height(result.validated, result.accuracy),
        "equal_tokens": np.nan if np.isnan(at_tokens) else height_at(result.tokens, result.accuracy, at_tokens),
        "entropy": late(result.curves["entropy"]),
        "response_length": late(result.curves["response_length"]),
    }


def by_arm(results: Iterable[Result]) -> dict[str, dict[str, dict[int, float]]]:
    """Arm, quantity and seed to value."""
    runs = list(results)
    at_tokens = common_tokens(runs) if runs else np.nan
    table: dict[str, dict[str, dict[int, float]]] = {}
    for one in runs:
        for name, value in numbers(one, at_tokens).items():
            table.setdefault(one.arm, {}).setdefault(name, {})[one.seed] = value
    return table


def minus(table: Mapping[str, Mapping[str, Mapping[int, float]]], ours: str, theirs: str, name: str) -> Difference:
    """The difference of two arms in a quantity; over no seeds if an arm is missing."""
    return difference(table.get(ours, {}).get(name, {}), table.get(theirs, {}).get(name, {}))


def headline(words: str, found: Difference, planned: int) -> str:
    """What the final accuracies of the top 20% by entropy and of its matched random control say, by a fixed rule.

    The rule looks at the paired t interval of the difference: is it above 0, below 0, or across 0? The bootstrap's
    interval is the narrower one, so it does not decide. With fewer seeds than planned, the sentence says so.

    Args:
        words: name the task.
        found: ``top20`` minus ``matched``, a share of the problems.
        planned: the number of seeds.
    """
    if found.seeds < FEWEST_SEEDS:
        return (
            f"On {words}, nothing can be said yet: an interval needs {FEWEST_SEEDS} seeds of the top 20% by entropy "
            f"and of its matched random control, and {found.seeds} are there."
        )
    low, high = (100 * end for end in found.t)
    seeds = f"{found.seeds} of {planned} planned seeds" if found.seeds < planned else f"{found.seeds} seeds"
    numbers = f"{100 * found.mean:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}, {seeds}"
    if low > 0:
        return f"On {words}, the top 20% by entropy beats as many random tokens of the same answers ({numbers})."
    if high < 0:
        return (
            f"On {words}, entropy does not beat matched random tokens: it does worse. The top 20% by entropy ends "
            f"below as many random tokens of the same answers ({numbers})."
        )
    return (
        f"On {words}, entropy is not shown to beat matched random tokens: the difference between the top 20% by "
        f"entropy and as many random tokens of the same answers could be 0 ({numbers})."
    )


def told(found: Difference, other: str) -> str:
    """Where an arm ends beside another one, for "it ends …": by the rule of :func:`headline`.

    Args:
        found: the arm's final accuracy minus the other's, a share of the problems.
        other: names the other arm.
    """
    if found.seeds < FEWEST_SEEDS:
        return f"beside {other} with too few seeds to say where ({found.seeds})"
    mean, low, high = (100 * value for value in (found.mean, *found.t))
    count = f"above in {found.above} of {found.seeds} seeds"
    if low > 0:
        return f"{mean:.1f} points above {other} (95% interval {low:.1f} to {high:.1f}; {count})"
    if high < 0:
        return f"{-mean:.1f} points below {other} (95% interval {-high:.1f} to {-low:.1f}; {count})"
    return f"not clearly above or below {other} ({mean:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}; {count})"
