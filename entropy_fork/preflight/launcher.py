"""Runs the checks that ``main_ppo`` makes when it is launched: verl's and this package's."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable

from hydra.errors import InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.preflight.problem import AT_START, IN_RAY, Problem
from entropy_fork.preflight.read_shape import ROLLOUT
from entropy_fork.verl import plugin
from entropy_fork.verl.checks import check_before_training, check_maskable
from entropy_fork.verl.config import read_config, read_guards
from entropy_fork.verl.cpu import cpu_platform
from entropy_fork.verl.guards.data_files import check_data_files


def what_the_launcher_says(config: DictConfig) -> list[Problem]:
    """Run main_ppo's own checks.

    First all together, as main_ppo runs them: that ends at the first one that fails. Then each by itself, so that one
    problem does not hide the others.
    """
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils import config as verl_config

    with_ours = verl_config.validate_config
    verls_alone = getattr(with_ours, "__wrapped__", with_ours)
    found: list[Problem] = []

    def validate(function: Callable[..., None]) -> None:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(config, need_reference_policy(config), need_critic(config))

    def check_mask() -> None:
        fork_config = read_config(config)
        if fork_config is not None:
            check_maskable(config, fork_config)

    checks: tuple[Callable[[], object], ...] = (
        lambda: validate(with_ours),
        lambda: validate(verls_alone),
        lambda: config.actor_rollout_ref.rollout.name,
        lambda: cpu_platform.check_before_training(config) if plugin.ON_CPU else None,
        lambda: check_before_training(config),
        check_mask,
    )
    for check in checks:
        try:
            check()
        except MissingMandatoryValue as error:
            if not found:
                found.append(Problem(_of_missing(error), AT_START))
        except Exception as error:  # whatever it is, the launcher would end with it
            problem = _of_error(error)
            if problem.message not in [known.message for known in found]:
                found.append(problem)
    return found


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


def _of_error(error: BaseException) -> Problem:
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__  # a check in one of verl's dataclasses, wrapped in Hydra's account of it
    message = " ".join(str(error).split()) or type(error).__name__
    if message.startswith("vllm version None"):  # verl asks vLLM which ranks of LoRA it knows
        return Problem("vLLM is not installed here, so whether it has LoRA of this rank was not checked.", fatal=False)
    return Problem(message, AT_START)
