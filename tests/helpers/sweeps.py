"""What a sweep leaves behind."""

from __future__ import annotations

import csv
from pathlib import Path


def read(folder: Path) -> list[dict[str, str]]:
    """The table of results, a row for each job."""
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))
