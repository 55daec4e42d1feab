"""New examples for the property tests, for a given time: ``make fuzz``, ``make fuzz MINUTES=60``.

Each round runs all of them with a new seed. At the first failure it stops, and says how to replay the round.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

TESTS = Path(__file__).resolve().parent


def command(seed: int, what: list[str]) -> list[str]:
    """One round; the same seed draws the same examples, for one test as for all of them."""
    # hide verl's warnings, which come in every round
    arguments = ["-m", "pytest", "-q", "--disable-warnings", "--hypothesis-profile", "fuzz"]
    return [sys.executable, *arguments, "--hypothesis-seed", str(seed), *what]


def main(
    where: Annotated[list[Path] | None, typer.Argument(help="Files of tests; all if not given.")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="For how long.")] = 10,
) -> None:
    """Run the property tests over and over, each round with a new seed."""
    end, rounds = time.monotonic() + 60 * minutes, 0
    while (left := end - time.monotonic()) > 0:
        seed = random.SystemRandom().randrange(2**32)
        print(f"round {rounds + 1}, seed {seed}, {left / 60:.1f} minutes left", flush=True)
        which = [str(path) for path in where or [TESTS]]
        round_ = command(seed, ["-x", "-m", "hypothesis and not e2e and not fault", *which])
        process = subprocess.Popen(
            round_, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace",
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            break
        rounds += 1
        if process.returncode != 0:
            print(said)
            failed = re.findall(r"^FAILED (\S+)", said, re.MULTILINE)
            print(f"replay: {shlex.join(command(seed, failed or which))}")
            print(
                "or put the line '@reproduce_failure(…)' from above over the test; and keep the example: '@example(…)'"
            )
            raise typer.Exit(1)
    print(f"{rounds} whole rounds, no failure")


if __name__ == "__main__":
    typer.run(main)
