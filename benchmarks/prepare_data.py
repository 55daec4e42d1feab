"""Time and peak memory of 'entropy-fork data prepare' on a file like DAPO-Math-17K: 1.79M rows, 100 per question.

python benchmarks/prepare_data.py [--questions 17900 --copies 100]
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from entropy_fork.data.sources import SOURCES

ROWS_PER_GROUP = 100_000


def write_source(path: Path, questions: int, copies: int) -> None:
    """Write shuffled rows in the source's schema: questions of about 250 characters, one answer in three no integer."""
    source = SOURCES["dapo_math_17k"]
    rng = random.Random(0)
    distinct = pa.Table.from_pylist(
        [
            {
                "data_source": "math_dapo",
                "prompt": [
                    {
                        "content": f"{source.prefix}Question {i}: {rng.randbytes(115).hex()}{source.suffix}",
                        "role": "user",
                    }
                ],
                "ability": "MATH",
                "reward_model": {
                    "ground_truth": f"\\frac{{{i}}}{{{i + 7}}}" if i % 3 == 0 else str(i),
                    "style": "rule",
                },
                "extra_info": {"index": f"{rng.getrandbits(128):032x}"},
            }
            for i in range(questions)
        ]
    )
    order = list(range(questions)) * copies
    rng.shuffle(order)
    with pq.ParquetWriter(path, distinct.schema) as writer:
        for start in range(0, len(order), ROWS_PER_GROUP):
            writer.write_table(distinct.take(order[start : start + ROWS_PER_GROUP]))


def main(
    questions: Annotated[int, typer.Option(min=1)] = 17_900, copies: Annotated[int, typer.Option(min=1)] = 100
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dapo-math-17k.parquet"
        write_source(path, questions, copies)
        print(f"{questions * copies:,} rows, {path.stat().st_size / 1e6:.0f} MB")
        command = [sys.executable, "-m", "entropy_fork.cli", "data", "prepare", "dapo_math_17k"]
        began = time.monotonic()
        subprocess.run([*command, "--from", str(path), "--output", folder], check=True)
        seconds = time.monotonic() - began
        manifest = json.loads((Path(folder) / "dapo_math_17k" / "manifest.json").read_text())
        assert manifest["rows_out"] == questions, manifest
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = usage.ru_utime + usage.ru_stime
        print(f"{seconds:.0f} s, {processor:.0f} s of processor time, peak memory {usage.ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    typer.run(main)
