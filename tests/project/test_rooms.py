"""Which room may import which: the arrows between the rooms in the code agree with the table of CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.places import REPOSITORY, TESTS
from helpers.rooms import arrows, backward, by_folder, by_table, counts, floors, module_name, python_files, rings, table

ROOMS = table(REPOSITORY / "CONTRIBUTING.md")
NAMES = [room.name for room in ROOMS]
ALLOWED = {(room.name, other) for room in ROOMS for other in room.may_import}
#: folders of tests that belong to no room
BESIDE_THE_ROOMS = {"e2e", "faults", "recipes", "examples", "project", "helpers"}


def listed(lines: list[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)


def test_every_folder_is_a_room_and_every_room_is_there() -> None:
    files = python_files(REPOSITORY)
    folders = {by_folder("", file) for file in files if file.name == "__init__.py" or len(file.parts) > 2}
    assert not folders - set(NAMES), "CONTRIBUTING.md has no row for these folders: add one to its table of rooms"
    lived_in = {by_table(NAMES)(module_name(file), file) for file in files}
    assert set(NAMES) == lived_in, "CONTRIBUTING.md has rows for folders that are not there: take them out"


def test_no_room_imports_what_its_row_does_not_name() -> None:
    drawn = arrows(REPOSITORY, by_table(NAMES))
    surplus = [f"{here} -> {there}: {line}" for here, there in drawn.keys() - ALLOWED for line in drawn[here, there]]
    assert not surplus, (
        f"these imports are not in CONTRIBUTING.md's table of rooms. Move the code, or name the room in the row's cell "
        f"'may import' if it stands above:{listed(sorted(surplus))}"
    )


def test_no_row_names_what_its_room_does_not_import() -> None:
    unused = ALLOWED - arrows(REPOSITORY, by_table(NAMES)).keys()
    lines = [f"{here} -> {there}" for here, there in sorted(unused)]
    assert not lines, f"take these out of the cells 'may import' in CONTRIBUTING.md, no code needs them:{listed(lines)}"


def test_a_room_imports_only_rooms_above_it() -> None:
    wrong = [f"{here} -> {there}" for here, there in sorted(ALLOWED) if there not in NAMES[: NAMES.index(here)]]
    assert not wrong, f"the table's rows stand in an order in which each imports only those above:{listed(wrong)}"


def test_no_folder_is_imported_by_what_it_imports() -> None:
    assert rings(arrows(REPOSITORY)) == []


def small(folder: Path, **files: str) -> Path:
    """A checkout with these files of ``entropy_fork``; ``__`` in a name separates folders."""
    for name, source in {"__init__": "", **files}.items():
        file = folder / "entropy_fork" / (name if name == "__init__" else name.replace("__", "/"))
        file = file.with_name(file.name + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    (folder / "hydra_plugins").mkdir()
    return folder


@pytest.mark.parametrize(
    "source",
    [
        "import entropy_fork.tokens.store",
        "from entropy_fork.tokens import store",
        "from entropy_fork.tokens.store import parts",
        "from ..tokens import store",
        "from ..tokens.store import parts",
        "def late():\n    from entropy_fork.tokens.store import parts",
        "if TYPE_CHECKING:\n    from entropy_fork.tokens import store",
    ],
)
def test_an_import_is_an_arrow_however_it_is_written(tmp_path: Path, source: str) -> None:
    checkout = small(tmp_path, tokens__store="parts = 1", report__page=source)
    assert arrows(checkout) == {("report", "tokens"): ["entropy_fork/report/page.py imports entropy_fork.tokens.store"]}


def test_what_is_no_arrow(tmp_path: Path) -> None:
    other = "import torch\nfrom verl import tokens\nfrom . import figures\nfrom entropy_fork.report.figures import draw"
    assert arrows(small(tmp_path, tokens__store="", report__page=other, report__figures="draw = 1")) == {}


def test_rings_floors_and_backward_arrows_are_counted(tmp_path: Path) -> None:
    checkout = small(
        tmp_path,
        common__errors="",
        core__rule="from entropy_fork.common import errors",
        verl__config="from entropy_fork.verl.guards import resume\nfrom entropy_fork.core import rule  # type: ignore",
        verl__guards__resume="from entropy_fork.verl import config, plugin",
        verl__plugin="",
        loose="from entropy_fork.verl import plugin",
    )
    drawn = arrows(checkout)
    ring = {"verl", "verl/guards"}
    assert rings(drawn) == [ring]
    (wrong,) = backward(drawn)
    assert set(wrong) == ring
    assert not rings(set(drawn) - {wrong})
    assert floors(drawn)["common"] == 1
    assert floors(drawn)["core"] == 2
    assert floors(drawn)["loose"] > floors(drawn)["verl"] > 2
    assert dict(counts(checkout)) == {
        "rooms": 6, "floors": max(floors(drawn).values()), "arrows": 5, "backward arrows": 1, "modules": 7, "lines": 5,
        "type: ignore": 1,
    }  # fmt: skip


def test_a_row_may_name_a_file(tmp_path: Path) -> None:
    checkout = small(
        tmp_path,
        verl__config="",
        verl__plugin="from entropy_fork.verl import config",
        verl__guards__resume="from ..config import node",
    )
    drawn = arrows(checkout, by_table(["verl", "verl/config", "verl/guards"]))
    assert set(drawn) == {("verl", "verl/config"), ("verl/guards", "verl/config")}


# ------------------------------------------------------------------------------------------------- the tests' own rooms

TEST_FILES = sorted(TESTS.rglob("test_*.py"))


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_nothing_imports_a_test() -> None:
    """A helper does not import a test either."""
    of_a_test = re.compile(r"(\.|tests\b|conftest\b)|(\w+\.)*test_")
    wrong = [f"{file.relative_to(TESTS)} imports {name}" for file in sorted(TESTS.rglob("*.py"))
             for name in imports(file) if of_a_test.match(name)]  # fmt: skip
    assert not wrong, (
        f"what tests share stands in tests/helpers/, or is a fixture in the folder's conftest.py:{listed(wrong)}"
    )


def test_no_benchmark_or_example_reaches_into_the_tests() -> None:
    wrong = []
    for file in (file for folder in ("benchmarks", "examples") for file in (REPOSITORY / folder).rglob("*")):
        if file.suffix == ".py":
            tree = ast.parse(file.read_text("utf-8"))
            said = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
            texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in said)
            words = [node.value for node in texts if isinstance(node.value, str)] + list(imports(file))
        elif file.suffix == ".sh":
            words = file.read_text("utf-8").split()
        else:
            continue
        wrong += [f"{file.relative_to(REPOSITORY)}: {word}" for word in words
                  if re.search(r"(?<!\w)(tests|helpers)(?!\w)", word)]  # fmt: skip
    assert not wrong, f"what a benchmark needs stands beside it, and a test takes it from there:{listed(wrong)}"


def test_a_test_file_stands_in_the_folder_of_its_room() -> None:
    folders = {file.parent.relative_to(TESTS).as_posix() for file in TEST_FILES}
    assert folders <= {*NAMES, *BESIDE_THE_ROOMS}
    assert not list(TESTS.glob("verl/__init__.py")), "a package tests/verl would be imported in verl's place"


def test_no_two_test_files_have_one_name() -> None:
    """Pytest imports test files by name only, and real ranks find a test's functions by that name."""
    assert [name for name, number in Counter(file.name for file in TEST_FILES).items() if number > 1] == []


def test_real_runs_stand_in_folders_of_their_own() -> None:
    wrong = []
    for file in TEST_FILES:
        source = file.read_text("utf-8")
        for mark, folder in (("e2e", "e2e"), ("fault", "faults")):
            marked = re.search(rf"^(@|pytestmark = )pytest\.mark\.{mark}$", source, re.MULTILINE)
            if bool(marked) != (file.parent.name == folder):
                wrong.append(f"{file.relative_to(TESTS)}: pytest.mark.{mark} and tests/{folder}/ go together")
    assert not wrong, listed(wrong)
