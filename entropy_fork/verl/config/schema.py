"""The schemas of our two nodes: each key with its default and its sentence.

For the keys of the rule, default and sentence are in ``entropy_fork/core/rule.py``. For the other keys they are here.
:func:`keys` returns all of them.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from entropy_fork.common.asked_for import GUARDS, NODE
from entropy_fork.core.rule import BLIND, KEY_OF, TOKEN_MEAN, Key, Rule, has_effect
from entropy_fork.core.schedule import rule_at
from entropy_fork.core.scores import check_score_name
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
    """A key whose sentence and default are in ``core/rule.py``."""
    return field(default=KEY_OF[name].default)


def _own(default: object, sentence: str) -> Any:
    """A key that is not one of the rule's."""
    return field(default=default, metadata={"sentence": sentence})


def default_of(key: Field[Any]) -> Any:
    """The default value of a key."""
    return key.default if key.default_factory is MISSING else key.default_factory()


@dataclass
class EntropyForkConfig:
    """The node ``entropy_fork``: which tokens are trained on, by the entropy of their position or another score.

    The meaning of each key: :func:`keys`. See also docs/reference/semantics.md.
    """

    enabled: bool = _own(True, "Whether there is a mask. `false` is stock verl: the preset `off`.")
    top_ratio: float = _of_rule("top_ratio")
    score: str = _of_rule("score")
    select: str = _of_rule("select")
    band_from: float = _of_rule("band_from")
    where: str = _of_rule("where")
    outside: str = _of_rule("outside")
    control: str = _of_rule("control")
    use: str = _of_rule("use")
    map: str = _of_rule("map")
    map_offset: float = _of_rule("map_offset")
    map_slope: float = _of_rule("map_slope")
    map_rate: float = _of_rule("map_rate")
    map_low: float = _of_rule("map_low")
    map_high: float = _of_rule("map_high")
    normalize: str = _of_rule("normalize")
    combine: str = _of_rule("combine")
    add_limit: float = _of_rule("add_limit")
    entropy: str = _of_rule("entropy")
    pool: str = _of_rule("pool")
    ties: str = _of_rule("ties")
    denominator: str = _of_rule("denominator")
    weight: str = _of_rule("weight")
    schedule: str = _of_rule("schedule")
    final_ratio: float = _of_rule("final_ratio")
    schedule_steps: int = _of_rule("schedule_steps")
    seed: int = _of_rule("seed")
    observe: list[str] = field(
        default_factory=list,
        metadata={
            "sentence": "Scores to measure beside the one that is trained on, `[surprisal,covariance]`: at each step, "
            "how much of what is kept they would keep too, and their rank correlation."
        },
    )
    sparse_head: bool = _own(
        True,
        "Compute the LM head at response positions only. In the update, where nothing else needs the others, compute "
        "it at kept positions only: the update is the same but for the last bits, and verl's `pg_clipfrac` and "
        "`ppo_kl` are means over the kept tokens. `false` computes every position, as verl does.",
    )
    dump_every: int = _own(
        0,
        "Write tokens, their entropies and the selection every so many steps, for `entropy-fork report`. 0 writes "
        "nothing. Works with `enabled=false` too.",
    )
    dump_answers: int = _own(8, "The number of answers to write per dumped step.")
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
        """The rule of the whole run, with its schedule.

        Args:
            loss_agg_mode: verl's ``actor.loss_agg_mode``.

        Raises:
            ValueError: a value is unknown, or two values do not go together.
        """
        return Rule.of(**{name: getattr(self, name) for name in RULE_KEYS}, loss_agg_mode=loss_agg_mode)

    def rule_at(self, step: int, loss_agg_mode: str) -> Rule:
        """The rule of one training step (from 1). Arguments and errors as in :meth:`rule`."""
        return rule_at(self.rule(loss_agg_mode), step)

    def selection(self) -> TrainedOn:
        """What the run trains on. Two runs with equal selections train on the same kind of tokens.

        A key that has no effect, because of the other keys, gets its default value.
        """
        if not self.enabled or self.rule(TOKEN_MEAN).keeps_all:
            return ALL_TOKENS
        values = {name: getattr(self, name) for name in RULE_KEYS}
        return {name: value if has_effect(name, values) else KEY_OF[name].default for name, value in values.items()}

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.select in BLIND or self.score == "random" or self.control == "matched_random"

    def in_worker(self, shuffle: bool) -> bool:
        """Whether only the worker can select the tokens, in a gradient step or right before it.

        Args:
            shuffle: verl's ``actor.shuffle``. If true, the worker draws the mini-batches.
        """
        if self.use in ("advantage", "clip"):
            return False
        return self.entropy == "current" or self.pool == "micro_batch" or shuffle

    def may_drop_at(self, step: int) -> bool:
        """Whether tokens can have the weight 0 at a step (from 1) because they are not kept."""
        return self.rule_at(step, TOKEN_MEAN).may_drop

    def dense_because(self, config: DictConfig, may_drop: bool) -> str | None:
        """Why an update must compute the LM head at every position; None if the kept positions are enough.

        Only this function decides it, for the trainer and for ``entropy-fork plan``. A worker may add a reason that
        only it can see: in the model, or in the batch (``sparse_head.py``).

        Args:
            config: the root of verl's config.
            may_drop: whether tokens can have the weight 0, see :meth:`may_drop_at`.
        """
        actor = config.actor_rollout_ref.actor
        loss_mode = plain_name(OmegaConf.select(actor, "policy_loss.loss_mode", default="vanilla"))
        for reason, holds in {
            "nothing is dropped": not may_drop,
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
        """Raise a ValueError for a value that is wrong in any step of a run."""
        self.rule(TOKEN_MEAN)
        for name in self.observe:
            try:
                check_score_name(name)
            except ValueError as error:
                raise ValueError(f"observe: {error}") from None
        if self.dump_every < 0:
            raise ValueError(f"dump_every must be a number of steps, or 0 to dump nothing, got {self.dump_every}")
        if not 0 < self.dump_answers < ANSWERS_PER_STEP:
            raise ValueError(f"dump_answers must be in [1, {ANSWERS_PER_STEP}), got {self.dump_answers}")


@dataclass
class GuardsConfig:
    """The node ``entropy_fork_guards``: checks that protect a long run, with a mask or without.

    The meaning of each key: :func:`keys`. See also docs/guide/faults.md.
    """

    waiting: bool = _own(
        True, "Stop a run if a worker or a server has died, so that the answers it waits for can never come."
    )
    patience_s: float = _own(
        3600.0,
        "The guard `waiting` stops the run after so many seconds without any answer. 0 waits for ever, as verl does.",
    )
    checkpoints: bool = _own(
        True, "Mark a checkpoint as unfinished while it is written, and resume from finished ones only."
    )
    data_files: bool = _own(
        True, "Check every row of the data files before Ray starts, if verl's own data set class reads them."
    )

    def check(self) -> None:
        """Raise a ValueError for a value out of range."""
        if not self.patience_s >= 0:
            raise ValueError(f"patience_s must be a number of seconds, or 0 to wait for ever, got {self.patience_s}")


def keys(schema: type[EntropyForkConfig] | type[GuardsConfig] = EntropyForkConfig) -> tuple[Key, ...]:
    """Every key of a node with its sentence, in the order of the config.

    Args:
        schema: the dataclass of the node.
    """
    return tuple(
        KEY_OF[key.name] if key.name in RULE_KEYS else Key(key.name, key.metadata["sentence"], default_of(key))
        for key in fields(schema)
    )


def register_schema() -> None:
    """Register both schemas with Hydra. A preset names its schema, so Hydra refuses a mistyped key or a wrong type."""
    for group, schema in ((NODE, EntropyForkConfig), (GUARDS, GuardsConfig)):
        ConfigStore.instance().store(group=group, name="schema", node=schema, provider="entropy-fork")
