"""The reward of the paper's runs: 1 when the last ``\\boxed{}`` of an answer equals the ground truth, else 0.

Use it through verl's reward interface, with any reward manager::

    reward.custom_reward_function.path=pkg://entropy_fork.reward
    reward.custom_reward_function.name=compute_score

Equality is math-verify's (``\\frac{1}{2}`` equals ``0.5``). Its own timeouts use signals, which work in a main thread
only, and verl scores in threads: they are switched off, and what is parsed is bounded in length instead.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

#: longer contents of a box are wrong without being parsed
MAX_ANSWER_CHARACTERS = 256

# Said once per call by math-verify when its timeouts are off, as they have to be here.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def last_boxed(text: str) -> str | None:
    """The contents of the last complete ``\\boxed{…}``, None where there is none."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        begin, depth = start + len("\\boxed{"), 1
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[begin:end]
        start = text.rfind("\\boxed{", 0, start)
    return None


@lru_cache(maxsize=16384)
def equivalent(answer: str, ground_truth: str) -> bool:
    """Whether two short mathematical expressions are equal, in LaTeX or plain."""
    parsed = [parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (ground_truth, answer)]
    return bool(all(parsed) and verify(*parsed, timeout_seconds=None))


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **_: Any
) -> dict[str, float]:
    """verl's reward function.

    Args:
        data_source, extra_info: of the data row; not looked at.
        solution_str: the decoded answer.
        ground_truth: ``reward_model.ground_truth`` of the data row.

    Returns:
        ``score`` and ``acc`` (0.0 or 1.0), and ``format`` (1.0 where the answer has a box at all).
    """
    answer = last_boxed(solution_str)
    right = answer is not None and len(answer) <= MAX_ANSWER_CHARACTERS and equivalent(answer.strip(), ground_truth)
    return {"score": float(right), "acc": float(right), "format": float(answer is not None)}
