"""Scores: what the tokens of a pool can be ranked by. Start here to add one.

A score is a pure function of named per-token *fields*, :data:`FIELDS`. The names of its parameters are the fields that
it reads. It returns one float for each token. :data:`SCORES` lists the built-in ones, each with its formula and its
source. A user's own is named by its import path, ``my_pkg.my_module:function``, and :func:`score_of` finds either.

``scoring.py`` computes them for a batch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from torch import Tensor

from entropy_fork.core.user_function import is_import_path, load_function

#: what is known about each response token. Every field is a flat float tensor with one number per token.
FIELDS: Mapping[str, str] = {
    "entropy": "H, the entropy of the next-token distribution at the token's position, in nats.",
    "log_prob": "ln p, the log-probability of the token, in nats.",
    "advantage": "A, the advantage of the token, as verl computed it.",
    "position": "The number of tokens before the token in its response.",
    "length": "The number of tokens of the token's response.",
    "ref_log_prob": "The log-probability of the token under the reference policy, in nats.",
    "rollout_log_prob": "The log-probability of the token in the rollout engine, which may round differently, in nats.",
    "sum_pi_squared": "Σπ², the sum of the squared probabilities of all tokens of the vocabulary at its position.",
    "draw": "A random number in [0, 1), drawn anew at each step; the same on any number of ranks and after a resume.",
}

#: the fields that depend on the policy. With ``entropy=current`` they are the current policy's.
OF_POLICY = ("entropy", "log_prob", "sum_pi_squared")

#: an entropy below this counts as this, in nats, where a score divides by it
LEAST_ENTROPY = 1e-6


@dataclass(frozen=True)
class Score:
    """One score.

    Attributes:
        name: its name in the config.
        sentence: what it is; starts with "The", and its part before a colon can follow "the highest".
        formula: in the letters of :data:`FIELDS`.
        source: the paper, or who proposed it.
        function: takes fields by name, each a flat float tensor; returns one float per token.
        elementwise: whether the score of a token depends on no other token. If not, the function gets all response
            tokens of a mini-batch over all ranks (of the batch with ``pool=batch``), and no others.
        same_as: the field that the score is, without a change; empty if it is another number.
    """

    name: str
    sentence: str
    formula: str
    source: str
    function: Callable[..., Tensor]
    elementwise: bool = True
    same_as: str = ""

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields that it reads."""
        return fields_read_by(self.function)

    @property
    def is_own(self) -> bool:
        """Whether it is a user's own."""
        return is_import_path(self.name)


def fields_read_by(function: Callable[..., Any]) -> tuple[str, ...]:
    """The fields that a function reads: its parameters, except those that are no field and have a default.

    Raises:
        ValueError: a parameter is not the name of a field, or the function reads none.
    """
    parameters = inspect.signature(function).parameters.values()
    unknown = [
        str(p)
        for p in parameters
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or (p.name not in FIELDS and p.default is p.empty)
    ]
    names = tuple(p.name for p in parameters if p.name in FIELDS)
    if unknown or not names:
        wrong = f"no field is named {', '.join(unknown)}" if unknown else "it has no parameter"
        raise ValueError(f"{wrong}. Name its parameters after fields: {', '.join(FIELDS)}")
    return names


def exact_mean(values: Tensor) -> float:
    """The mean, the same to the last bit whatever the order of the values.

    A sum of floats depends on their order, so on the number of ranks. This one adds whole numbers: each value as a
    multiple of a power of two that is at most 2^-36 of the largest value, for up to 16 million values.

    Args:
        values: float, shape (n,), finite.

    Returns:
        The mean; 0.0 of nothing.
    """
    count = values.numel()
    largest = max((float(part.abs().max()) for part in values.split(PIECE) if part.numel()), default=0.0)
    if largest == 0.0:
        return 0.0
    scale = 2.0 ** (61 - math.frexp(largest)[1] - count.bit_length())
    total = sum(int((part.double() * scale).round().long().sum()) for part in values.split(PIECE))
    return total / count / scale


#: values that are converted at once; they fit into a cache
PIECE = 2**15


def _covariance(advantage: Tensor, log_prob: Tensor) -> Tensor:
    mean_advantage, mean_log_prob = exact_mean(advantage), exact_mean(log_prob)
    covariance = log_prob.new_empty(log_prob.shape)
    parts = zip(covariance.split(PIECE), advantage.split(PIECE), log_prob.split(PIECE), strict=True)
    for part, psi, nats in parts:
        part.copy_((psi - mean_advantage) * (nats - mean_log_prob))
    return covariance


def _rest(log_prob: Tensor) -> Tensor:
    """1 - p, exact for a p near 1."""
    return -log_prob.expm1()


_BUILT_IN = (
    Score(
        "entropy",
        "The entropy: how open the choice of the next token was.",
        "H",
        "arXiv 2506.01939, Eq. 1",
        lambda entropy: entropy,
        same_as="entropy",
    ),
    Score(
        "surprisal",
        "The surprisal: how unlikely the drawn token was.",
        "−ln p",
        "Shannon (1948)",
        lambda log_prob: -log_prob,
    ),
    Score(
        "covariance",
        "The covariance of advantage and log-probability: how much the token lowers the entropy if it is trained on.",
        "(A − mean A)(ln p − mean ln p), the means over the response tokens of the mini-batch on all ranks",
        "Clip-Cov and KL-Cov, arXiv 2505.22617, Eq. 11",
        _covariance,
        elementwise=False,
    ),
    Score(
        "gradient",
        "The gradient magnitude: how far a step on the token moves its own logit.",
        "|A|·(1 − p)",
        "the derivative of A ln p by the token's logit",
        lambda advantage, log_prob: advantage.abs() * _rest(log_prob),
    ),
    Score(
        "open_gradient",
        "The size of the advantage times the entropy: an estimate of the gradient's size.",
        "|A|·H",
        "GMTS, arXiv 2608.30632, at a ratio of 1 and without a KL term",
        lambda advantage, entropy: advantage.abs() * entropy,
    ),
    Score(
        "gradient_norm",
        "The squared gradient norm: how far a step on the token moves all logits.",
        "A²·(1 − 2p + Σπ²)",
        "the squared norm of the derivative of A ln p by all logits",
        lambda advantage, log_prob, sum_pi_squared: (
            advantage.square() * (1 - 2 * log_prob.exp() + sum_pi_squared).clamp(min=0.0)
        ),
    ),
    Score(
        "rsi",
        "The relative surprisal: how unlikely the token was, compared with a typical token at its position.",
        f"−ln p / max(H, {LEAST_ENTROPY:g})",
        "RSI-S, arXiv 2606.31575",
        lambda log_prob, entropy: -log_prob / entropy.clamp(min=LEAST_ENTROPY),
    ),
    Score(
        "omega",
        "The change of entropy: how much a step on the token changes the entropy at its position.",
        "|A·(1 − p)·(ln p + H)|",
        "STEER, arXiv 2510.10150: |Ω| at the policy that drew the token",
        lambda advantage, log_prob, entropy: (advantage * _rest(log_prob) * (log_prob + entropy)).abs(),
    ),
    Score(
        "mismatch",
        "The mismatch: how far apart the log-probabilities of the rollout engine and of the trainer are.",
        "|ln p − ln p of the rollout|",
        "the log-probability gap of training and inference engines",
        lambda log_prob, rollout_log_prob: (log_prob - rollout_log_prob).abs(),
    ),
    Score(
        "position",
        "The position: how far into its response the token stands.",
        "the number of tokens before it",
        "a control",
        lambda position: position,
        same_as="position",
    ),
    Score(
        "random",
        "The random number: drawn anew for each token at each step.",
        "uniform in [0, 1)",
        "a control",
        lambda draw: draw,
        same_as="draw",
    ),
)

#: the built-in scores, by name
SCORES: Mapping[str, Score] = {score.name: score for score in _BUILT_IN}


@lru_cache(maxsize=64)
def score_of(name: str) -> Score:
    """The score of a name in the config.

    Args:
        name: a built-in name, or the import path of a user's own, ``package.module:function``.

    Raises:
        ValueError: there is no such score, its module cannot be imported, or its parameters are not fields.
    """
    check_score_name(name)
    if name in SCORES:
        return SCORES[name]
    function = load_function(name, "score")
    try:
        fields_read_by(function)
    except ValueError as error:
        raise ValueError(f"score={name}: {error}") from None
    about = (inspect.getdoc(function) or "").partition("\n")[0].rstrip(".")
    return Score(name, f"The user's own score: {about or 'without a docstring'}.", name, name, function, False)


def check_score_name(name: str) -> None:
    """Raise a ValueError for a name that is neither a built-in score nor an import path."""
    if name not in SCORES and not is_import_path(name):
        close = get_close_matches(name, SCORES, n=1)
        raise ValueError(
            f"score must be one of {', '.join(SCORES)}, or the import path of your own, package.module:function, "
            f"got {name!r}{f' (did you mean {close[0]}?)' if close else ''}"
        )
