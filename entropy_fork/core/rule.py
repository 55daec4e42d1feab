"""What "train on the top 20%" means: every key of the rule, every value of each key, and which values go together.

This is the one place for the words. :data:`KEYS` has a sentence for each key and for each value. The trainer's log,
``entropy-fork plan``, ``entropy-fork doctor`` and the reference page take their words from it. :class:`Selector` and
:class:`Rule` refuse values that have no meaning and values that do not go together. Nothing is computed here: a new
value of ``select`` also needs its score in ``selection.py``.

Each sentence of a value starts with a verb whose subject is the run ("Keeps the tokens with the highest entropy.").
:meth:`Rule.describe` uses the part before the first colon. Where a sentence names a number's key in backticks,
``describe`` writes the number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Key:
    """A key of the config, in words.

    Attributes:
        name: of the key.
        sentence: what the key decides.
        default: its value if the config does not set it.
        values: the sentence of each value; empty for a number, a path or a switch.
    """

    name: str
    sentence: str
    default: object
    values: Mapping[str, str] = field(default_factory=dict)


#: verl's aggregations that divide by a number of tokens, and those that only sum over them
TOKEN_MEAN = "token-mean"
SEQ_MEAN_TOKEN_MEAN = "seq-mean-token-mean"
TOKEN_SUMS = ("token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm")

#: the keys of the rule, in the order of the config; the last one is verl's
KEYS: tuple[Key, ...] = (
    Key(
        "top_ratio",
        "The share ρ of the tokens of a pool to keep, in (0, 1]. 1.0 is verl's own update, bit for bit.",
        0.2,
    ),
    Key(
        "select",
        "Which tokens of a pool to keep.",
        "top",
        {
            "top": "Keeps the tokens with the highest entropy.",
            "bottom": "Keeps the tokens with the lowest entropy.",
            "random": "Keeps tokens drawn at random from the seed `seed`: whatever their entropy, anew at each step.",
            "band": "Keeps the tokens between the top `band_from` and the top `top_ratio` by entropy: at least one.",
        },
    ),
    Key("band_from", "The upper end of the band of `select=band`, in (0, `top_ratio`).", 0.0),
    Key(
        "entropy",
        "Whose entropy to look at.",
        "old",
        {
            "old": "Measures entropy under the old policy: verl's log-prob pass computes it, so it costs nothing.",
            "current": "Measures entropy under the current policy: at each gradient step, as in the paper's Eq. 1.",
        },
    ),
    Key(
        "pool",
        "The tokens of which the share is kept.",
        "mini_batch",
        {
            "response": "Selects in each response by itself.",
            "micro_batch": "Selects in each micro-batch of each rank: depends on packing and on the number of ranks.",
            "mini_batch": "Selects in each mini-batch over all ranks.",
            "batch": "Selects in the whole batch over all ranks.",
        },
    ),
    Key(
        "ties",
        "What to do with equal entropies at the threshold τ, the last entropy that is kept.",
        "exact",
        {
            "exact": "Keeps exactly that share, rounded up to whole tokens: ⌈ρN⌉ of N, and of equal ones the first in "
            "their responses.",
            "threshold": "Keeps every token at the threshold τ or beyond: with equal entropies more than ⌈ρN⌉ of N.",
        },
    ),
    Key(
        "denominator",
        "The number of tokens that divides the loss.",
        "kept",
        {
            "kept": "Divides the loss by the number of kept tokens: as in the paper's version 2 and the authors' code.",
            "all": "Divides the loss by the number of all response tokens: with ρ = 0.2 it is five times smaller.",
        },
    ),
    Key(
        "weight",
        "How much a kept token counts.",
        "hard",
        {
            "hard": "Weighs every kept token the same.",
            "soft": "Weighs a kept token in proportion to its entropy: the mean weight is 1.",
        },
    ),
    Key(
        "schedule",
        "How ρ changes over the training steps.",
        "constant",
        {
            "constant": "Keeps the share of the first step in every step.",
            "linear": "Moves ρ along a line from `top_ratio` at step 1 to `final_ratio` at step `schedule_steps`.",
            "cosine": "Moves ρ along half a cosine from `top_ratio` at step 1 to `final_ratio` at step "
            "`schedule_steps`: slowly at both ends.",
        },
    ),
    Key("final_ratio", "The share ρ at step `schedule_steps` and after, in (0, 1].", 1.0),
    Key("schedule_steps", "The step at which ρ reaches `final_ratio`, at least 2. A constant ρ needs none.", 0),
    Key("seed", "The seed of the draws of `select=random`.", 0),
    Key(
        "loss_agg_mode",
        "How verl makes one loss of the losses of all tokens. The key is verl's: `actor.loss_agg_mode`.",
        TOKEN_MEAN,
        {
            TOKEN_MEAN: "Averages the loss over the tokens of a mini-batch.",
            SEQ_MEAN_TOKEN_MEAN: "Averages the loss over the tokens of each response first: then over the responses.",
            "token-sum": "Sums the loss over the tokens of a mini-batch: `denominator` has no effect.",
            "seq-mean-token-sum": "Sums the loss over the tokens of each response: then averages over the responses. "
            "`denominator` has no effect.",
            "seq-mean-token-sum-norm": "Sums the loss over the tokens of each response and divides by a fixed length: "
            "then averages over the responses. `denominator` has no effect.",
        },
    ),
)

KEY_OF = {key.name: key for key in KEYS}

SELECTS = tuple(KEY_OF["select"].values)
ENTROPIES = tuple(KEY_OF["entropy"].values)
#: from the smallest to the largest
POOLS = tuple(KEY_OF["pool"].values)
TIES = tuple(KEY_OF["ties"].values)
DENOMINATORS = tuple(KEY_OF["denominator"].values)
WEIGHTS = tuple(KEY_OF["weight"].values)
SCHEDULES = tuple(KEY_OF["schedule"].values)
LOSS_AGG_MODES = tuple(KEY_OF["loss_agg_mode"].values)

#: values of ``select`` that do not use entropy: there is no τ, and the key ``entropy`` makes no difference
BLIND = ("random",)

#: keys that have an effect only with some values of another key: {key: (the other key, those values)}
ONLY_WITH = {
    "band_from": ("select", ("band",)),
    "seed": ("select", ("random",)),
    "denominator": ("loss_agg_mode", (TOKEN_MEAN, SEQ_MEAN_TOKEN_MEAN)),
    "final_ratio": ("schedule", ("linear", "cosine")),
    "schedule_steps": ("schedule", ("linear", "cosine")),
}


def has_effect(name: str, values: Mapping[str, Any]) -> bool:
    """Whether a key changes what is trained on, given the values of the other keys.

    Args:
        name: the name of the key.
        values: the values of other keys, as far as known. If the key that decides is missing, the answer is True.
    """
    other, with_values = ONLY_WITH.get(name, ("", ()))
    return other not in values or values[other] in with_values


def check_ratio(top_ratio: float) -> None:
    """Raise a ValueError for a ρ outside (0, 1]."""
    if not 0.0 < top_ratio <= 1.0:
        raise ValueError(f"top_ratio must be in (0, 1], got {top_ratio!r}; 0.2 keeps the top 20%, 1.0 keeps everything")


def check_value(name: str, value: object) -> None:
    """Raise a ValueError for a value that a key does not have.

    Args:
        name: the name of a key with a list of values.
        value: the value to check.
    """
    if value not in KEY_OF[name].values:
        raise ValueError(f"{name} must be one of {', '.join(KEY_OF[name].values)}, got {value!r}")


def check_schedule(schedule: str, schedule_steps: int) -> None:
    """Raise a ValueError for an unknown schedule, or for one that changes ρ but has no step at which it ends."""
    check_value("schedule", schedule)
    if schedule != "constant" and schedule_steps < 2:
        raise ValueError(f"schedule={schedule} needs schedule_steps, the step at which final_ratio is reached (≥ 2)")


@dataclass(frozen=True)
class Selector:
    """What to keep of a pool. The keys and their values are those of :data:`KEYS`.

    Attributes:
        top_ratio: ρ in (0, 1], the share to keep.
        select: which tokens, one of :data:`SELECTS`.
        ties: what to do with equal entropies, one of :data:`TIES`.
        band_from: for ``select=band``, the upper end in (0, ρ): 0.1 with ρ = 0.2 keeps the tokens between the top 10%
            and the top 20%. Otherwise 0. See :func:`entropy_fork.core.selection.ranks_kept`.

    Raises:
        ValueError: a value is unknown, or two values do not go together. The message says what to write instead.
    """

    top_ratio: float
    select: str = "top"
    ties: str = "exact"
    band_from: float = 0.0

    def __post_init__(self) -> None:
        check_ratio(self.top_ratio)
        for name in ("select", "ties"):
            check_value(name, getattr(self, name))
        if self.select == "band" and not 0.0 < self.band_from < self.top_ratio:
            raise ValueError(
                f"select=band keeps the tokens between the top band_from and the top top_ratio, so band_from must be "
                f"in (0, top_ratio), got band_from={self.band_from!r}, top_ratio={self.top_ratio!r}"
            )
        if self.select != "band" and self.band_from != 0.0:
            raise ValueError(f"band_from={self.band_from!r} needs select=band; write select=band, or band_from=0")
        if self.select in BLIND and self.ties == "threshold":
            raise ValueError(f"select={self.select} has no threshold on the entropy; write ties=exact")

    @property
    def kept_share(self) -> float:
        """The share of the tokens of a large pool that is kept, in (0, 1]."""
        return self.top_ratio - self.band_from


@dataclass(frozen=True)
class Rule:
    """The whole rule: which tokens are trained on, and with what weight. The keys and values are those of :data:`KEYS`.

    :func:`entropy_fork.core.schedule.rule_at` gives the rule of one training step, whose ρ is constant.

    Attributes:
        selector: what to keep of a pool.
        entropy: whose entropy, one of :data:`ENTROPIES`.
        pool: the tokens of which the share is kept, one of :data:`POOLS`.
        loss_agg_mode: verl's ``actor.loss_agg_mode``, one of :data:`LOSS_AGG_MODES`.
        denominator: the number of which tokens divides the loss, one of :data:`DENOMINATORS`.
        weight: how much a kept token counts, one of :data:`WEIGHTS`.
        schedule: how ρ changes over the training steps, one of :data:`SCHEDULES`.
        final_ratio: ρ at ``schedule_steps`` and after, in (0, 1]; a constant schedule ignores it.
        schedule_steps: at least 2, except with a constant schedule.
        seed: the seed of the draws of ``select=random``.

    Raises:
        ValueError: a value is unknown, or two values do not go together. The message says what to write instead.
    """

    selector: Selector
    entropy: str = "old"
    pool: str = "mini_batch"
    loss_agg_mode: str = TOKEN_MEAN
    denominator: str = "kept"
    weight: str = "hard"
    schedule: str = "constant"
    final_ratio: float = 1.0
    schedule_steps: int = 0
    seed: int = 0

    @classmethod
    def of(cls, **values: Any) -> Rule:
        """A rule from the keys as the config has them: ``Rule.of(top_ratio=0.1, select="bottom")``.

        Args:
            **values: a value for any of :data:`KEYS`; the other keys get their defaults.

        Raises:
            ValueError: as for the class, and for an unknown key.
        """
        if unknown := [name for name in values if name not in KEY_OF]:
            raise ValueError(f"there is no key {unknown[0]}; the keys are {', '.join(KEY_OF)}")
        known: dict[str, Any] = {key.name: key.default for key in KEYS} | values
        selector = Selector(**{name: known.pop(name) for name in ("top_ratio", "select", "ties", "band_from")})
        return cls(selector, **known)

    def __post_init__(self) -> None:
        for name in ("entropy", "pool", "loss_agg_mode", "denominator", "weight"):
            check_value(name, getattr(self, name))
        if self.entropy == "current" and self.pool == "batch":
            raise ValueError(
                "entropy=current has no pool=batch: the policy changes with each mini-batch of the batch. Write "
                "pool=mini_batch, or entropy=old"
            )
        if self.entropy == "current" and self.selector.select in BLIND:
            raise ValueError(
                f"select={self.selector.select} does not use entropy; write entropy=old, which costs nothing"
            )
        check_schedule(self.schedule, self.schedule_steps)
        if self.schedule != "constant":  # if both ends are possible, every ρ between them is
            Selector(self.final_ratio, self.selector.select, self.selector.ties, self.selector.band_from)

    @property
    def selected_in_loss(self) -> bool:
        """Whether the loss of a micro-batch selects its tokens, from the entropies of the update's own forward pass.

        That needs ``ties=exact`` and hard weights. A weight depends on how many tokens the whole mini-batch keeps, and
        only then the sizes of the other micro-batches say how many they keep.
        """
        exact = self.selector.ties == "exact" and self.weight == "hard"
        return self.entropy == "current" and self.pool == "micro_batch" and exact

    @property
    def keeps_all(self) -> bool:
        """Whether every response token has the weight 1, as in stock verl."""
        always_all = self.selector.top_ratio == 1.0 and self.schedule == "constant"
        return always_all and self.weight == "hard" and self.selector.select != "band"

    @property
    def values(self) -> dict[str, Any]:
        """The value of each of :data:`KEYS`."""
        return {name: getattr(self.selector if hasattr(self.selector, name) else self, name) for name in KEY_OF}

    def sentences(self) -> list[tuple[str, str]]:
        """What the rule does: one (``key=value``, sentence) for each key that has an effect and is worth saying."""
        values = self.values
        said = [(f"top_ratio={self.selector.top_ratio:g}", self._share())]
        if self.keeps_all:
            return said
        for key in KEYS:
            value = values[key.name]
            is_usual = key.name in ("schedule", "loss_agg_mode") and value == key.default
            is_unseen = key.name == "entropy" and self.selector.select in BLIND and self.weight == "hard"
            if key.values and has_effect(key.name, values) and not is_usual and not is_unseen:
                said.append((f"{key.name}={value}", _with_numbers(key.values[value], values)))
        return said

    def describe(self) -> str:
        """One sentence: which tokens are trained on, and how much each counts."""
        (_, share), *others = self.sentences()
        if not others:
            return share
        *clauses, last = [_clause(sentence) for _, sentence in others]
        return f"{share.partition(':')[0].rstrip('.')}: {', '.join(clauses)} and {last}."

    def _share(self) -> str:
        if self.keeps_all:
            return "Trains on all response tokens: the update is verl's own, bit for bit."
        when = "" if self.schedule == "constant" else " at step 1"
        if (share := self.selector.kept_share) == 1.0:
            return f"Trains on all response tokens{when}."
        return f"Trains on {_percent(share)} of the response tokens{when}: the other {_percent(1 - share)} weigh 0."


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def _with_numbers(sentence: str, values: Mapping[str, Any]) -> str:
    """The sentence with each number's key in backticks replaced by the number."""
    for key in KEYS:
        if not key.values:
            number = values[key.name]
            sentence = sentence.replace(
                f"`{key.name}`", _percent(number) if isinstance(key.default, float) else str(number)
            )
    return sentence


def _clause(sentence: str) -> str:
    """The part of a sentence before its first colon, as a clause that can follow others."""
    clause = sentence.partition(":")[0].rstrip(".")
    return clause[0].lower() + clause[1:]
