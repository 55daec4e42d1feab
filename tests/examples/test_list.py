"""The list of examples is complete, and no example imports another one by a path."""

from __future__ import annotations

import re
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_list_names_every_example() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"^\| \[[^]]+\]\(([^)]+)\)", table, re.MULTILINE)
    listed = {link.removesuffix("/README.md") for link in links}
    there = {path for folder in (EXAMPLES, EXAMPLES / "research") for path in folder.iterdir()}
    there -= {EXAMPLES / "README.md", EXAMPLES / "research"}
    names = {path.relative_to(EXAMPLES).as_posix() for path in there if not path.name.startswith("__")}
    assert listed == names


def test_no_example_changes_where_python_looks_for_modules() -> None:
    found = [file.name for file in EXAMPLES.rglob("*.py") if re.search(r"sys\.path|importlib", file.read_text("utf-8"))]
    assert found == []
