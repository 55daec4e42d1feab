"""Runs the checks that ``main_ppo`` makes when it is launched: verl's and this package's."""

from __future__ import annotations

import contextlib
import io
import warnings

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from entropy_fork.common.errors import EntropyForkError, is_said, problems_of
from entropy_fork.common.problem import AT_START, IN_RAY, Problem
from entropy_fork.preflight.compose import compose_most
from entropy_fork.preflight.read_shape import ROLLOUT
from entropy_fork.verl import plugin
from entropy_fork.verl.checks import check_first, in_words
from entropy_fork.verl.config import read_guards
from entropy_fork.verl.early.look import find_problems as find_late_problems
from entropy_fork.verl.guards.data_files import check_data_files


def what_the_launcher_says(config: DictConfig) -> list[Problem]:
    """Run main_ppo's own checks, and look for what it would notice late.

    Each check is run by itself, so that one problem does not hide the others.
    """
    ours: list[str] = []
    for group in ([lambda: check_first(config)], plugin.our_checks(config)):
        try:
            ours += [message for message in problems_of(group) if not is_said(message, ours)]
        except Exception as error:  # whatever it is, the launcher would end with it
            ours.append(in_words(error))
    found = [Problem(message, AT_START) for message in ours]
    late = find_late_problems(config)
    found += [problem for problem in late if not is_said(problem.message, ours)]
    if (verls := _verls(config)) is not None and not (found and isinstance(verls, (MissingMandatoryValue, TypeError))):
        found = [problem for problem in [_of_error(verls)] if problem.message not in ours] + found
    if not found and OmegaConf.is_missing(config.actor_rollout_ref.rollout, "name"):
        found.append(Problem(f"Missing mandatory value: {ROLLOUT}.name; write {ROLLOUT}.name=vllm", AT_START))
    return found


def problems_of_line(overrides: list[str], config_name: str, config_dir: str | None) -> list[str]:
    """All that would stop a command line, a message each. Arguments and errors as those of ``compose_most``."""
    composed = compose_most(overrides, config_name, config_dir)
    found = what_the_launcher_says(composed.config)
    return [*composed.problems, *(problem.message for problem in found if problem.fatal)]


def _verls(config: DictConfig) -> Exception | None:
    """What verl's own checks raise."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verls_alone = getattr(validate_config, "__wrapped__", validate_config)
            verls_alone(config, need_reference_policy(config), need_critic(config))
    except Exception as error:
        return error
    return None


def find_unguarded_data_problems(config: DictConfig) -> list[Problem]:
    """Check the data files where the launcher does not, because the guard ``data_files`` is off."""
    try:
        if not read_guards(config).data_files:
            check_data_files(config)
    except EntropyForkError as error:
        return [Problem(str(error), IN_RAY)]
    return []


def _of_missing(error: MissingMandatoryValue) -> str:
    name = f"{ROLLOUT}.name"
    return f"{str(error).splitlines()[0]}" + (f"; write {name}=vllm" if name in str(error) else "")


def _of_error(error: Exception) -> Problem:
    if isinstance(error, MissingMandatoryValue):
        return Problem(_of_missing(error), AT_START)
    message = in_words(error)
    if message.startswith("vllm version None"):  # verl asks vLLM which ranks of LoRA it knows
        return Problem("vLLM is not installed here, so whether it has LoRA of this rank was not checked.", fatal=False)
    return Problem(message, AT_START)
