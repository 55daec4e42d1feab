"""One thing that is wrong with a run, and when the run itself would notice it."""

from __future__ import annotations

from dataclasses import dataclass

AT_START = "at the start"
IN_RAY = "after Ray is up"
IN_WORKER = "when the worker loads the model"
IN_MODEL = "when the model is loaded"
IN_ENGINE = "when the rollout engine starts"
IN_LOG_PROB = "in the first log-prob pass, after the first rollout"
IN_UPDATE = "in the first update, after the first rollout"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        message: what is wrong and what to write instead, in one or two sentences.
        when: when the run itself would notice; empty for what it would never notice.
        fatal: False where the run goes on, but is not the one that was asked for.
    """

    message: str
    when: str = ""
    fatal: bool = True
