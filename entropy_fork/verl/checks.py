"""The checks before Ray starts. They refuse a config that cannot do what it asks for, and say what to write instead.

Hook: verl's ``main_ppo`` calls ``verl.utils.config.validate_config`` before it starts Ray. verl has no registry for
more checks. So :func:`check_first` runs right before ``validate_config``, and :func:`check_before_training` right after
it (see ``plugin.py``). ``entropy_fork/common/asked_for.py`` lists which part of a config each check belongs to. A run
that asks for nothing of ours passes all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

import verl
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from entropy_fork.common.asked_for import GROUPS, came_as_a_plain_value, chosen, overrides
from entropy_fork.common.close_names import did_you_mean
from entropy_fork.common.errors import EntropyForkError, all_at_once, problems_of
from entropy_fork.common.recipes import preset_names
from entropy_fork.core.rule import LOSS_AGG_MODES, SEQ_MEAN_TOKEN_MEAN
from entropy_fork.verl.config import (
    ESTIMATORS,
    MASKABLE_LOSSES,
    MASKED_STRATEGIES,
    NEED_CRITIC,
    NEED_GROUP,
    NODE,
    EntropyForkConfig,
    averages_by_sequence,
    check_places,
    is_ours,
    make_typed,
    plain_name,
    read_config,
    read_guards,
    read_node,
)
from entropy_fork.verl.guards.data_files import check_data_files, reads_with_verl
from entropy_fork.verl.guards.resume import check_resumable
from entropy_fork.verl.scores_of_run import unscorable


def check_before_training(config: DictConfig) -> None:
    """Refuse a config that cannot do what it asks for, before Ray starts.

    Args:
        config: main_ppo's whole config.

    Raises:
        EntropyForkError: with all that is wrong, and what to write instead.
    """
    if problems := find_problems(config):
        raise EntropyForkError(*all_at_once(problems))
    global _checked
    _checked = weakref.ref(config)


def find_problems(config: DictConfig) -> list[str]:
    """What :func:`check_before_training` refuses, a message each. Types our nodes where they are good."""

    def check_files() -> None:
        if read_guards(config).data_files:
            check_data_files(config)

    def check_mask() -> None:
        try:
            fork_config = read_config(config)
        except EntropyForkError:  # another check's complaint; what its values have no say in is looked at all the same
            fork_config = EntropyForkConfig()
        if fork_config is not None:
            check_maskable(config, fork_config)

    return problems_of(
        (
            lambda: check_groups(config),
            lambda: read_config(config),
            lambda: check_estimator(config),
            lambda: check_on_policy(config),
            lambda: make_typed(config),
            lambda: check_resumable(config),
            check_files,
            check_mask,
            lambda: check_dumpable(config),
        )
    )


def refuse_all(ours: Sequence[str], verls: Exception | None) -> None:
    """Raise what was found before Ray starts, all of it at once; verl's own error as it is, where it is alone.

    Args:
        ours: messages.
        verls: what verl's ``validate_config`` raised.

    Raises:
        EntropyForkError: with all messages.
    """
    if not ours:
        if verls is not None:
            raise verls
        return
    more = [] if verls is None or isinstance(verls, (MissingMandatoryValue, TypeError)) else [in_words(verls)]
    raise EntropyForkError(*all_at_once([*ours, *(message for message in more if message not in ours)]))


def in_words(error: BaseException) -> str:
    """An error's message in one line, without Hydra's account of where it was raised."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__  # a check in one of verl's dataclasses
    return " ".join(str(error).split()) or type(error).__name__


_checked: weakref.ref[DictConfig] | None = None


def was_checked(config: DictConfig) -> bool:
    """Whether this config was the last one to pass :func:`check_before_training`.

    The types of our nodes do not prove that: Hydra gives a preset its types before any check.
    """
    return _checked is not None and _checked() is config


def check_groups(config: DictConfig) -> None:
    """Refuse a recipe, a cluster or a template that Hydra did not apply.

    Raises:
        EntropyForkError: with what is wrong and what to write instead.
    """
    for group in GROUPS:
        value = OmegaConf.select(config, group, default=None)
        if came_as_a_plain_value(group, value):
            raise EntropyForkError(
                f"'{group}: {value}' arrived as a plain key: Hydra did not apply the {group}, and the run would train "
                f"with verl's defaults. Check the name ({group}s of this install: {', '.join(preset_names(group))})."
            )


#: keys that a recipe leaves open, and what to write for them. Their value is null, because '???' would keep verl's.
OPEN_KEYS = {
    "data.train_files": "data.train_files=FILE.parquet (made by 'entropy-fork data prepare')",
    "data.val_files": "data.val_files=FILE.parquet (made by 'entropy-fork data prepare')",
    "actor_rollout_ref.model.path": "actor_rollout_ref.model.path=MODEL (which: see the top of the recipe's file)",
    "actor_rollout_ref.rollout.name": "+cluster=NAME, the machines that it runs on: {clusters}",
}


def check_complete(config: DictConfig) -> None:
    """Refuse a run of a recipe that lacks a key. Runs before verl's own checks, whose message would mislead.

    Raises:
        EntropyForkError: the recipe would undo the cluster, because it stands after it; or keys are missing. The
            message says what to write for each.
    """
    words = [word.lstrip("+").partition("=") for word in overrides() or []]
    ours = [group for group, _, name in words if group in ("recipe", "cluster") and name in preset_names(group)]
    if ours == ["cluster", "recipe"]:
        raise EntropyForkError(
            "+cluster=… stands before +recipe=…. Hydra applies them in this order, so the recipe would undo what the "
            "cluster sets. Write +recipe=… +cluster=…"
        )
    missing = [
        remedy.format(clusters=", ".join(preset_names("cluster")))
        for key, remedy in OPEN_KEYS.items()
        if OmegaConf.select(config, key, default=None) is None
        and (reads_with_verl(config) or not key.startswith("data."))
    ]
    if missing:
        raise EntropyForkError("this run is not complete. Add to the command line:\n  " + "\n  ".join(missing))


def check_first(config: DictConfig) -> None:
    """The checks that run before verl's own, because verl's message for these faults misleads.

    Raises:
        EntropyForkError: with what is wrong and what to write instead.
    """
    check_places(config)
    if chosen("recipe") is not None:
        check_complete(config)


def check_estimator(config: DictConfig) -> None:
    """Refuse one of our advantage estimators if the run lacks what it is computed from.

    Raises:
        EntropyForkError: no critic, a group of one answer, or verl's legacy trainer.
    """
    name = config.algorithm.adv_estimator
    if not is_ours("ADV_ESTIMATOR_REGISTRY", name, ESTIMATORS):
        return
    if problems := list(_lacking(config, name)):
        raise EntropyForkError(*all_at_once(problems))


def _lacking(config: DictConfig, name: str) -> Iterator[str]:
    """What an estimator of ours is computed from and will not be there."""
    if name in NEED_CRITIC and not config.critic.enable:
        yield (
            f"algorithm.adv_estimator={name} is computed from a critic's values, but verl starts a critic by itself "
            f"only for gae. Write critic.enable=True (and critic.model.path=…), or an estimator that needs no critic: "
            f"{', '.join(name for name in ESTIMATORS if name not in NEED_CRITIC)}."
        )
    if not config.trainer.use_v1:
        yield (
            f"algorithm.adv_estimator={name} needs verl's V1 trainer, and trainer.use_v1=False chooses the legacy one. "
            f"Write trainer.use_v1=True."
        )
    if name in NEED_GROUP and config.actor_rollout_ref.rollout.n < 2:
        yield (
            f"algorithm.adv_estimator={name} compares the answers to one question, and actor_rollout_ref.rollout.n="
            f"{config.actor_rollout_ref.rollout.n} asks for one answer. Write at least n=2, or reward_to_go."
        )


def check_on_policy(config: DictConfig) -> None:
    """Refuse ``reinforce`` if it would train on answers of another policy.

    The loss has no importance ratio that corrects for another policy. From the second gradient step of a batch on, its
    gradient would not be the gradient of any objective.

    Raises:
        EntropyForkError: several gradient steps per batch, or an asynchronous trainer.
    """
    actor, trainer = config.actor_rollout_ref.actor, config.trainer
    loss_mode = OmegaConf.select(actor, "policy_loss.loss_mode", default="vanilla")
    if not is_ours("POLICY_LOSS_REGISTRY", loss_mode, ("reinforce",)):
        return
    wrong = []
    if actor.ppo_mini_batch_size != config.data.train_batch_size:
        wrong.append(
            f"actor_rollout_ref.actor.ppo_mini_batch_size={config.data.train_batch_size} (the train_batch_size, not "
            f"{actor.ppo_mini_batch_size})"
        )
    if actor.ppo_epochs != 1:
        wrong.append(f"actor_rollout_ref.actor.ppo_epochs=1 (not {actor.ppo_epochs})")
    if trainer.use_v1 and trainer.v1.trainer_mode != "sync":
        wrong.append(f"trainer.v1.trainer_mode=sync (not {trainer.v1.trainer_mode})")
    if wrong:
        raise EntropyForkError(
            f"actor.policy_loss.loss_mode=reinforce has no importance ratio, so it needs one gradient step per batch, "
            f"on answers of the policy that is trained. Write {', '.join(wrong)}; or use loss_mode=vanilla."
        )


def check_maskable(config: DictConfig, fork_config: EntropyForkConfig) -> None:
    """Refuse a config in which token weights would have no effect, or not the exact one.

    The launcher calls this before Ray starts. The trainer calls it again, because a program may start without the
    launcher's checks.

    Raises:
        EntropyForkError: all that cannot be masked, with the ways out.
    """
    if problems := list(_unmaskable(config, fork_config)):
        raise EntropyForkError(*all_at_once(problems))


def _unmaskable(config: DictConfig, fork_config: EntropyForkConfig) -> Iterator[str]:
    actor = config.actor_rollout_ref.actor
    correction = OmegaConf.select(config, "algorithm.rollout_correction", default=None)
    loss_mode = plain_name(OmegaConf.select(actor, "policy_loss.loss_mode", default="vanilla"))

    if not config.trainer.use_v1:
        yield (
            "entropy_fork needs verl's V1 trainer, and trainer.use_v1=False chooses the legacy one, which would train "
            "on all tokens. Write trainer.use_v1=True, or entropy_fork=off."
        )
    if correction and correction.get("bypass_mode", False):
        yield (
            "algorithm.rollout_correction.bypass_mode=True skips the log-prob pass that computes the old policy's "
            "entropies, and its loss ignores token weights. Write bypass_mode=False, or entropy_fork=off."
        )
    if loss_mode not in MASKABLE_LOSSES:
        reason = f"is not known to multiply token weights into its gradient.{did_you_mean(loss_mode, MASKABLE_LOSSES)}"
        if loss_mode == "geo_mean":
            reason = "takes the logarithm of token weights, and a zero poisons the sequence."
        yield (
            f"actor.policy_loss.loss_mode={loss_mode} {reason} Use one of {', '.join(MASKABLE_LOSSES)}, "
            f"or entropy_fork=off."
        )
    if (
        fork_config.denominator == "kept"
        and averages_by_sequence(loss_mode, verl.__version__)
        and actor.loss_agg_mode != SEQ_MEAN_TOKEN_MEAN
    ):
        yield (
            f"verl {verl.__version__} averages loss_mode={loss_mode} as seq-mean-token-mean and ignores "
            f"actor.loss_agg_mode={actor.loss_agg_mode}, so the weights would be made for another mean. Write "
            f"actor_rollout_ref.actor.loss_agg_mode={SEQ_MEAN_TOKEN_MEAN}, which changes nothing else."
        )
    if actor.loss_agg_mode not in LOSS_AGG_MODES:
        yield (
            f"actor.loss_agg_mode={actor.loss_agg_mode} is not known to entropy_fork. Write one of "
            f"{', '.join(LOSS_AGG_MODES)}."
        )
    if fork_config.in_worker(actor.shuffle) and actor.strategy not in MASKED_STRATEGIES:
        yield (
            f"entropy=current, pool=micro_batch and actor.shuffle=True select in the worker. That works in verl's "
            f"engines {', '.join(MASKED_STRATEGIES)} only, and actor.strategy={actor.strategy}. Write "
            f"{NODE}.entropy=old {NODE}.pool=mini_batch actor_rollout_ref.actor.shuffle=False, which works in every "
            f"engine (the preset {NODE}=global has these values)."
        )
    yield from unscorable(config, fork_config)
    if OmegaConf.select(config, "distillation.enabled", default=False):
        yield (
            "distillation.enabled=True replaces the policy loss by one that is not masked. Write "
            "distillation.enabled=False, or entropy_fork=off."
        )


def check_dumpable(config: DictConfig) -> None:
    """Refuse a dump of tokens if the run would write none.

    A baseline on all tokens can dump too, and :func:`check_maskable` does not check it.

    Raises:
        EntropyForkError: the trainer or an option makes the dump impossible.
    """
    fork_config = read_node(config)
    if fork_config is None or fork_config.dump_every == 0:
        return
    wanted = f"{NODE}.dump_every={fork_config.dump_every} needs"
    if not config.trainer.use_v1:
        raise EntropyForkError(f"{wanted} verl's V1 trainer. Write trainer.use_v1=True, or {NODE}.dump_every=0.")
    if OmegaConf.select(config, "algorithm.rollout_correction.bypass_mode", default=False):
        raise EntropyForkError(
            f"{wanted} entropies from verl's log-prob pass, which algorithm.rollout_correction.bypass_mode=True skips. "
            f"Write bypass_mode=False, or {NODE}.dump_every=0."
        )
