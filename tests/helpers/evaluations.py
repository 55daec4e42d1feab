"""The input and the output of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
QUIET = Console(quiet=True)


def write_data(file: Path, sources: Sequence[str]) -> Path:
    """Write a file of questions, one for each of the sources given."""
    rows = [
        {
            "data_source": source,
            "prompt": [{"role": "user", "content": f"{number}+{number}"}],
            "reward_model": {"style": "rule", "ground_truth": str(2 * number)},
        }
        for number, source in enumerate(sources)
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def lines(folder: Path) -> list[str]:
    """The answers of a folder, one JSON object a line."""
    return (folder / "answers.jsonl").read_text().splitlines()
