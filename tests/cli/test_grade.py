"""``entropy-fork grade``: a pair, a file of pairs, and what bad input gets."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from entropy_fork.cli import app

pytestmark = pytest.mark.process


def grade(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["grade", *arguments])
    return result.exit_code, result.output


def test_a_pair() -> None:
    assert grade("11 5/6", r"\frac{71}{6}") == (0, "equal\n")
    assert grade("--", "-5", "5") == (1, "not equal\n")
    code, output = grade(r"5\text{ m}", r"5\text{ cm}", "--why")
    assert code == 1
    assert output.splitlines()[0] == "not equal: quantities, converted"
    assert [line.split()[:2] for line in output.splitlines()[1:]] == [["answer", "Measured:"], ["truth", "Measured:"]]
    assert grade(r"5\text{ m}", r"5\text{ cm}", "--convention", "math")[0] == 0


def test_a_file_of_pairs(tmp_path: Path) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text("answer\tground_truth\twanted\n42,\t42\t=\n6\t6m\t=\n\x1b[31m7\t8\t≠\n", encoding="utf-8")
    code, output = grade("--file", str(file))
    assert code == 1
    assert output.splitlines() == [
        "≠\t6\t6m\twanted =",
        "pairs.tsv: 3 pairs, 1 equal; 2 of 3 as wanted, 0 wrong taken for right, 1 right taken for wrong",
    ]
    code, output = grade("--file", str(file), "--why")
    assert "=\t42,\t42\tthe same text" in output
    assert "\x1b" not in output  # an answer could drive the terminal
    file.write_text("answer\tground_truth\n1\t1.0\n", encoding="utf-8")
    assert grade("--file", str(file)) == (0, "pairs.tsv: 1 pairs, 1 equal\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tb\n1\t2\n", "needs a header with the columns answer and ground_truth"),
        ("", "it has no rows"),
        ("answer\tground_truth\n1\n", "line 2: the answer or the ground truth is missing"),
    ],
)
def test_a_file_that_is_no_table_of_pairs(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text(text, encoding="utf-8")
    code, output = grade("--file", str(file))
    assert code == 1
    assert message in " ".join(output.split())


def test_bad_arguments(tmp_path: Path) -> None:
    for arguments in ((), ("1",), ("1", "2", "--file", str(tmp_path / "x"))):
        code, output = grade(*arguments)
        assert code == 1
        assert "write ANSWER and TRUTH, or --file PAIRS.tsv" in output
    assert "cannot be read" in grade("--file", str(tmp_path / "missing.tsv"))[1]
