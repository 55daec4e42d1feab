"""Run all checks of this folder, one after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import verl
from omegaconf import DictConfig, OmegaConf

from entropy_fork.common.asked_for import GROUPS, chosen
from entropy_fork.common.errors import EntropyForkError, all_at_once
from entropy_fork.common.problem import Problem
from entropy_fork.verl.config import ESTIMATORS, is_ours, read_config, read_guards
from entropy_fork.verl.early.files import check_code, check_files, check_resume
from entropy_fork.verl.early.loggers import check_loggers
from entropy_fork.verl.early.names import check_names
from entropy_fork.verl.early.numbers import check_numbers
from entropy_fork.verl.early.reward import check_reward

Check = Callable[[DictConfig], Iterator[Problem]]

CHECKS: tuple[Check, ...] = (
    check_numbers, check_names, check_loggers, check_files, check_code, check_resume, check_reward,
)  # fmt: skip


def find_problems(config: DictConfig) -> list[Problem]:
    """All problems of a config, in the order of :data:`CHECKS`. Nothing is raised, and the config is not changed.

    Args:
        config: the root of a run of ``main_ppo``, resolved or not.
    """
    problems = []
    for check in CHECKS:
        try:
            for problem in check(config):
                problems.append(problem)  # one by one: what was found before an error stays
        except Exception as error:  # a value of another type than verl's; verl's own checks complain about it
            if not isinstance(error, (TypeError, ValueError, AttributeError)):
                raise
    return problems


def check_in_launcher(config: DictConfig) -> None:
    """Refuse a run of ``main_ppo`` that asks for something of ours and would stop.

    Raises:
        EntropyForkError: with all that would stop it.
    """
    if is_asked_for(config) and (found := [each.message for each in find_problems(config) if each.fatal]):
        raise EntropyForkError(*all_at_once(found))


def is_asked_for(config: DictConfig) -> bool:
    """Whether the launcher makes these checks: in ``main_ppo``, for a mask, guards, a group or an estimator of ours."""
    main = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
    if main != Path(verl.__file__ or "").resolve().parent / "trainer" / "main_ppo.py":
        return False
    try:
        guards = read_guards(config)
        if read_config(config) is not None or guards.data_files or guards.checkpoints or guards.waiting:
            return True
    except EntropyForkError:
        return True  # it asks, in a way that is refused elsewhere
    estimator = str(OmegaConf.select(config, "algorithm.adv_estimator", default=None))
    return any(chosen(group) is not None for group in GROUPS) or is_ours(
        "ADV_ESTIMATOR_REGISTRY", estimator, ESTIMATORS
    )
