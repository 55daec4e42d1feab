"""ρ over the training steps: constant, or from one share to another along a line or half a cosine."""

from __future__ import annotations

import math

#: how ρ goes from its first value to its last
SCHEDULES = ("constant", "linear", "cosine")


def ratio_at(step: int, top_ratio: float, schedule: str, final_ratio: float, schedule_steps: int) -> float:
    """The ρ of a training step.

    Args:
        step: the training step, from 1.
        top_ratio: ρ at step 1, and at every step with ``constant``.
        schedule: ``constant``, ``linear`` or ``cosine`` (slow at both ends).
        final_ratio: ρ at ``schedule_steps`` and after.
        schedule_steps: at least 2, but with ``constant``, where it says nothing.

    Raises:
        ValueError: an unknown schedule, or fewer than two steps.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if schedule == "constant":
        return top_ratio
    if schedule_steps < 2:
        raise ValueError(f"schedule={schedule} needs schedule_steps, the step at which final_ratio is reached (≥ 2)")
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
