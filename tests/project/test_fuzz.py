"""Property tests draw the same examples everywhere. ``make fuzz`` draws new ones, and a failure can be replayed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

TESTS = Path(__file__).resolve().parents[1]

PROPERTY = """
from pathlib import Path
from hypothesis import given, settings, strategies as st

seen = []

@settings(max_examples=30)
@given(st.integers(), st.text())
def test_records(number, text):
    seen.append((number, text))

def test_writes():
    Path("seen").write_text(repr(seen))
"""

#: in half of the rounds, one of 100 examples fails
RARE = """
from hypothesis import given, strategies as st

@given(st.integers(2**20, 2**32))
def test_rare(number):
    assert number % 151 != 7
"""


def test_the_profile_of_the_tests_is_deterministic() -> None:
    assert settings.default is not None
    assert (settings.default.derandomize, settings.default.database) == (True, None)
    drawn: list[list[tuple[int, str]]] = [[], []]

    @given(st.integers(), st.text())
    def record(number: int, text: str) -> None:
        drawn[-1].append((number, text))

    record()
    drawn.reverse()
    record()
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 20


def examples(folder: Path, *arguments: str) -> str:
    """The examples that a whole run of pytest draws in a separate folder, with our profiles."""
    folder.mkdir(exist_ok=True)
    (folder / "test_property.py").write_text(PROPERTY)
    options = ["-q", "-p", "conftest", "-p", "no:cacheprovider", *arguments]
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, "test_property.py"], cwd=folder, check=True, capture_output=True,
        env=environment(),
    )  # fmt: skip
    return (folder / "seen").read_text()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.process
def test_a_seed_of_fuzz_draws_the_same_again_and_another_one_others(tmp_path: Path) -> None:
    fuzz = ("--hypothesis-profile", "fuzz", "--hypothesis-seed")
    one, again, other = (examples(tmp_path, *fuzz, seed) for seed in ("1", "1", "2"))
    assert one == again != other
    assert examples(tmp_path) == examples(tmp_path) != one


@pytest.mark.process
def test_what_fuzz_finds_can_be_replayed(tmp_path: Path) -> None:
    (tmp_path / "test_rare.py").write_text(RARE)
    fuzz = [sys.executable, str(TESTS / "fuzz.py"), "--minutes", "5", str(tmp_path / "test_rare.py")]
    options = {"PYTEST_ADDOPTS": "-p conftest -p no:cacheprovider"}
    found = subprocess.run(fuzz, cwd=tmp_path, capture_output=True, text=True, env=environment() | options)
    assert found.returncode == 1, found.stdout + found.stderr
    assert re.match(r"round 1, seed \d+, 5\.0 minutes left\n", found.stdout)
    (line,) = re.findall(r"^replay: (.*)", found.stdout, re.MULTILINE)
    replayed = subprocess.run(
        shlex.split(line), cwd=tmp_path, capture_output=True, text=True, env=environment() | options
    )
    assert replayed.returncode == 1, replayed.stdout
    blob = re.compile(r"@reproduce_failure\('.*\)")
    assert blob.findall(found.stdout) == blob.findall(replayed.stdout) != []


@pytest.mark.process
def test_fuzz_ends_in_time(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text("import time\nfrom hypothesis import given, strategies as st\n"
                                           "@given(st.none())\ndef test_slow(_): time.sleep(60)\n")  # fmt: skip
    fuzz = [sys.executable, str(TESTS / "fuzz.py"), "--minutes", "0.1", str(tmp_path / "test_slow.py")]
    options = {"PYTEST_ADDOPTS": "-p conftest -p no:cacheprovider"}
    done = subprocess.run(fuzz, cwd=tmp_path, capture_output=True, text=True, env=environment() | options, timeout=40)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("0 whole rounds, no failure\n")
