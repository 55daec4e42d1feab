"""The schemas of our two nodes: their keys, the defaults, and the sentence of each key.

The keys of the rule have their words and defaults in ``entropy_fork/core/rule.py``; the others have them here.
:func:`keys` gives all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from entropy_fork.common.asked_for import GUARDS, NODE
from entropy_fork.core.rule import KEY_OF, TOKEN_MEAN, Key, Rule, Selector, has_effect
from entropy_fork.core.schedule import rule_at
from entropy_fork.verl.config.names import (
    ALL_TOKENS,
    ANSWERS_PER_STEP,
    MASKED_STRATEGIES,
    RULE_KEYS,
    TOKENWISE_LOSSES,
    TrainedOn,
    plain_name,
)


def _of_rule(name: str) -> Any:
    """A key whose words and default stand in ``core/rule.py``."""
    return field(default=KEY_OF[name].default)


def _own(default: object, sentence: str) -> Any:
    """A key that only this node has."""
    return field(default=default, metadata={"sentence": sentence})


@dataclass
class EntropyForkConfig:
    """The node ``entropy_fork``: which tokens are trained on, by the entropy of their position.

    The meaning of each key: :func:`keys`. See also docs/reference/semantics.md.
    """

    enabled: bool = _own(True, "Whether there is a mask. `false` is stock verl: the preset `off`.")
    top_ratio: float = _of_rule("top_ratio")
    select: str = _of_rule("select")
    band_from: float = _of_rule("band_from")
    entropy: str = _of_rule("entropy")
    pool: str = _of_rule("pool")
    ties: str = _of_rule("ties")
    denominator: str = _of_rule("denominator")
    weight: str = _of_rule("weight")
    schedule: str = _of_rule("schedule")
    final_ratio: float = _of_rule("final_ratio")
    schedule_steps: int = _of_rule("schedule_steps")
    seed: int = _of_rule("seed")
    sparse_head: bool = _own(
        True,
        "Compute the LM head at response positions only. In the update, where nothing else needs the others, compute "
        "it at kept positions only: the update is the same but for the last bits, and verl's `pg_clipfrac` and "
        "`ppo_kl` are means over the kept tokens. `false` computes every position, as verl does.",
    )
    dump_every: int = _own(
        0,
        "Every how many steps to write tokens, their entropies and what was selected, for `entropy-fork report`. 0 "
        "writes nothing. Works with `enabled=false` too.",
    )
    dump_answers: int = _own(8, "Of how many answers to write the tokens.")
    dump_dir: str | None = _own(None, "The folder of these tokens. By default `tokens` in `trainer.default_local_dir`.")
    resume_other_selection: bool = _own(
        False,
        "Resume from a checkpoint that was trained on other tokens than this run would train on. `false` refuses it. "
        "Works with `enabled=false` too.",
    )
    short_output: bool = _own(
        True,
        "Show one line per step on the launcher's terminal, and write everything that verl prints to `verl.log` in "
        "`trainer.default_local_dir`. `false` leaves the terminal to verl. Works with `enabled=false` too.",
    )

    def rule(self, loss_agg_mode: str) -> Rule:
        """The rule of the whole run, its schedule included.

        Args:
            loss_agg_mode: verl's ``actor.loss_agg_mode``.

        Raises:
            ValueError: a value that has no meaning, or two that do not go together.
        """
        return Rule.of(**{name: getattr(self, name) for name in RULE_KEYS}, loss_agg_mode=loss_agg_mode)

    def rule_at(self, step: int, loss_agg_mode: str) -> Rule:
        """The rule of one training step (from 1). Arguments and errors as in :meth:`rule`."""
        return rule_at(self.rule(loss_agg_mode), step)

    def selector_at(self, step: int) -> Selector:
        """What is kept of a pool at a training step (from 1). Errors as in :meth:`rule`."""
        return self.rule_at(step, TOKEN_MEAN).selector

    def selection(self) -> TrainedOn:
        """What the run trains on, resolved. Two runs with equal selections train on the same kind of tokens.

        A key that the others make meaningless has its default value.
        """
        if not self.enabled or self.rule(TOKEN_MEAN).keeps_all:
            return ALL_TOKENS
        values = {name: getattr(self, name) for name in RULE_KEYS}
        return {name: value if has_effect(name, values) else KEY_OF[name].default for name, value in values.items()}

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
        self.rule(TOKEN_MEAN)
        if self.dump_every < 0:
            raise ValueError(f"dump_every must be a number of steps, or 0 to dump nothing, got {self.dump_every}")
        if not 0 < self.dump_answers < ANSWERS_PER_STEP:
            raise ValueError(f"dump_answers must be in [1, {ANSWERS_PER_STEP}), got {self.dump_answers}")


@dataclass
class GuardsConfig:
    """The node ``entropy_fork_guards``: what looks after a long run, with a mask or without.

    The meaning of each key: :func:`keys`. See also docs/guide/faults.md.
    """

    waiting: bool = _own(
        True, "Stop a run that waits for answers which cannot come any more, because a worker or a server has died."
    )
    patience_s: float = _own(
        3600.0,
        "After how many seconds without any answer `waiting` stops the run. 0 waits for ever, as verl does.",
    )
    checkpoints: bool = _own(
        True, "Mark a checkpoint as unfinished while it is written, and resume from whole ones only."
    )
    data_files: bool = _own(
        True, "Look through every row of the data files before Ray starts, where verl's own data set reads them."
    )

    def check(self) -> None:
        """Raise a ValueError for a value without a meaning."""
        if not self.patience_s >= 0:
            raise ValueError(f"patience_s must be a number of seconds, or 0 to wait for ever, got {self.patience_s}")


def keys(schema: type[EntropyForkConfig] | type[GuardsConfig] = EntropyForkConfig) -> tuple[Key, ...]:
    """Every key of a node with its sentence, in the order of the config.

    Args:
        schema: the node's.
    """
    return tuple(
        KEY_OF[key.name] if key.name in RULE_KEYS else Key(key.name, key.metadata["sentence"], key.default)
        for key in fields(schema)
    )


def register_schema() -> None:
    """Let the presets name the schema in their defaults, so that Hydra itself refuses a mistyped key or type."""
    for group, schema in ((NODE, EntropyForkConfig), (GUARDS, GuardsConfig)):
        ConfigStore.instance().store(group=group, name="schema", node=schema, provider="entropy-fork")
