"""plugin_cost.py loads this into every process of a real run. It adds up the seconds that this package takes.

It times everything that a run with ρ = 1.0 does and stock verl does not: reading, selecting, counting and writing on
the driver, and the guard's own sums in the loss of each micro-batch.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import wrapt

FILE = Path(os.environ["ENTROPY_FORK_TIMES"]) / f"{os.getpid()}.txt"


@wrapt.decorator
def timed(wrapped, instance, args, kwargs):  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    result = wrapped(*args, **kwargs)
    with FILE.open("a") as file:
        file.write(f"{wrapped.__name__} {time.perf_counter() - start}\n")
    return result


def _time_driver(module: Any) -> None:
    module.TokenWeights._entropy_fork_write_weights = timed(module.TokenWeights._entropy_fork_write_weights)


def _time_loss(module: Any) -> None:
    module.kept_sums = timed(module.kept_sums)


wrapt.register_post_import_hook(_time_driver, "entropy_fork.verl.trainer")
wrapt.register_post_import_hook(_time_loss, "entropy_fork.verl.policy_loss")
