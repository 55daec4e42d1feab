"""Finds what would stop a run, or make it another run, before Ray starts.

verl 0.9 checks much of its config where it is used: in a worker after the model is loaded, or in the first update,
after the first rollout. Each check of ``problems_of_batches.py`` and ``problems_of_accelerators.py`` names the place in
verl's code. The checks that verl and this package make at the start are run by ``launcher.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from entropy_fork.common.problem import Problem
from entropy_fork.preflight.model_shape import ModelShape
from entropy_fork.preflight.problems_of_accelerators import check_parallelism, check_rollout
from entropy_fork.preflight.problems_of_batches import check_batches, check_lengths, check_rows, check_trainer
from entropy_fork.preflight.run_shape import RunShape

Check = Callable[[RunShape, "ModelShape | None"], Iterator[Problem]]

CHECKS: tuple[Check, ...] = (
    check_trainer, check_parallelism, check_batches, check_lengths, check_rollout, check_rows,
)  # fmt: skip


def find_problems(run: RunShape, model: ModelShape | None) -> list[Problem]:
    """All problems of a run. Without a model, those that need none."""
    return [problem for check in CHECKS for problem in check(run, model)]
