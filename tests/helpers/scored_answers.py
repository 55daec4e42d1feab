"""Answers with all that scores read, and the scores of their tokens in the plainest form, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from entropy_fork.tokens.store import AnswerTokens

#: nats. Few different values, so that many tokens have the same score
ENTROPIES = [0.0, 0.25, 0.5, 1.0, 1.5]
WORDS = [" so", " but", " wait", "=", "4", "<b>"]


def answers_of_analysis(number: int, seed: int = 0) -> list[AnswerTokens]:
    """Answers as ``entropy-fork analyze`` writes them: 14 tokens and more each."""
    draw = np.random.default_rng(seed)
    found = []
    for place in range(number):
        size = 14 + place
        ids = draw.integers(0, len(WORDS), size).astype(np.int32)
        found.append(
            AnswerTokens(
                prompt=f"question {place}",
                text="",
                token_ids=ids,
                pieces=[WORDS[i] for i in ids],
                entropy=draw.choice(ENTROPIES, size).astype(np.float32),
                log_prob=-draw.choice([0.0, 0.125, 1.0, 2.5], size).astype(np.float32),
                answer=place,
            )
        )
    return found


def answers_of_run(steps: Sequence[int], number: int = 3) -> list[AnswerTokens]:
    """Answers as a training run dumps them: with advantages, reference and rollout log-probabilities."""
    found = []
    for step in steps:
        draw = np.random.default_rng(step)
        for place, answer in enumerate(answers_of_analysis(number, seed=step)):
            size = len(answer.entropy)
            noise = draw.choice([0.0, 0.5, -0.25], size).astype(np.float32)
            found.append(
                replace(
                    answer,
                    answer=100 * step + place,
                    step=step,
                    selected=answer.entropy > 0.5,
                    advantage=np.full(size, [1.5, -0.75, 0.0][place % 3], dtype=np.float32),
                    ref_log_prob=answer.log_prob + noise,
                    rollout_log_prob=answer.log_prob - noise,
                )
            )
    return found


def restated(name: str, answers: Sequence[AnswerTokens]) -> list[float]:
    """The score of each token of answers that are seen together. Every score that is no draw."""
    found = []
    log_probs = [float(value) for answer in answers for value in answer.log_prob]
    advantages = [float(value) for answer in answers if answer.advantage is not None for value in answer.advantage]
    for answer in answers:
        for position in range(len(answer.entropy)):
            h, ln_p = float(answer.entropy[position]), float(answer.log_prob[position])
            p = math.exp(ln_p)
            a = math.nan if answer.advantage is None else float(answer.advantage[position])
            rollout = math.nan if answer.rollout_log_prob is None else float(answer.rollout_log_prob[position])
            if name == "entropy":
                found.append(h)
            elif name == "surprisal":
                found.append(-ln_p)
            elif name == "rsi":
                found.append(-ln_p / max(h, 1e-6))
            elif name == "position":
                found.append(float(position))
            elif name == "gradient":
                found.append(abs(a) * (1 - p))
            elif name == "open_gradient":
                found.append(abs(a) * h)
            elif name == "omega":
                found.append(abs(a * (1 - p) * (ln_p + h)))
            elif name == "mismatch":
                found.append(abs(ln_p - rollout))
            elif name == "covariance":
                mean_a, mean_ln_p = sum(advantages) / len(advantages), sum(log_probs) / len(log_probs)
                found.append((a - mean_a) * (ln_p - mean_ln_p))
            else:
                raise KeyError(name)
    return found
