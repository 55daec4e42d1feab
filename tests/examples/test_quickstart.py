"""The quickstart runs as printed, with torch and numpy only, and its output is consistent."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart.py"

pytestmark = pytest.mark.process

#: modules that the import system treats as broken, because nothing here may need them
WITHOUT = """
import runpy, sys
for name in ("verl", "ray", "transformers", "hydra", "omegaconf", "tensordict", "pyarrow", "rich", "typer"):
    sys.modules[name] = None
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_what_it_prints_is_consistent(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    finished = python("-c", WITHOUT, str(QUICKSTART), timeout=60)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()

    first = re.match(r"kept (\d+) of (\d+) response tokens: ⌈(\S+) · (\d+)⌉ = (\d+), entropy at least τ = ", lines[0])
    assert first is not None, lines[0]
    kept, num_tokens, ceiling = int(first[1]), int(first[2]), int(first[5])
    assert num_tokens == int(first[4])
    assert kept == ceiling == math.ceil(float(first[3]) * num_tokens)

    answers = [line.partition(": ")[2] for line in lines if line.startswith("answer ")]
    assert sum(answer.count("#") for answer in answers) == kept
    assert sum(answer.count("#") + answer.count(".") for answer in answers) == num_tokens
    assert len({len(answer) for answer in answers}) > 1, "the answers have different lengths"
    assert any(" " in answer for answer in answers), "a tool's output lies within an answer"

    weight, dropped = re.findall(r"(?:token|one) ([\d.]+)", lines[-3])
    assert float(weight) == pytest.approx(num_tokens / kept, abs=1e-4)
    assert float(dropped) == 0.0
    loss, mean_over_kept = map(float, re.findall(r"-?\d+\.\d+", lines[-2]))
    assert loss == mean_over_kept
    assert lines[-1] == f"positions with a gradient: {kept}; largest gradient at a dropped one: 0"


def test_core_imports_torch_and_numpy_alone(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """A user's own training loop needs nothing else of the environment, and nothing of verl."""
    listing = "import sys, entropy_fork.core; print(*{name.partition('.')[0] for name in sys.modules})"
    before = "import sys, torch, numpy; print(*{name.partition('.')[0] for name in sys.modules})"
    found, torchs = (set(python("-c", code).stdout.split()) for code in (listing, before))
    assert {"torch", "numpy", "entropy_fork"} <= found
    assert found - torchs - set(sys.stdlib_module_names) == {"entropy_fork"}
