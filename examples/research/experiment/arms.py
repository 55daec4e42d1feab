"""The choices of tokens that are compared, and the questions that they answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """A choice of tokens, and its words on the command line."""

    name: str
    tokens: str
    overrides: tuple[str, ...]
    colour: str


@dataclass(frozen=True)
class Question:
    """Arms that are compared, and how.

    Attributes:
        arms: in the order of the tables.
        folder: the runs are in FOLDER-STEPSsteps. Questions with the same folder share runs.
        steps, seeds, validations: of each run, by default; the validation before the training is not counted.
        problems: held-out problems; None for the task's own number.
        answers: to each of them.
    """

    arms: tuple[Arm, ...]
    folder: str
    steps: int
    seeds: int
    validations: int
    problems: int | None
    answers: int

    def test_every(self, steps: int) -> int:
        """Steps between two validations of a run."""
        return max(1, steps // self.validations)


def by_score(name: str, words: str, colour: str) -> Arm:
    """The 20% of the tokens that another score than the entropy ranks highest."""
    return Arm(name, f"highest 20% by {words}", ("entropy_fork=global", f"entropy_fork.score={name}"), colour)


ALL = Arm("all", "all tokens", ("entropy_fork=off",), "black")
TOP20 = Arm("top20", "highest 20% by entropy", ("entropy_fork=global",), "C3")
BOTTOM80 = Arm("bottom80", "lowest 80% by entropy", ("entropy_fork=bottom80",), "C0")
RANDOM20 = Arm("random20", "20% drawn by lot", ("entropy_fork=random20",), "C2")
MATCHED = Arm("matched", "as many per answer as top20, by lot", ("entropy_fork=matched_random",), "C7")
SURPRISAL = by_score("surprisal", "surprisal", "C1")
GRADIENT = by_score("gradient", "gradient magnitude", "C4")
# two doubts about top20: is it the rank among the uncertain tokens? Is it the clipping of its larger gradients?
NEXT20 = Arm(
    "next20",
    "the 20% by entropy that follow top20",
    ("entropy_fork=global", "entropy_fork.select=band", "entropy_fork.band_from=0.2", "entropy_fork.top_ratio=0.4"),
    "C5",
)
UNCLIPPED = Arm(
    "unclipped",
    "highest 20% by entropy, gradients not clipped",
    ("entropy_fork=global", "actor_rollout_ref.actor.optim.clip_grad=1000"),
    "C6",
)
RATIOS = (
    ALL,
    Arm("top50", "highest 50% by entropy", ("entropy_fork=global", "entropy_fork.top_ratio=0.5"), "C1"),
    TOP20,
    Arm("top10", "highest 10% by entropy", ("entropy_fork=global", "entropy_fork.top_ratio=0.1"), "C4"),
    BOTTOM80,
    RANDOM20,
)
SCORES = (
    ALL,
    TOP20,
    SURPRISAL,
    by_score("covariance", "covariance", "C2"),
    GRADIENT,
    by_score("rsi", "relative surprisal", "C5"),
    by_score("omega", "change of entropy", "C6"),
    MATCHED,
)
CONTROLS = (ALL, TOP20, MATCHED, RANDOM20, BOTTOM80, SURPRISAL, GRADIENT, NEXT20, UNCLIPPED)

#: How many tokens by entropy? Which fifth, by other scores? Is a fifth better than its controls? The last one has more
#: problems with one answer each: they say more, and verl's bootstrap over a problem's answers takes long.
QUESTIONS = {
    "ratios": Question(RATIOS, "experiment", steps=12, seeds=3, validations=3, problems=None, answers=2),
    "scores": Question(SCORES, "experiment", steps=12, seeds=3, validations=3, problems=None, answers=2),
    "controls": Question(CONTROLS, "controls", steps=30, seeds=6, validations=5, problems=512, answers=1),
}
ARMS = {arm.name: arm for question in QUESTIONS.values() for arm in question.arms}
