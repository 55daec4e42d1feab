"""Names in a config that stand for code: each must have been registered by somebody."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from omegaconf import DictConfig, OmegaConf

from entropy_fork.common.close_names import did_you_mean
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.problem import IN_RAY, IN_UPDATE, Problem
from entropy_fork.verl.config import ESTIMATORS, plain_name, read_config
from entropy_fork.verl.guards.data_files import OUR_REWARD

#: verl's values of ``trainer.resume_mode``: it logs an error for others, and then dies of another one
RESUME_MODES = ("auto", "disable", "resume_path")


def check_names(config: DictConfig) -> Iterator[Problem]:
    """Estimator, loss, rollout, trainer, reward manager and resume mode are names that verl or a plugin knows.

    What a module registers that only a worker imports, nobody here knows: a run that names one is not checked.
    """
    mode = _text(config, "trainer.resume_mode")
    if mode is not None and mode not in RESUME_MODES:
        yield _unknown("trainer.resume_mode", mode, RESUME_MODES, IN_RAY)
    manager = _text(config, "reward.reward_manager.name")
    if _text(config, "reward.reward_manager.source") == "register" and manager is not None:
        known = _managers()
        function = OmegaConf.select(config, "reward.custom_reward_function.path", default=None)
        if manager not in known and function in (None, OUR_REWARD):  # a file of the user's may register one
            yield _unknown("reward.reward_manager.name", manager, known, IN_RAY)
    if _registers_elsewhere(config):
        return
    from verl.trainer.ppo import core_algos

    losses = (*core_algos.POLICY_LOSS_REGISTRY, "reinforce")
    for key, names, when in (
        ("algorithm.adv_estimator", (*core_algos.ADV_ESTIMATOR_REGISTRY, *ESTIMATORS), IN_UPDATE),
        ("actor_rollout_ref.actor.policy_loss.loss_mode", () if _is_masked(config) else losses, IN_UPDATE),
        ("actor_rollout_ref.rollout.name", _rollouts(), IN_RAY),
        ("trainer.v1.trainer_mode", _trainers() if _flag(config, "trainer.use_v1") else (), IN_RAY),
    ):
        name = _text(config, key)
        plain = sorted({plain_name(str(known)) for known in names})
        if name is not None and plain and plain_name(name) not in plain:
            yield _unknown(key, name, plain, when)


def _unknown(key: str, name: str, known: Iterable[str], when: str) -> Problem:
    known = list(known)
    return Problem(f"{key}={name} is not known.{did_you_mean(name, known)} Known: {', '.join(known)}.", when)


def _registers_elsewhere(config: DictConfig) -> bool:
    """Whether a module that this process has not imported may register names in the trainer or in a worker."""
    keys = (
        "actor_rollout_ref.model.external_lib",
        "critic.model.external_lib",
        "data.custom_cls.path",
        "actor_rollout_ref.rollout.agent.agent_loop_manager_class",
        "trainer.v1.sampler.custom_sampler.path",
    )
    variables = OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env.env_vars", default=None) or {}
    return any(_path(config, key) for key in keys) or any(
        name in variables for name in ("VERL_USE_EXTERNAL_MODULES", "VERL_USE_EXTERNAL_PLUGINS")
    )


def _is_masked(config: DictConfig) -> bool:
    """Whether the run has a mask, whose own check looks at the loss."""
    try:
        return read_config(config) is not None
    except EntropyForkError:
        return True


def _rollouts() -> list[str]:
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY

    return sorted({name for name, _ in _ROLLOUT_REGISTRY})


def _managers() -> list[str]:
    import verl.experimental.reward_loop.reward_manager  # noqa: F401 - each registers itself
    from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER

    return sorted(REWARD_MANAGER)


def _trainers() -> list[str]:
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    return sorted(TRAINER_REGISTRY)


def _text(config: DictConfig, key: str) -> str | None:
    value = OmegaConf.select(config, key, default=None)
    return str(value) if value is not None else None


def _path(config: DictConfig, key: str) -> bool:
    return bool(OmegaConf.select(config, key, default=None))


def _flag(config: DictConfig, key: str) -> bool:
    return bool(OmegaConf.select(config, key, default=False))
