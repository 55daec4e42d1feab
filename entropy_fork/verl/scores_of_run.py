"""What the scores of a run read, and whether the run has it: asked before Ray starts, and again by the trainer."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from entropy_fork.core.rule import TOKEN_MEAN
from entropy_fork.core.scores import SCORES, Score, score_of
from entropy_fork.core.scoring import try_out
from entropy_fork.core.user_function import is_import_path
from entropy_fork.core.where import Where, where_of
from entropy_fork.verl.config import NODE, EntropyForkConfig, plain_name

#: verl's engines that compute Σπ² if the batch asks for it (``calculate_sum_pi_squared``)
WITH_SUM_PI_SQUARED = ("fsdp", "fsdp2", "megatron")


def scores_read(fork_config: EntropyForkConfig) -> list[Score]:
    """The scores that a run computes: the one that it trains on first, then the observed ones.

    Raises:
        ValueError: one cannot be imported.
    """
    trained_on = [fork_config.score] if fork_config.rule(TOKEN_MEAN).needs_score else []
    return [score_of(name) for name in dict.fromkeys([*trained_on, *fork_config.observe])]


def fields_read(fork_config: EntropyForkConfig) -> set[str]:
    """The fields that the scores and the condition of a run read. Raises as :func:`scores_read`."""
    names = {name for score in scores_read(fork_config) for name in score.fields}
    return names | set(where_of(fork_config.where).fields if fork_config.where else ())


def own_functions(fork_config: EntropyForkConfig) -> tuple[tuple[str, str], ...]:
    """The user's functions that a run calls, as (key, import path)."""
    named = [("score", fork_config.score), ("where", fork_config.where), *(("observe", s) for s in fork_config.observe)]
    return tuple((key, path) for key, path in named if is_import_path(path))


def unscorable(config: DictConfig, fork_config: EntropyForkConfig) -> Iterator[str]:
    """What keeps a run from computing its scores, or from using them as it asks: a message each, with what to write.

    Imports the user's functions and tries them on a made-up batch.

    Args:
        config: the root of verl's config.
        fork_config: ours, which asks for a mask.
    """
    scores: list[Score] = []
    where: Where | None = None
    try:
        where = where_of(fork_config.where) if fork_config.where else None
        scores = scores_read(fork_config)
        for score in scores:
            if score.is_own:
                try_out(score)
        if where is not None:
            try_out(SCORES["entropy"], where)
    except ValueError as error:
        yield f"{NODE}.{error}."
    yield from _missing(config, fork_config, scores, where)
    yield from _misused(config, fork_config, scores, where)


def _missing(
    config: DictConfig, fork_config: EntropyForkConfig, scores: list[Score], where: Where | None
) -> Iterator[str]:
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    with_reference = actor.use_kl_loss or config.algorithm.use_kl_in_reward
    ways = {
        "ref_log_prob": (
            with_reference,
            "a reference policy. Write actor_rollout_ref.actor.use_kl_loss=True or algorithm.use_kl_in_reward=True",
        ),
        "rollout_log_prob": (
            rollout.calculate_log_probs,
            "the rollout's log-probabilities. Write actor_rollout_ref.rollout.calculate_log_probs=True",
        ),
        "sum_pi_squared": (
            actor.strategy in WITH_SUM_PI_SQUARED
            and not OmegaConf.select(config, "actor_rollout_ref.model.use_fused_kernels", default=False),
            f"an engine that computes it ({', '.join(WITH_SUM_PI_SQUARED)}), without verl's fused kernels. Write "
            f"actor_rollout_ref.actor.strategy=fsdp2 and actor_rollout_ref.model.use_fused_kernels=False",
        ),
    }
    readers = {f"score={score.name}": score.fields for score in scores}
    if where is not None:
        readers[f"where={where.text!r}"] = where.fields
    for reader, fields in readers.items():
        for name, (is_there, way) in ways.items():
            if name in fields and not is_there:
                yield f"{NODE}.{reader} reads {name}, which needs {way}."
        if "sum_pi_squared" in fields and fork_config.entropy == "current":
            yield f"{NODE}.{reader} reads sum_pi_squared, which only the log-prob pass computes. Write entropy=old."


def _misused(
    config: DictConfig, fork_config: EntropyForkConfig, scores: list[Score], where: Where | None
) -> Iterator[str]:
    actor = config.actor_rollout_ref.actor
    loss_mode = plain_name(OmegaConf.select(actor, "policy_loss.loss_mode", default="vanilla"))
    if fork_config.use == "clip" and loss_mode != "vanilla":
        yield (
            f"{NODE}.use=clip is PPO's clip with a range per token, and actor.policy_loss.loss_mode={loss_mode} has "
            f"another clip or none. Write actor_rollout_ref.actor.policy_loss.loss_mode=vanilla."
        )
    in_worker = fork_config.in_worker(actor.shuffle)
    if fork_config.observe and in_worker and fork_config.pool != "batch":
        yield (
            f"{NODE}.observe compares with what the driver keeps, and with entropy=current, pool=micro_batch or "
            f"actor.shuffle=True the worker selects. Write {NODE}.observe=[], or entropy=old pool=batch."
        )
    if actor.shuffle and fork_config.use in ("advantage", "clip"):
        alone = all(part.elementwise for part in (*scores[:1], where) if part is not None)
        if not (fork_config.pool == "batch" or (fork_config.pool == "response" and alone)):
            yield (
                f"{NODE}.use={fork_config.use} is written into the batch before actor.shuffle=True deals it into "
                f"mini-batches. Write actor_rollout_ref.actor.shuffle=False, or {NODE}.pool=batch."
            )
