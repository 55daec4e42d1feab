"""What "train on the top 20%" means: every key of the rule, every value of each key, and which values go together.

This is the one place for the words. :data:`KEYS` has a sentence for each key and for each value. The trainer's log,
``entropy-fork plan``, ``entropy-fork doctor`` and the reference page take their words from it. :class:`Selector` and
:class:`Rule` refuse values that have no meaning and values that do not go together. Nothing is computed here: a new
value of ``select`` also needs its ranks in ``selection.py``. The scores are in ``scores.py``.

Each sentence of a value starts with a verb whose subject is the run ("Keeps the tokens with the highest entropy.").
:meth:`Rule.describe` uses the part before the first colon. Where a sentence names a key in backticks that is a number
or a score, ``describe`` writes its value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from entropy_fork.core.scores import OF_POLICY, SCORES, check_score_name
from entropy_fork.core.user_function import is_import_path
from entropy_fork.core.where import check_where, where_of


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
        "score",
        f"What the tokens are ranked by: {', '.join(SCORES)}, or a function of yours, `package.module:function` "
        "([scores](scores.md)).",
        "entropy",
    ),
    Key(
        "select",
        "Which tokens of a pool to keep.",
        "top",
        {
            "top": "Keeps the tokens with the highest `score`.",
            "bottom": "Keeps the tokens with the lowest `score`.",
            "random": "Keeps tokens drawn at random from the seed `seed`: whatever their score, anew at each step.",
            "band": "Keeps the tokens between the top `band_from` and the top `top_ratio` by `score`: at least one.",
        },
    ),
    Key("band_from", "The upper end of the band of `select=band`, in (0, `top_ratio`).", 0.0),
    Key(
        "where",
        "Which tokens are in a pool at all: a condition on the fields of the scores, such as `advantage > 0`, or a "
        "function of yours ([scores](scores.md)). Empty: all response tokens.",
        "",
    ),
    Key(
        "outside",
        "With `use=mask` and `where`: what happens to the tokens that are in no pool.",
        "drop",
        {
            "drop": "Drops the tokens that are in no pool.",
            "keep": "Trains on the tokens that are in no pool as well: only tokens of a pool can be dropped.",
        },
    ),
    Key(
        "control",
        "Whether to move the kept tokens of each response to random places in it. If the run learns as well with it, "
        "only the number of tokens in each response mattered, not which.",
        "none",
        {
            "none": "Leaves the choice of tokens as it is.",
            "matched_random": "Shuffles the choice within each response, from the seed `seed`: as many tokens as the "
            "score would keep, at random places.",
        },
    ),
    Key(
        "use",
        "What is done with the kept tokens.",
        "mask",
        {
            "mask": "Trains on the kept tokens only: the others weigh 0.",
            "weight": "Weighs each kept token by the `map` of its score: the others weigh 1.",
            "advantage": "Changes the advantage of each kept token by the `map` of its score: the others keep verl's.",
            "clip": "Multiplies the clip range of each kept token by the `map` of its score: the others keep verl's.",
        },
    ),
    Key(
        "map",
        "How the score s of a token becomes a factor, for every `use` but `mask`.",
        "linear",
        {
            "linear": "Maps the `score` s to `map_offset` + `map_slope`·s.",
            "exponential": "Maps the `score` s to `map_offset` + `map_slope`·exp(`map_rate`·s).",
            "clipped": "Maps the `score` s to `map_offset` + `map_slope`·s, within `map_low` and `map_high`.",
            "range": "Maps the lowest kept `score` of a pool to `map_low`, the highest to `map_high`, "
            "and the others along a line.",
            "rank": "Maps the lowest kept `score` of a pool to `map_low`, the highest to `map_high`, "
            "and the others by their rank.",
            "dcpo": "Maps the surprisal to the clip range of DCPO: wider for unlikely tokens. Needs use=clip and "
            "score=surprisal.",
        },
    ),
    Key("map_offset", "What the map adds: in `linear` and `clipped` it is the factor of a score of 0.", 0.0),
    Key("map_slope", "What multiplies the score in `linear` and `clipped`, and the exponential in `exponential`.", 1.0),
    Key(
        "map_rate", "What multiplies the score in the exponent of `exponential`: below 0, high scores count less.", -1.0
    ),
    Key("map_low", "The lowest factor of `clipped`; in `range` and `rank` the factor of the lowest score.", 0.0),
    Key("map_high", "The highest factor of `clipped`; in `range` and `rank` the factor of the highest score.", 2.0),
    Key(
        "normalize",
        "With `use=weight`: whether the weights of the kept tokens average 1.",
        "pool",
        {
            "pool": "Divides the weights by their mean over the kept tokens of a pool.",
            "none": "Leaves the weights as the map gives them.",
        },
    ),
    Key(
        "combine",
        "With `use=advantage`: what the factor does.",
        "multiply",
        {
            "multiply": "Multiplies the advantage by the factor.",
            "add": "Adds the factor, at most |A|/`add_limit`, to the advantage.",
        },
    ),
    Key("add_limit", "The κ of `combine=add`: the factor is at most |A|/κ. 0 sets no limit.", 2.0),
    Key(
        "entropy",
        "Whose entropies and log-probabilities to look at.",
        "old",
        {
            "old": "Measures the tokens under the old policy: verl's log-prob pass does so anyway, at no cost.",
            "current": "Measures the tokens under the current policy: at each gradient step, as in the paper's Eq. 1.",
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
        "What to do with equal scores at the threshold τ, the last score that is kept.",
        "exact",
        {
            "exact": "Keeps exactly that share, rounded up to whole tokens: ⌈ρN⌉ of N, and of equal ones the first in "
            "their responses.",
            "threshold": "Keeps every token at the threshold τ or beyond: with equal scores more than ⌈ρN⌉ of N.",
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
            "soft": "Weighs a kept token in proportion to its score, if that is above 0: the mean weight is 1.",
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
    Key(
        "seed", "The seed of all draws: `select=random`, `score=random`, `control=matched_random`, the field `draw`.", 0
    ),
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
OUTSIDES = tuple(KEY_OF["outside"].values)
USES = tuple(KEY_OF["use"].values)
MAPS = tuple(KEY_OF["map"].values)
CONTROLS = tuple(KEY_OF["control"].values)
NORMALIZATIONS = tuple(KEY_OF["normalize"].values)
COMBINATIONS = tuple(KEY_OF["combine"].values)
LOSS_AGG_MODES = tuple(KEY_OF["loss_agg_mode"].values)

#: values of ``select`` that do not use the score: there is no τ
BLIND = ("random",)

#: values of ``use`` with which every token is trained on
SOFT_USES = ("weight", "advantage", "clip")

#: the numbers that are shares
SHARES = ("top_ratio", "band_from", "final_ratio")

#: keys that have an effect only with some values of other keys: {key: ways}. A way is {other key: its values}, all of
#: which must hold; one way is enough.
ONLY_WITH: Mapping[str, tuple[Mapping[str, tuple[str, ...]], ...]] = {
    "score": ({"select": ("top", "bottom", "band")}, {"weight": ("soft",)}, {"use": SOFT_USES}),
    "band_from": ({"select": ("band",)},),
    "outside": ({"use": ("mask",)},),
    "map": ({"use": SOFT_USES},),
    "map_offset": ({"use": SOFT_USES, "map": ("linear", "exponential", "clipped")},),
    "map_slope": ({"use": SOFT_USES, "map": ("linear", "exponential", "clipped")},),
    "map_rate": ({"use": SOFT_USES, "map": ("exponential",)},),
    "map_low": ({"use": SOFT_USES, "map": ("clipped", "range", "rank")},),
    "map_high": ({"use": SOFT_USES, "map": ("clipped", "range", "rank")},),
    "normalize": ({"use": ("weight",)},),
    "combine": ({"use": ("advantage",)},),
    "add_limit": ({"use": ("advantage",), "combine": ("add",)},),
    "denominator": ({"loss_agg_mode": (TOKEN_MEAN, SEQ_MEAN_TOKEN_MEAN), "use": ("mask",)},),
    "weight": ({"use": ("mask",)},),
    "seed": ({"select": ("random",)}, {"score": ("random",)}, {"control": ("matched_random",)}),
    "final_ratio": ({"schedule": ("linear", "cosine")},),
    "schedule_steps": ({"schedule": ("linear", "cosine")},),
}

#: keys that are not worth a word where they have their default value
USUAL = ("schedule", "loss_agg_mode", "control", "use")


def has_effect(name: str, values: Mapping[str, Any]) -> bool:
    """Whether a key changes what is trained on, given the values of the other keys.

    Args:
        name: the name of the key.
        values: the values of other keys, as far as known. If the key that decides is missing, the answer is True.
    """
    ways = ONLY_WITH.get(name, ({},))
    if name == "outside" and values.get("where") == "":
        return False
    if name == "seed" and (is_import_path(str(values.get("score", ""))) or values.get("where")):
        return True  # it may read the field ``draw``
    return any(all(other not in values or values[other] in known for other, known in way.items()) for way in ways)


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
            raise ValueError(f"select={self.select} has no threshold; write ties=exact")

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
        entropy: whose entropies and log-probabilities, one of :data:`ENTROPIES`.
        pool: the tokens of which the share is kept, one of :data:`POOLS`.
        loss_agg_mode: verl's ``actor.loss_agg_mode``, one of :data:`LOSS_AGG_MODES`.
        denominator: the number of which tokens divides the loss, one of :data:`DENOMINATORS`.
        weight: how much a kept token counts, one of :data:`WEIGHTS`.
        schedule: how ρ changes over the training steps, one of :data:`SCHEDULES`.
        final_ratio: ρ at ``schedule_steps`` and after, in (0, 1]; a constant schedule ignores it.
        schedule_steps: at least 2, except with a constant schedule.
        seed: the seed of the draws.
        score: what the tokens are ranked by, see :func:`entropy_fork.core.scores.score_of`.
        where: which tokens are in a pool at all, see :func:`entropy_fork.core.where.where_of`; empty for all.
        outside: what happens to the tokens that are in no pool, one of :data:`OUTSIDES`.
        control: whether the choice is shuffled within each response, one of :data:`CONTROLS`.
        use: what is done with the kept tokens, one of :data:`USES`.
        map, map_offset, map_slope, map_rate, map_low, map_high: how a score becomes a factor, see
            :func:`entropy_fork.core.factors.factors_of`.
        normalize: whether weights average 1 over a pool, one of :data:`NORMALIZATIONS`.
        combine: how the factor changes an advantage, one of :data:`COMBINATIONS`.
        add_limit: κ, at least 0: an added factor is at most |A|/κ; 0 sets no limit.

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
    score: str = "entropy"
    where: str = ""
    outside: str = "drop"
    control: str = "none"
    use: str = "mask"
    map: str = "linear"
    map_offset: float = 0.0
    map_slope: float = 1.0
    map_rate: float = -1.0
    map_low: float = 0.0
    map_high: float = 2.0
    normalize: str = "pool"
    combine: str = "multiply"
    add_limit: float = 2.0

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
        for key in KEYS:
            if key.values and key.name not in ("select", "ties", "schedule"):
                check_value(key.name, getattr(self, key.name))
        check_score_name(self.score)
        check_where(self.where)
        if self.entropy == "current":
            self._check_current()
        if self.control != "none" and self.selector.select in BLIND:
            raise ValueError(
                f"control={self.control} draws as many tokens as a score keeps, and select={self.selector.select} has "
                f"no score; write control=none, or another select"
            )
        if self.use != "mask":
            self._check_use()
        check_schedule(self.schedule, self.schedule_steps)
        if self.schedule != "constant":  # if both ends are possible, every ρ between them is
            Selector(self.final_ratio, self.selector.select, self.selector.ties, self.selector.band_from)

    def _check_current(self) -> None:
        if self.pool == "batch":
            raise ValueError(
                "entropy=current has no pool=batch: the policy changes with each mini-batch of the batch. Write "
                "pool=mini_batch, or entropy=old"
            )
        if self.selector.select in BLIND:
            raise ValueError(
                f"select={self.selector.select} does not use entropy; write entropy=old, which costs nothing"
            )
        if not self.looks_at_policy:
            raise ValueError(f"score={self.score} does not look at the policy; write entropy=old, which costs nothing")
        if self.score == "gradient_norm":
            raise ValueError("score=gradient_norm needs sum_pi_squared of the log-prob pass; write entropy=old")
        if self.use in ("advantage", "clip"):
            raise ValueError(
                f"use={self.use} is written into the batch before the update, where the current policy is not known; "
                f"write entropy=old"
            )

    def _check_use(self) -> None:
        if self.weight != "hard":
            raise ValueError(
                f"weight={self.weight} belongs to use=mask; with use={self.use} write weight=hard, and map=…"
            )
        if self.use != "weight" and self.pool == "micro_batch":
            raise ValueError(
                f"use={self.use} is written into the batch before verl cuts it into micro-batches; write "
                f"pool=mini_batch, batch or response"
            )
        for name in ("map_offset", "map_slope", "map_rate", "map_low", "map_high"):
            if has_effect(name, self.values) and not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)!r}")
        if self.map == "dcpo" and (self.use, self.score) != ("clip", "surprisal"):
            raise ValueError("map=dcpo is a clip range made of the surprisal; write use=clip score=surprisal")
        if self.map == "clipped" and self.map_low > self.map_high:
            raise ValueError(
                f"map_low must be at most map_high, got map_low={self.map_low!r}, map_high={self.map_high!r}"
            )
        lowest = min(self.map_low, self.map_high)
        adds = (self.use, self.combine) == ("advantage", "add")
        if lowest < 0 and has_effect("map_low", self.values) and not adds:
            raise ValueError(f"map_low and map_high must be at least 0, got {lowest!r}: it would turn the loss round")
        if not self.add_limit >= 0:
            raise ValueError(f"add_limit must be at least 0 (0 sets no limit), got {self.add_limit!r}")

    @property
    def looks_at_policy(self) -> bool:
        """Whether the score or the condition reads a field of the policy; a user's own function may."""
        known = SCORES.get(self.score)
        read = set(known.fields) if known else set(OF_POLICY)
        if self.where:
            read |= set(OF_POLICY) if is_import_path(self.where) else set(where_of(self.where).fields)
        return bool(read & set(OF_POLICY))

    @property
    def selected_in_loss(self) -> bool:
        """Whether the loss of a micro-batch selects its tokens, from the entropies of the update's own forward pass.

        That needs a mask with ``ties=exact``, hard weights, no condition, and a score that looks at one token at a
        time. A weight depends on how many tokens the whole mini-batch keeps, and only then the sizes of the other
        micro-batches say how many they keep.
        """
        exact = self.selector.ties == "exact" and self.weight == "hard" and self.use == "mask" and not self.where
        alone = self.score in SCORES and SCORES[self.score].elementwise
        return self.entropy == "current" and self.pool == "micro_batch" and exact and alone

    @property
    def keeps_all(self) -> bool:
        """Whether every response token has the weight 1, as in stock verl."""
        always_all = self.selector.top_ratio == 1.0 and self.schedule == "constant" and not self.where
        return always_all and self.use == "mask" and self.weight == "hard" and self.selector.select != "band"

    @property
    def needs_score(self) -> bool:
        """Whether a score must be computed."""
        return not self.keeps_all and has_effect("score", self.values)

    @property
    def may_drop(self) -> bool:
        """Whether this rule of one step can give a token the weight 0 because it is not kept."""
        return self.use == "mask" and (self.selector.kept_share < 1.0 or bool(self.where and self.outside == "drop"))

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
        unseen = [] if self.looks_at_policy and has_effect("score", values) else ["entropy"]
        if self.use != "mask" and self.selector.kept_share == 1.0:
            unseen += ["select", "ties"]
        for key in KEYS:
            value = values[key.name]
            if key.name == "score" and value != key.default and has_effect("score", values):
                said.append((f"score={value}", _ranking(value)))
            is_usual = key.name in USUAL and value == key.default
            if key.values and has_effect(key.name, values) and not is_usual and key.name not in unseen:
                said.append((f"{key.name}={value}", _with_values(key.values[value], values)))
        return said

    def describe(self) -> str:
        """One sentence: which tokens are trained on, and how much each counts."""
        (_, share), *others = self.sentences()
        if not others:
            return share
        *clauses, last = [_clause(sentence) for _, sentence in others]
        return f"{share.partition(': ')[0].rstrip('.')}: {', '.join(clauses)} and {last}."

    def _share(self) -> str:
        if self.keeps_all:
            return "Trains on all response tokens: the update is verl's own, bit for bit."
        when = "" if self.schedule == "constant" else " at step 1"
        tokens = f"the response tokens with {self.where}" if self.where else "the response tokens"
        share = self.selector.kept_share
        part = f"all {tokens.removeprefix('the ')}" if share == 1.0 else f"{_percent(share)} of {tokens}"
        if self.use == "mask":
            rest = f": the other {_percent(1 - share)} weigh 0" if share < 1.0 else ""
            return f"Trains on {part}{when}{rest}."
        what = {"weight": "weight", "advantage": "advantage", "clip": "clip range"}[self.use]
        whose = "each of them" if share == 1.0 and not self.where else part
        return f"Trains on all response tokens and gives {whose}{when} another {what}."


def _ranking(score: str) -> str:
    """What the tokens are ranked by, as a sentence about the run."""
    if score not in SCORES:
        return f"Ranks tokens by a function of the user's: {score}."
    sentence = SCORES[score].sentence
    return f"Ranks tokens by {sentence[0].lower()}{sentence[1:]}"


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def _with_values(sentence: str, values: Mapping[str, Any]) -> str:
    """The sentence with each key in backticks replaced by its value: a share in percent, a number, a score."""
    for key in KEYS:
        if not key.values:
            value = values[key.name]
            word = _percent(value) if key.name in SHARES else f"{value:g}" if isinstance(value, float) else str(value)
            sentence = sentence.replace(f"`{key.name}`", word)
    return sentence.replace("`", "")


def _clause(sentence: str) -> str:
    """The part of a sentence before its first colon, as a clause that can follow others."""
    clause = sentence.partition(": ")[0].rstrip(".")
    return clause[0].lower() + clause[1:]
