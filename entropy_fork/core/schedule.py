"""ρ over the training steps: constant, or from one share to another along a line or half a cosine."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from entropy_fork.core.rule import KEY_OF, Rule, check_schedule


def ratio_at(step: int, top_ratio: float, schedule: str, final_ratio: float, schedule_steps: int) -> float:
    """The ρ of a training step.

    Args:
        step: the training step, from 1.
        top_ratio: ρ at step 1, and at every step with ``constant``.
        schedule: ``constant``, ``linear`` or ``cosine`` (slow at both ends).
        final_ratio: ρ at ``schedule_steps`` and after.
        schedule_steps: at least 2; ``constant`` ignores it.

    Raises:
        ValueError: an unknown schedule, or fewer than two steps.
    """
    check_schedule(schedule, schedule_steps)
    if schedule == "constant":
        return top_ratio
    progress = min(1.0, max(0.0, (step - 1) / (schedule_steps - 1)))
    if schedule == "cosine":
        progress = (1.0 - math.cos(math.pi * progress)) / 2.0
    # Written so that both ends are exact.
    return (
        top_ratio
        if progress == 0.0
        else final_ratio
        if progress == 1.0
        else (top_ratio + (final_ratio - top_ratio) * progress)
    )


def rule_at(rule: Rule, step: int) -> Rule:
    """The rule of one training step: the same, with the ρ of that step and a constant schedule.

    Args:
        rule: of the run.
        step: the training step, from 1.
    """
    ratio = ratio_at(step, rule.selector.top_ratio, rule.schedule, rule.final_ratio, rule.schedule_steps)
    constant: dict[str, Any] = {name: KEY_OF[name].default for name in ("schedule", "final_ratio", "schedule_steps")}
    return replace(rule, selector=replace(rule.selector, top_ratio=ratio), **constant)
