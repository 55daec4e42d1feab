r"""Can the reward read the ground truths of a data set, and tell each from the same text with one other digit?

    python benchmarks/ground_truths.py data/math500/test.parquet data/olympiadbench/test.parquet

Takes verl's parquet files, or JSON files with a list of texts. Prints the truths that cannot be read, those that do not
equal themselves in other spacing, and the changed ones that are taken for equal.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Annotated

import typer

from entropy_fork.common.progress import track
from entropy_fork.reward.judge import judges
from entropy_fork.reward.score import MEMORY_MIB, TIMEOUT


def truths_of(file: Path) -> list[str]:
    """The distinct ground truths of a file, in their order."""
    if file.suffix == ".json":
        return list(dict.fromkeys(map(str, json.loads(file.read_text(encoding="utf-8")))))
    import pyarrow.parquet as parquet

    rows = parquet.read_table(file, columns=["reward_model"]).to_pylist()
    return list(dict.fromkeys(str(row["reward_model"]["ground_truth"]) for row in rows))


def in_other_spacing(truth: str) -> str:
    r"""With ``\,`` behind each plus sign, and a full stop; words keep their spaces."""
    return truth.replace("+", r" +\, ") + "." * (not truth.endswith("."))


def main(
    files: Annotated[list[Path], typer.Argument(help="parquet files of verl, or JSON lists of texts")],
    seed: Annotated[int, typer.Option(help="of the digits that are changed")] = 0,
) -> None:
    """Print what goes wrong, and one line of counts per file."""
    drawn = random.Random(seed)
    pool = judges(1, MEMORY_MIB)
    for file in files:
        truths = truths_of(file)
        unreadable = unequal = mutations = fooled = 0
        for truth in track(file.name, truths):
            verdict = pool.compare(in_other_spacing(truth), truth, TIMEOUT)
            if not verdict.parseable:
                unreadable += 1
                print(f"cannot be read: {truth!r} ({verdict.why})")
            if not verdict.equal:
                unequal += 1
                print(f"is not equal to itself: {truth!r} ({verdict.why})")
            if places := [match.start() for match in re.finditer(r"[0-9]", truth)]:
                place = drawn.choice(places)
                digit = drawn.choice([each for each in "0123456789" if each != truth[place]])
                changed = truth[:place] + digit + truth[place + 1 :]
                mutations += 1
                verdict = pool.compare(changed, truth, TIMEOUT)
                if verdict.equal:
                    fooled += 1
                    print(f"equal: {changed!r} and {truth!r} ({verdict.why})")
        print(
            f"{file.name}: {len(truths)} ground truths, {unreadable} cannot be read, {unequal} are not equal to "
            f"themselves; {fooled} of {mutations} with one other digit are taken for equal"
        )


if __name__ == "__main__":
    typer.run(main)
