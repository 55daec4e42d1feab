"""The config nodes ``entropy_fork`` and ``entropy_fork_guards``: their schemas, and the checks before Ray starts.

Hook: verl's ``main_ppo`` calls ``verl.utils.config.validate_config`` before it starts Ray. There is no registry for
further checks, so :func:`check_before_training` is run right after it (see ``plugin.py``). What each check is asked for
by stands in ``entropy_fork/common/asked_for.py``: on a run that asks for nothing of ours none of them says a word.

It also makes the nodes typed whatever they were written in. Typed, they can only be unpickled by a process that has
this plugin: a TaskRunner without it stops with ``No module named 'entropy_fork'`` instead of training on all tokens.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import verl
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException
from packaging.version import Version

from entropy_fork.common.asked_for import GROUPS, GUARDS, came_as_a_plain_value, chosen, overrides
from entropy_fork.common.asked_for import NODE as NODE  # its place for the rest of entropy_fork.verl
from entropy_fork.common.errors import EntropyForkError, process_name
from entropy_fork.common.recipes import preset_names
from entropy_fork.core.responses import Rule
from entropy_fork.core.schedule import ratio_at
from entropy_fork.core.selection import Selector
from entropy_fork.core.weighting import LOSS_AGG_MODES, SEQ_MEAN_TOKEN_MEAN, TOKEN_MEAN
from entropy_fork.verl.guards.data_files import check_data_files, reads_with_verl
from entropy_fork.verl.guards.resume import ALL_TOKENS, Selection, check_same_selection

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

#: keys of the node that change nothing of what is trained on
NOT_SELECTING = (
    "enabled",
    "sparse_head",
    "dump_every",
    "dump_answers",
    "dump_dir",
    "resume_other_selection",
    "short_output",
)

#: ids of dumped answers: the step times this, plus the answer's number in its step
ANSWERS_PER_STEP = 100_000


def averages_by_sequence(loss_mode: str, version: str) -> bool:
    """Whether this verl's loss is a seq-mean-token-mean whatever ``actor.loss_agg_mode`` says (core_algos.py)."""
    return loss_mode == "sapo" or (loss_mode == "gspo" and Version(version) < Version("0.9.1"))


def guarded_name(loss_mode: str) -> str:
    """The name of a loss with its guard (``policy_loss.py``). A name that has the guard is returned as it is."""
    return f"{NODE}/{plain_name(loss_mode)}"


def guard_loss(config: DictConfig) -> None:
    """Ask for the guarded loss: a worker then trains on token weights, or stops. A second call changes nothing.

    Args:
        config: the root of a config that asks for a mask.
    """
    actor = config.actor_rollout_ref.actor
    loss_mode = guarded_name(OmegaConf.select(actor, "policy_loss.loss_mode", default="vanilla"))
    with _changeable(actor):
        OmegaConf.update(actor, "policy_loss.loss_mode", loss_mode, force_add=True)


def is_guarded(config: DictConfig) -> bool:
    """Whether a root config may leave its process: our nodes are typed, and a mask asks for the guarded loss."""
    if not (_has_type(config, NODE, EntropyForkConfig) and _has_type(config, GUARDS, GuardsConfig)):
        return False
    if (node := _node(config, NODE)) is None or not node.enabled:
        return True
    loss_mode = OmegaConf.select(config, "actor_rollout_ref.actor.policy_loss.loss_mode", default="")
    return str(loss_mode).startswith(f"{NODE}/")


def _changeable(config: DictConfig) -> AbstractContextManager[Any]:
    """Let a config be changed that takes no new keys, or that its owner has made read-only."""
    return flag_override(config, ["struct", "readonly"], [False, False])


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
            the last bits; verl's ``pg_clipfrac`` and ``ppo_kl`` are then means over the kept tokens.
        dump_every: write the tokens of ``dump_answers`` answers of every so many steps, their entropies and what was
            selected, into ``dump_dir`` (by default ``tokens`` in ``trainer.default_local_dir``), for ``entropy-fork
            report``; 0 writes nothing. With ``enabled=False`` as well.
        resume_other_selection: go on from a checkpoint that was trained on other tokens than this run would. False
            refuses it. With ``enabled=False`` as well.
        short_output: show one line per step on the launcher's terminal, and write everything that verl prints to
            ``output.log`` in ``trainer.default_local_dir``. False leaves the terminal to verl. With ``enabled=False``
            as well.
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
    resume_other_selection: bool = False
    short_output: bool = True

    def selection(self) -> Selection:
        """What the run trains on, resolved. Two runs with equal selections train on the same kind of tokens.

        A key that the others make meaningless has its default value.
        """
        keeps_all = (self.top_ratio, self.schedule, self.weight) == (1.0, "constant", "hard") and self.select != "band"
        if not self.enabled or keeps_all:
            return ALL_TOKENS
        meaningless = {
            "band_from": self.select != "band",
            "seed": self.select != "random",
            "final_ratio": self.schedule == "constant",
            "schedule_steps": self.schedule == "constant",
        }
        return {
            field.name: field.default if meaningless.get(field.name) else getattr(self, field.name)
            for field in fields(self)
            if field.name not in NOT_SELECTING
        }

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

    def dense_because(self, config: DictConfig, kept_share: float) -> str | None:
        """Why the LM head of an update is needed at every position; None where the kept ones are enough.

        The one place that decides it, for the trainer and for ``entropy-fork plan``. A worker adds only what it alone
        can see: the model and the batch (``sparse_head.py``).

        Args:
            config: the root.
            kept_share: of the tokens of a pool, in (0, 1].
        """
        actor = config.actor_rollout_ref.actor
        loss_mode = plain_name(OmegaConf.select(actor, "policy_loss.loss_mode", default="vanilla"))
        for reason, holds in {
            "nothing is dropped": kept_share == 1,
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


@dataclass
class GuardsConfig:
    """What looks after a long run, with a mask or without. See docs/faults.md.

    Attributes:
        waiting: stop a run that waits for answers which cannot come any more, because a worker or a server has died.
        patience_s: for how many seconds no answer may come before ``waiting`` stops the run; 0 waits for ever, as verl
            does.
        checkpoints: mark a checkpoint as unfinished while it is written, and resume from whole ones only.
        data_files: look through every row of the data files before Ray starts, where verl's own data set reads them.
    """

    waiting: bool = True
    patience_s: float = 3600.0
    checkpoints: bool = True
    data_files: bool = True

    def check(self) -> None:
        """Raise a ValueError for a value without a meaning."""
        if not self.patience_s >= 0:
            raise ValueError(f"patience_s must be a number of seconds, or 0 to wait for ever, got {self.patience_s}")


def register_schema() -> None:
    """Let the presets name the schema in their defaults, so that Hydra itself refuses a mistyped key or type."""
    for group, schema in ((NODE, EntropyForkConfig), (GUARDS, GuardsConfig)):
        ConfigStore.instance().store(group=group, name="schema", node=schema, provider="entropy-fork")


#: keys of a node that have another place now
MOVED = {f"{NODE}.patience_s": f"{GUARDS}.patience_s"}


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
        if field.name not in (*NOT_SELECTING, "select", "top_ratio") and value != field.default:
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
    check_places(config)
    return _parsed(config, NODE, EntropyForkConfig, f"{NODE}=off trains without the mask")


def read_guards(config: DictConfig) -> GuardsConfig:
    """The guards of a run; where the node is absent, none of them.

    Raises:
        EntropyForkError: the node is not a mapping, or has an unknown key or a value out of range.
    """
    guards = _parsed(config, GUARDS, GuardsConfig, f"{GUARDS}=off switches all of them off")
    return guards or GuardsConfig(waiting=False, checkpoints=False, data_files=False)


Schema = TypeVar("Schema", EntropyForkConfig, GuardsConfig)


def _parsed(config: DictConfig, name: str, schema: type[Schema], way_out: str) -> Schema | None:
    node = _node(config, name)
    if node is None:
        return None
    if not isinstance(node, DictConfig):
        raise EntropyForkError(
            f"'{name}: {node}' arrived as a plain value, not as a preset, so it would do nothing: the presets were "
            f"not on Hydra's search path. Check that the plugin is active in this process ({process_name()}): "
            f"'python -c \"import verl, entropy_fork.verl.plugin\"' must run without an error."
        )
    for key in MOVED:
        if key.removeprefix(f"{name}.") in node:
            raise EntropyForkError(moved(key))
    try:
        # Unstructured first: merging two structured configs of one type would skip the check of the keys.
        typed = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(node, resolve=True))
        parsed: Schema = OmegaConf.to_object(typed)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        known = ", ".join(f"{f.name} ({f.type})" for f in fields(schema))
        raise EntropyForkError(
            f"bad config node '{name}': {str(error).splitlines()[0]}. Known keys: {known}."
        ) from None
    try:
        parsed.check()
    except ValueError as error:
        raise EntropyForkError(f"{name}: {error}; {way_out}") from None
    return parsed


def _node(config: Any, name: str) -> Any:
    """A node at the root; None where it is absent, as it is from what is no config of OmegaConf's."""
    return OmegaConf.select(config, name, default=None) if OmegaConf.is_config(config) else None


def moved(key: str) -> str:
    """What to write instead of a key that has another place now."""
    group, _ = MOVED[key].split(".")
    return f"'{key}' is now '{MOVED[key]}'. Write +{group}=on {MOVED[key]}=… (with a recipe without +{group}=on)."


#: What ρ is called by us, the authors' release, TRL and ms-swift, and LightRFT.
SPELLINGS = ("top_ratio", "entropy_top_ratio", "top_entropy_quantile", "high_entropy_token_ratio")

#: verl's nodes in which such a key can only be meant for the mask. Elsewhere it may be a key of the user's own.
MEANT_FOR_A_MASK = (
    "actor_rollout_ref.actor",
    "actor_rollout_ref.actor.policy_loss",
    "actor_rollout_ref.model",
    "algorithm",
)


def check_places(config: DictConfig) -> None:
    """Refuse what asks for a mask or guards in a place where it does nothing: verl ignores keys that it does not know.

    Raises:
        EntropyForkError: with the key, and what to write at the root instead.
    """
    if not OmegaConf.is_config(config):
        return
    for path, value in _misplaced(OmegaConf.to_container(config, resolve=False)):
        if path.rsplit(".")[-1] == GUARDS:
            raise EntropyForkError(f"'{path}' does nothing: '{GUARDS}' is read at the root of the config.")
        ratio = value if isinstance(value, float) else "…"
        raise EntropyForkError(
            f"'{path}' does nothing: '{NODE}' is read at the root of the config. Write +{NODE}=global or "
            f"+{NODE}.top_ratio={ratio} on the command line."
        )


def _misplaced(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Our nodes, a whole preset of ours, or a name of ρ, where they are not read."""
    if not isinstance(node, dict):
        return
    if path and {field.name for field in fields(EntropyForkConfig)} <= node.keys():  # +entropy_fork@trainer=global
        yield f"{path}.top_ratio", node["top_ratio"]
    for key, child in node.items():
        below = f"{path}.{key}" if path else str(key)
        if (path and key in (NODE, GUARDS)) or (path in MEANT_FOR_A_MASK and key in SPELLINGS and child is not None):
            yield below, child
        if path or key not in (NODE, GUARDS):
            yield from _misplaced(child, below)


def check_before_training(config: DictConfig) -> None:
    """Refuse what cannot be done as it was asked for, before Ray starts. Called with main_ppo's whole config.

    Raises:
        EntropyForkError: with what is wrong and what to write instead.
    """
    check_groups(config)
    masked = read_config(config)
    check_estimator(config)
    check_on_policy(config)
    make_typed(config)
    check_resumable(config)
    if read_guards(config).data_files:
        check_data_files(config)
    if masked is not None:
        check_maskable(config, masked)
    check_dumpable(config)
    global _checked
    _checked = weakref.ref(config)


_checked: weakref.ref[DictConfig] | None = None


def was_checked(config: DictConfig) -> bool:
    """Whether this config was the last to pass :func:`check_before_training`. Hydra's presets are typed before that."""
    return _checked is not None and _checked() is config


def check_resumable(config: DictConfig) -> str | None:
    """Refuse to go on from a checkpoint of another selection, in a run whose config has the node.

    Returns:
        A line for the log where the checkpoint does not say what it was trained on.

    Raises:
        EntropyForkError: with both selections and the ways out.
    """
    node = read_node(config)
    if node is None or node.resume_other_selection:
        return None
    return check_same_selection(config.trainer, node.selection(), _DEFAULTS)


_DEFAULTS = {key: value for key, value in asdict(EntropyForkConfig()).items() if key not in NOT_SELECTING}


def check_groups(config: DictConfig) -> None:
    """Refuse a recipe, a cluster or a template that was asked for and did not arrive.

    Raises:
        EntropyForkError: with what is wrong and what to write instead.
    """
    for group in GROUPS:
        value = OmegaConf.select(config, group, default=None)
        if came_as_a_plain_value(group, value):
            raise EntropyForkError(
                f"'{group}: {value}' arrived as a plain key, so the {group} was not applied and verl's defaults would "
                f"be trained. Check the name ({group}s of this install: {', '.join(preset_names(group))})."
            )


#: keys that a recipe leaves open (null: '???' over a value of verl's keeps that value), and what to write for them
OPEN_KEYS = {
    "data.train_files": "data.train_files=FILE.parquet (made by 'entropy-fork data prepare')",
    "data.val_files": "data.val_files=FILE.parquet (made by 'entropy-fork data prepare')",
    "actor_rollout_ref.model.path": "actor_rollout_ref.model.path=MODEL (which: see the top of the recipe's file)",
    "actor_rollout_ref.rollout.name": "+cluster=NAME, the machines that it runs on: {clusters}",
}


def check_complete(config: DictConfig) -> None:
    """Refuse a recipe's run that lacks a key. Runs before verl's own checks, whose message would mislead.

    Raises:
        EntropyForkError: with groups in an order in which the recipe would undo the cluster, or with the keys that are
            missing and what to write for each.
    """
    words = [word.lstrip("+").partition("=") for word in overrides() or []]
    ours = [group for group, _, name in words if group in ("recipe", "cluster") and name in preset_names(group)]
    if ours == ["cluster", "recipe"]:
        raise EntropyForkError(
            "+cluster=… stands before +recipe=…, and Hydra applies them in their order, so the recipe would undo what "
            "the cluster says. Write +recipe=… +cluster=…"
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


def make_typed(config: DictConfig) -> None:
    """Give our nodes of a root config their types, so that a process without this plugin cannot unpickle them.

    Raises:
        EntropyForkError: see :func:`read_node`.
    """
    read_node(config)
    read_guards(config)
    for name, schema in ((NODE, EntropyForkConfig), (GUARDS, GuardsConfig)):
        if not _has_type(config, name, schema):
            node = OmegaConf.to_container(config[name], resolve=True)
            with _changeable(config):
                config[name] = OmegaConf.merge(OmegaConf.structured(schema), node)


def _has_type(config: DictConfig, name: str, schema: type) -> bool:
    node = _node(config, name)
    return node is None or (isinstance(node, DictConfig) and OmegaConf.get_type(node) is schema)


def _is_ours(registry: str, name: str, ours: tuple[str, ...]) -> bool:
    """Whether a name of ours means ours: a module of the user's may have registered its own under it."""
    if name not in ours:
        return False
    core_algos = sys.modules.get("verl.trainer.ppo.core_algos")
    registered = getattr(core_algos, registry, {}).get(name)
    return registered is None or registered.__module__.startswith("entropy_fork.")


def check_estimator(config: DictConfig) -> None:
    """Refuse one of our advantage estimators where what it is computed from will not be there.

    Raises:
        EntropyForkError: no critic, a group of one answer, or verl's legacy trainer.
    """
    name = config.algorithm.adv_estimator
    if not _is_ours("ADV_ESTIMATOR_REGISTRY", name, ESTIMATORS):
        return
    if name in NEED_CRITIC and not config.critic.enable:
        raise EntropyForkError(
            f"algorithm.adv_estimator={name} is computed from a critic's values, and verl starts a critic unasked for "
            f"gae alone. Write critic.enable=True (and critic.model.path=…), or an estimator that needs none: "
            f"{', '.join(name for name in ESTIMATORS if name not in NEED_CRITIC)}."
        )
    if not config.trainer.use_v1:
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
    loss_mode = OmegaConf.select(actor, "policy_loss.loss_mode", default="vanilla")
    if not _is_ours("POLICY_LOSS_REGISTRY", loss_mode, ("reinforce",)):
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
