"""The config node ``entropy_fork``: its schema, and every check that can be made before Ray starts.

Hook: verl's ``main_ppo`` calls ``verl.utils.config.validate_config`` before it starts Ray. There is no registry for
further checks, so :func:`check_before_training` is run right after it (see ``plugin.py``). It also makes the node typed
whatever it was written in. Typed, it can only be unpickled by a process that has this plugin: a TaskRunner without it
stops with ``No module named 'entropy_fork'`` instead of training on all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import verl
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from packaging.version import Version

from entropy_fork.core.batch import Rule
from entropy_fork.core.schedule import ratio_at
from entropy_fork.core.selection import Selector
from entropy_fork.core.weighting import LOSS_AGG_MODES, SEQ_MEAN_TOKEN_MEAN, TOKEN_MEAN
from entropy_fork.verl.data_files import check_data_files
from entropy_fork.verl.errors import EntropyForkError, process_name

NODE = "entropy_fork"

#: policy losses (verl's, and ``reinforce``) whose gradient is ``rollout_is_weights`` times the plain one, exactly 0
#: where the weight is 0
MASKABLE_LOSSES = (
    "vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "dro", "cispo", "reinforce",
)  # fmt: skip

#: those of them in which a token of weight 0 has no part in the loss and gradient of any other token
TOKENWISE_LOSSES = ("vanilla", "dppo_tv", "dppo_kl", "sapo", "gpg", "dro", "cispo", "reinforce")

#: estimators of ``advantages.py``: from a critic's values, from a group of answers, and all of them
NEED_CRITIC = ("q_value", "td_residual")
NEED_GROUP = ("reward_to_go_baseline", "reward_to_go_leave_one_out")
ESTIMATORS = ("total_return", "reward_to_go", *NEED_GROUP, *NEED_CRITIC)

#: verl's engines that ``engine.py`` can make the selection in
MASKED_STRATEGIES = ("fsdp", "fsdp2")

#: ids of dumped answers: the step times this, plus the answer's number in its step
ANSWERS_PER_STEP = 100_000


def averages_by_sequence(loss_mode: str, version: str) -> bool:
    """Whether this verl's loss is a seq-mean-token-mean whatever ``actor.loss_agg_mode`` says (core_algos.py)."""
    return loss_mode == "sapo" or (loss_mode == "gspo" and Version(version) < Version("0.9.1"))


def guarded_name(loss_mode: str) -> str:
    """The name under which ``policy_loss.py`` registers a loss of verl's with its guard; of a guarded one, its own."""
    return f"{NODE}/{plain_name(loss_mode)}"


def guard_loss(config: DictConfig) -> None:
    """Ask for the guarded loss: a worker then trains on token weights, or stops. A second call changes nothing.

    Args:
        config: the root of a config that asks for a mask.
    """
    policy_loss = config.actor_rollout_ref.actor.policy_loss
    with open_dict(policy_loss):
        policy_loss.loss_mode = guarded_name(policy_loss.get("loss_mode", "vanilla"))


def plain_name(loss_mode: str) -> str:
    """verl's name of a loss, guarded or not."""
    return loss_mode.removeprefix(f"{NODE}/")


@dataclass
class EntropyForkConfig:
    """Which tokens are trained on, by the entropy of their position. See docs/semantics.md.

    Attributes:
        enabled: False leaves verl as it is (the preset ``off``: the same recipe as its own all-token baseline).
        top_ratio: ρ in (0, 1], the share of the response tokens of a pool that is kept. 1.0 keeps everything and gives
            verl's own update bit for bit.
        select: ``top`` (highest entropy), ``bottom`` (lowest), ``random``, or ``band`` (between ``band_from`` and ρ).
        band_from: for ``band``, in (0, ρ).
        entropy: ``old`` (of the policy that verl computes the old log-probs with: free) or ``current`` (of the policy
            at each gradient step: the paper's Eq. 1 and the authors' code).
        pool: ``response``, ``micro_batch``, ``mini_batch`` or ``batch``: over what the share is taken; the last two
            span all ranks.
        ties: ``exact`` (⌈ρN⌉ tokens, earliest position first) or ``threshold`` (every token at τ).
        denominator: ``kept`` (the paper's v2, the authors' code) or ``all`` (v1, TRL, ms-swift).
        weight: ``hard`` (1 for a kept token) or ``soft`` (in proportion to its entropy, with a mean of 1).
        schedule, final_ratio, schedule_steps: ρ from ``top_ratio`` at step 1 to ``final_ratio`` at ``schedule_steps``
            along a line (``linear``) or half a cosine (``cosine``); ``constant`` stays at ``top_ratio``.
        seed: of ``select=random``.
        sparse_head: compute the LM head at response positions only, and in the update, where nothing else needs them,
            at kept positions only. False computes every position's, as verl does. The update is the same but for
            the last bits; of verl's metrics, those that then see kept tokens only are called ``…_kept``.
        dump_every: write the tokens of ``dump_answers`` answers of every so many steps, their entropies and what was
            selected, into ``dump_dir`` (by default ``tokens`` in ``trainer.default_local_dir``), for ``entropy-fork
            report``; 0 writes nothing. With ``enabled=False`` as well.
        patience_s: for how many seconds no answer may come before a run that waits for answers stops with an error; 0
            waits for ever, as verl does. With ``enabled=False`` as well.
    """

    enabled: bool = True
    top_ratio: float = 0.2
    select: str = "top"
    band_from: float = 0.0
    entropy: str = "old"
    pool: str = "mini_batch"
    ties: str = "exact"
    denominator: str = "kept"
    weight: str = "hard"
    schedule: str = "constant"
    final_ratio: float = 1.0
    schedule_steps: int = 0
    seed: int = 0
    sparse_head: bool = True
    dump_every: int = 0
    dump_answers: int = 8
    dump_dir: str | None = None
    patience_s: float = 3600.0

    def selector_at(self, step: int) -> Selector:
        """What is kept of a pool at a training step (from 1).

        Raises:
            ValueError: a value that has no meaning.
        """
        ratio = ratio_at(step, self.top_ratio, self.schedule, self.final_ratio, self.schedule_steps)
        return Selector(ratio, self.select, self.ties, self.band_from)

    def rule_at(self, step: int, loss_agg_mode: str) -> Rule:
        """All of it at a training step, for a given ``actor.loss_agg_mode``.

        Raises:
            ValueError: a value that has no meaning, or two that do not go together.
        """
        return Rule(self.selector_at(step), self.entropy, self.pool, loss_agg_mode, self.denominator, self.weight)

    def in_worker(self, shuffle: bool) -> bool:
        """Whether the selection can only be made in the worker, in or right before a gradient step.

        Args:
            shuffle: verl's ``actor.shuffle``, which draws the mini-batches there.
        """
        return self.entropy == "current" or self.pool == "micro_batch" or shuffle

    def dense_because(self, config: DictConfig) -> str | None:
        """Why the LM head of an update is needed at every position; None where the kept ones are enough.

        Args:
            config: the root.
        """
        actor = config.actor_rollout_ref.actor
        loss_mode = OmegaConf.select(actor, "policy_loss.loss_mode", default="vanilla")
        loss_mode = plain_name(loss_mode)
        for reason, holds in {
            f"{NODE}.sparse_head=False": not self.sparse_head,
            f"actor.strategy={actor.strategy}": actor.strategy not in MASKED_STRATEGIES,
            "entropy=current with pool=micro_batch selects during the update": self.rule_at(
                1, TOKEN_MEAN
            ).selected_in_loss,
            "the KL loss is of all tokens": actor.use_kl_loss,
            "the entropy bonus is of all tokens": actor.entropy_coeff != 0 or actor.calculate_entropy,
            f"the loss {loss_mode} looks at all tokens of a response": loss_mode not in TOKENWISE_LOSSES,
        }.items():
            if holds:
                return reason
        return None

    def check(self) -> None:
        """Raise a ValueError for what any step of a run would stumble over."""
        for step in (1, max(1, self.schedule_steps)):
            self.rule_at(step, TOKEN_MEAN)
        if self.dump_every < 0:
            raise ValueError(f"dump_every must be a number of steps, or 0 to dump nothing, got {self.dump_every}")
        if not 0 < self.dump_answers < ANSWERS_PER_STEP:
            raise ValueError(f"dump_answers must be in [1, {ANSWERS_PER_STEP}), got {self.dump_answers}")
        if not self.patience_s >= 0:
            raise ValueError(f"patience_s must be a number of seconds, or 0 to wait for ever, got {self.patience_s}")


def register_schema() -> None:
    """Let the presets name the schema in their defaults, so that Hydra itself refuses a mistyped key or type."""
    ConfigStore.instance().store(group=NODE, name="schema", node=EntropyForkConfig, provider="entropy-fork")


#: keys that do not change what a run selects, or that a run's name says in another way
UNNAMED = ("enabled", "select", "top_ratio", "sparse_head", "dump_every", "dump_answers", "dump_dir", "patience_s")


def selection_name(config: DictConfig) -> str:
    """What a run selects, in a few characters: ``off``, ``top0.2``, ``top0.2-current-micro_batch``, …

    For names of runs. verl resumes from whatever lies in the folder of a run's name, so a baseline or an ablation that
    went under the recipe's own name would go on from the checkpoints of another method.

    Args:
        config: the root of a config with or without the node.
    """
    node = OmegaConf.select(config, NODE, default=None)
    if node is None or not node.enabled:
        return "off"
    words = [f"{node.select}{node.top_ratio:g}"]
    for field in fields(EntropyForkConfig):
        value = node[field.name]
        if field.name not in UNNAMED and value != field.default:
            words.append(value if isinstance(value, str) else f"{field.name}{value:g}")
    return "-".join(words)


# ``${entropy_fork_name:}`` in a recipe. Here, where every process that reads a config with our node comes by.
OmegaConf.register_new_resolver("entropy_fork_name", lambda *, _root_: selection_name(_root_), replace=True)


def read_config(config: DictConfig) -> EntropyForkConfig | None:
    """The typed node of a root config, or None where it is absent or switched off. Raises as :func:`read_node`."""
    node = read_node(config)
    return node if node is not None and node.enabled else None


def read_node(config: DictConfig) -> EntropyForkConfig | None:
    """The typed node of a root config, switched off or not; None where it is absent.

    Raises:
        EntropyForkError: the node lies elsewhere than at the root, is not a mapping, or has an unknown key or a value
            out of range.
    """
    if misplaced := next(_nodes_below(OmegaConf.to_container(config, resolve=False)), None):
        raise EntropyForkError(
            f"'{misplaced}' does nothing: '{NODE}' is read at the root of the config. Write +{NODE}=global or "
            f"+{NODE}.top_ratio=… on the command line."
        )
    node = OmegaConf.select(config, NODE, default=None)
    if node is None:
        return None
    if not isinstance(node, DictConfig):
        raise EntropyForkError(
            f"'{NODE}: {node}' arrived as a plain value, not as a preset, so nothing would be masked: the presets were "
            f"not on Hydra's search path. Check that the plugin is active in this process ({process_name()}): "
            f"'python -c \"import verl, entropy_fork.verl.plugin\"' must run without an error."
        )
    try:
        # Unstructured first: merging two structured configs of one type would skip the check of the keys.
        typed = OmegaConf.merge(OmegaConf.structured(EntropyForkConfig), OmegaConf.to_container(node, resolve=True))
        parsed: EntropyForkConfig = OmegaConf.to_object(typed)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        known = ", ".join(f"{f.name} ({f.type})" for f in fields(EntropyForkConfig))
        raise EntropyForkError(
            f"bad config node '{NODE}': {str(error).splitlines()[0]}. Known keys: {known}."
        ) from None
    try:
        parsed.check()
    except ValueError as error:
        raise EntropyForkError(f"{NODE}: {error}; entropy_fork=off trains without the mask") from None
    return parsed


def _nodes_below(node: Any, path: str = "") -> Iterator[str]:
    """Where our node or its ratio lies under another: verl's nodes take keys that they do not know, and ignore them."""
    for key, child in node.items() if isinstance(node, dict) else ():
        if path and key in (NODE, "top_ratio"):
            yield f"{path}{key}"
        if path or key != NODE:
            yield from _nodes_below(child, f"{path}{key}.")


def check_before_training(config: DictConfig) -> None:
    """Refuse what cannot be masked exactly, before Ray starts. Called with main_ppo's whole config.

    Raises:
        EntropyForkError: with what is wrong and what to write instead.
    """
    recipe = OmegaConf.select(config, "recipe", default=None)
    if isinstance(recipe, str):
        raise EntropyForkError(
            f"'recipe: {recipe}' arrived as a plain key, so the recipe was not applied and verl's defaults would be "
            f"trained. Check the name (recipes of this install: {', '.join(preset_names('recipe'))})."
        )
    masked = read_config(config)
    check_estimator(config)
    check_on_policy(config)
    if OmegaConf.select(config, NODE, default=None) is not None:
        make_typed(config)
        check_data_files(config)
    if masked is not None:
        check_maskable(config, masked)
    check_dumpable(config)


def preset_names(group: str) -> list[str]:
    """The options of a config group that this install ships."""
    return sorted(path.stem for path in (recipes_dir() / group).glob("*.yaml"))


def recipes_dir() -> Path:
    """The folder of the shipped config groups: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed, checkout = package / "recipes", package.parent / "recipes"
    return installed if installed.is_dir() else checkout


#: keys that a recipe leaves open (null: '???' over a value of verl's keeps that value), and what to write for them
OPEN_KEYS = {
    "data.train_files": "data.train_files=FILE.parquet (made by 'entropy-fork data prepare')",
    "data.val_files": "data.val_files=FILE.parquet (made by 'entropy-fork data prepare')",
    "actor_rollout_ref.model.path": "actor_rollout_ref.model.path=MODEL (which: see the top of the recipe's file)",
    "actor_rollout_ref.rollout.name": "+cluster=NAME, the machines that it runs on: {clusters}",
}


def check_complete(config: DictConfig) -> None:
    """Refuse a run that is not whole. Called with main_ppo's config before verl looks at it, at a missing key first.

    Raises:
        EntropyForkError: with groups in an order in which the recipe would undo the cluster, or with the keys that are
            missing and what to write for each.
    """
    groups = [word.split("=")[0] for word in _command_line() if word.startswith(("+recipe=", "+cluster="))]
    if groups == ["+cluster", "+recipe"]:
        raise EntropyForkError(
            "+cluster=… stands before +recipe=…, and Hydra applies them in their order, so the recipe would undo what "
            "the cluster says. Write +recipe=… +cluster=…"
        )
    missing = [
        remedy.format(clusters=", ".join(preset_names("cluster")))
        for key, remedy in OPEN_KEYS.items()
        if OmegaConf.select(config, key, default=None) is None
    ]
    if missing:
        raise EntropyForkError("this run is not complete. Add to the command line:\n  " + "\n  ".join(missing))


def _command_line() -> list[str]:
    """The overrides as the user wrote them; none where the config was not composed by a Hydra application."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def make_typed(config: DictConfig) -> None:
    """Give the node of a root config its type, so that a process without this plugin cannot unpickle it.

    Raises:
        EntropyForkError: see :func:`read_node`.
    """
    if read_node(config) is None or is_typed(config):
        return
    node = OmegaConf.to_container(config[NODE], resolve=True)
    with open_dict(config):
        config[NODE] = OmegaConf.merge(OmegaConf.structured(EntropyForkConfig), node)


def is_typed(config: DictConfig) -> bool:
    """Whether the node of a root config has its type; also True where there is no node."""
    node = OmegaConf.select(config, NODE, default=None)
    return node is None or (isinstance(node, DictConfig) and OmegaConf.get_type(node) is EntropyForkConfig)


def check_estimator(config: DictConfig) -> None:
    """Refuse one of our advantage estimators where what it is computed from will not be there.

    Raises:
        EntropyForkError: no critic, a group of one answer, or verl's legacy trainer.
    """
    name = config.algorithm.adv_estimator
    if name in NEED_CRITIC and not config.critic.enable:
        raise EntropyForkError(
            f"algorithm.adv_estimator={name} is computed from a critic's values, and verl starts a critic unasked for "
            f"gae alone. Write critic.enable=True (and critic.model.path=…), or an estimator that needs none: "
            f"{', '.join(name for name in ESTIMATORS if name not in NEED_CRITIC)}."
        )
    if name in ESTIMATORS and not config.trainer.use_v1:
        raise EntropyForkError(
            f"algorithm.adv_estimator={name} needs verl's V1 trainer, and trainer.use_v1=False chooses the legacy one. "
            f"Write trainer.use_v1=True."
        )
    if name in NEED_GROUP and config.actor_rollout_ref.rollout.n < 2:
        raise EntropyForkError(
            f"algorithm.adv_estimator={name} compares the answers to one question, and actor_rollout_ref.rollout.n="
            f"{config.actor_rollout_ref.rollout.n} asks for one answer. Write at least n=2, or reward_to_go."
        )


def check_on_policy(config: DictConfig) -> None:
    """Refuse ``reinforce`` where answers would be trained on that another policy has given.

    The loss has no ratio that could account for it: from the second gradient step of a batch on its gradient is that of
    nothing.

    Raises:
        EntropyForkError: several gradient steps per batch, or an asynchronous trainer.
    """
    actor, trainer = config.actor_rollout_ref.actor, config.trainer
    if OmegaConf.select(actor, "policy_loss.loss_mode", default="vanilla") != "reinforce":
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
            f"actor.policy_loss.loss_mode=reinforce has no importance ratio, so it is for one gradient step per batch, "
            f"on answers of the policy that is trained. Write {', '.join(wrong)}; or use loss_mode=vanilla."
        )


def check_maskable(config: DictConfig, masked: EntropyForkConfig) -> None:
    """Refuse what the token weights would not reach, or would not be exact in.

    The launcher asks before Ray starts, and the trainer once more, for those who start it in another way.

    Raises:
        EntropyForkError: what cannot be masked, with the way out.
    """
    actor = config.actor_rollout_ref.actor
    correction = OmegaConf.select(config, "algorithm.rollout_correction", default=None)
    loss_mode = plain_name(OmegaConf.select(actor, "policy_loss.loss_mode", default="vanilla"))

    if not config.trainer.use_v1:
        raise EntropyForkError(
            "entropy_fork needs verl's V1 trainer, and trainer.use_v1=False chooses the legacy one, which would train "
            "on all tokens. Write trainer.use_v1=True, or entropy_fork=off."
        )
    if correction and correction.get("bypass_mode", False):
        raise EntropyForkError(
            "algorithm.rollout_correction.bypass_mode=True skips the log-prob pass that computes the old policy's "
            "entropies, and its loss ignores token weights. Write bypass_mode=False, or entropy_fork=off."
        )
    if loss_mode not in MASKABLE_LOSSES:
        reason = "is not known to multiply token weights into its gradient"
        if loss_mode == "geo_mean":
            reason = "takes the logarithm of token weights, and a zero poisons the sequence"
        raise EntropyForkError(
            f"actor.policy_loss.loss_mode={loss_mode} {reason}. Use one of {', '.join(MASKABLE_LOSSES)}, "
            f"or entropy_fork=off."
        )
    if (
        masked.denominator == "kept"
        and averages_by_sequence(loss_mode, verl.__version__)
        and actor.loss_agg_mode != SEQ_MEAN_TOKEN_MEAN
    ):
        raise EntropyForkError(
            f"verl {verl.__version__} takes the mean of loss_mode={loss_mode} as seq-mean-token-mean whatever "
            f"actor.loss_agg_mode={actor.loss_agg_mode} says, and the weights would be made for another mean. Write "
            f"actor_rollout_ref.actor.loss_agg_mode={SEQ_MEAN_TOKEN_MEAN}, which changes nothing else."
        )
    if actor.loss_agg_mode not in LOSS_AGG_MODES:
        raise EntropyForkError(f"actor.loss_agg_mode={actor.loss_agg_mode} is not known to entropy_fork.")
    if masked.in_worker(actor.shuffle) and actor.strategy not in MASKED_STRATEGIES:
        raise EntropyForkError(
            f"entropy=current, pool=micro_batch and actor.shuffle=True select in the worker, which works in verl's "
            f"engines {', '.join(MASKED_STRATEGIES)}, and actor.strategy={actor.strategy}. Write {NODE}.entropy=old "
            f"{NODE}.pool=mini_batch actor_rollout_ref.actor.shuffle=False (the preset "
            f"{NODE}=global says so), which works in every engine."
        )
    if OmegaConf.select(config, "distillation.enabled", default=False):
        raise EntropyForkError(
            "distillation.enabled=True replaces the policy loss by one that is not masked. Switch one of the two off."
        )


def check_dumpable(config: DictConfig) -> None:
    """Refuse a dump of tokens where there would be none: in an all-token baseline, which is not checked for a mask.

    Raises:
        EntropyForkError: a trainer or an option with which nothing would be dumped.
    """
    node = read_node(config)
    if node is None or node.dump_every == 0:
        return
    wanted = f"{NODE}.dump_every={node.dump_every} writes"
    if not config.trainer.use_v1:
        raise EntropyForkError(f"{wanted} in verl's V1 trainers. Write trainer.use_v1=True, or {NODE}.dump_every=0.")
    if OmegaConf.select(config, "algorithm.rollout_correction.bypass_mode", default=False):
        raise EntropyForkError(
            f"{wanted} entropies of verl's log-prob pass, which algorithm.rollout_correction.bypass_mode=True skips. "
            f"Write bypass_mode=False, or {NODE}.dump_every=0."
        )
