"""The rooms of a checkout and the arrows between them: which room imports which, read from the code.

    python tests/helpers/rooms.py             counts of this checkout
    python tests/helpers/rooms.py CHECKOUT    counts of another checkout, by the same rule
    python tests/helpers/rooms.py --arrows    also each arrow, with the imports behind it

A room is a folder with Python files in it. A single file beside the folders of ``entropy_fork/`` counts as a room too.
CONTRIBUTING.md has the table of the rooms and of what each may import; ``test_rooms.py`` compares it with the code.

Every import in the code counts: at the top of a file, in a function, or for types only. Two things do not count: a
module that only a string names, and the ``__init__.py`` files that Python runs in each folder above.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

PACKAGES = ("entropy_fork", "hydra_plugins")
#: the head of the table in CONTRIBUTING.md
HEAD = "| room | what is in it | may import | must stay out |"

Arrow = tuple[str, str]


@dataclass(frozen=True)
class Room:
    """A row of the table in CONTRIBUTING.md."""

    name: str
    may_import: tuple[str, ...]


def python_files(checkout: Path) -> list[Path]:
    """All Python files of the packages, as paths below the checkout."""
    files = [file for package in PACKAGES for file in (checkout / package).rglob("*.py")]
    return sorted(file.relative_to(checkout) for file in files)


def module_name(file: Path) -> str:
    """``entropy_fork/core/ranks.py`` is ``entropy_fork.core.ranks``; an ``__init__.py`` is its folder."""
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def by_folder(_: str, file: Path) -> str:
    """The room of a file, from its path."""
    package, *folders = file.parent.parts
    if package != "entropy_fork":
        return package
    if not folders:
        return package if file.name == "__init__.py" else file.stem
    return "/".join(folders)


def by_table(names: Iterable[str]) -> Callable[[str, Path], str]:
    """The room of a file, from the rows of a table: the longest name with which the path begins.

    A row may name a file instead of a folder, without ``.py``.
    """
    longest_first = sorted(names, key=len, reverse=True)

    def room_of(module: str, _: Path) -> str:
        path = module.replace(".", "/").removeprefix("entropy_fork/")
        return next((name for name in longest_first if f"{path}/".startswith(f"{name}/")), "entropy_fork")

    return room_of


def imported(source: str, module: str, is_folder: bool) -> Iterator[tuple[str, str | None]]:
    """What a module imports from the packages: pairs of a module and a name in it, which may be a module too."""
    package = module if is_folder else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found: list[tuple[str, str | None]] = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found = [(base, alias.name) for alias in node.names]
        else:
            continue
        yield from (pair for pair in found if pair[0].split(".")[0] in PACKAGES)


def arrows(checkout: Path, room_of: Callable[[str, Path], str] = by_folder) -> dict[Arrow, list[str]]:
    """Each arrow between two rooms, with the imports behind it, as ``file imports module``."""
    files = {module_name(file): file for file in python_files(checkout)}
    drawn: dict[Arrow, list[str]] = {}
    for module, file in files.items():
        here = room_of(module, file)
        for base, name in imported((checkout / file).read_text("utf-8"), module, file.name == "__init__.py"):
            target = f"{base}.{name}" if f"{base}.{name}" in files else base
            if target not in files:  # a folder without __init__.py, or a name that is gone
                continue
            there = room_of(target, files[target])
            if there != here:
                line = f"{file.as_posix()} imports {target}"
                found = drawn.setdefault((here, there), [])
                if line not in found:
                    found.append(line)
    return dict(sorted(drawn.items()))


def table(contributing: Path) -> list[Room]:
    """The rows of the table of rooms, in its order.

    Raises:
        ValueError: there is no such table, or a row does not have four cells.
    """
    text = contributing.read_text("utf-8")
    found = re.search(rf"^{re.escape(HEAD)}\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"{contributing} has no table with the head {HEAD}")
    rooms = []
    for line in found[1].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) != 4:
            raise ValueError(f"a row of the table of rooms has {len(cells)} cells, and must have 4: {line}")
        path = cells[0].strip("`").removesuffix("*.py").rstrip("/")
        rooms.append(Room(path.removeprefix("entropy_fork/"), tuple(re.findall(r"`([^`]+)`", cells[2]))))
    return rooms


def rings(drawn: Iterable[Arrow]) -> list[set[str]]:
    """The groups of rooms that import each other, directly or through other rooms."""
    reached: dict[str, set[str]] = {}
    for here, there in drawn:
        reached.setdefault(here, set()).add(there)
        reached.setdefault(there, set())
    for via in reached:
        for room in reached:
            if via in reached[room]:
                reached[room] |= reached[via]
    found: list[set[str]] = []
    for room, others in reached.items():
        if room in others and not any(room in ring for ring in found):
            found.append({other for other in others if room in reached[other]})
    return found


def backward(drawn: Iterable[Arrow]) -> list[Arrow]:
    """The smallest set of arrows whose removal leaves no ring; if there are several such sets, the first one."""
    arrows_ = list(drawn)
    removed: list[Arrow] = []
    for ring in rings(arrows_):
        inside = [arrow for arrow in arrows_ if set(arrow) <= ring]
        removed += next(
            list(some)
            for number in range(1, len(inside))
            for some in combinations(inside, number)
            if not rings(set(inside) - set(some))
        )
    return removed


def floors(drawn: Iterable[Arrow]) -> dict[str, int]:
    """The floor of each room, without the backward arrows. A room that imports no other is on the first floor."""
    arrows_ = set(drawn)
    arrows_ -= set(backward(arrows_))
    floor = {room: 1 for arrow in arrows_ for room in arrow}
    for _ in floor:
        for here, there in arrows_:
            floor[here] = max(floor[here], floor[there] + 1)
    return floor


def largest(checkout: Path, number: int = 10) -> list[tuple[int, str]]:
    """The modules with the most lines."""
    files = python_files(checkout)
    lengths = [(len((checkout / file).read_text("utf-8").splitlines()), file.as_posix()) for file in files]
    return sorted(lengths, reverse=True)[:number]


def counts(checkout: Path) -> Mapping[str, int]:
    """The numbers that can be compared between two checkouts."""
    files = python_files(checkout)
    drawn = arrows(checkout)
    sources = [(checkout / file).read_text("utf-8") for file in files]
    return {
        "rooms": len({by_folder(module_name(file), file) for file in files}),
        "floors": max(floors(drawn).values()),
        "arrows": len(drawn),
        "backward arrows": len(backward(drawn)),
        "modules": len(files),
        "lines": sum(len(source.splitlines()) for source in sources),
        "type: ignore": sum(source.count("# type: ignore") for source in sources),
    }


def main() -> None:
    """Print counts, backward arrows, the largest modules, and the arrows if asked."""
    parser = argparse.ArgumentParser(description="Rooms and the arrows between them.")
    here = Path(__file__).resolve().parents[2]
    parser.add_argument("checkout", nargs="?", type=Path, default=here, help="by default, the one this lies in")
    parser.add_argument("--arrows", action="store_true", help="each arrow, with the imports that draw it")
    asked = parser.parse_args()
    if not (asked.checkout / "entropy_fork").is_dir():
        sys.exit(f"{asked.checkout} has no folder entropy_fork: name a checkout of this project")
    for name, number in counts(asked.checkout).items():
        print(f"{number:6d}  {name}")
    drawn = arrows(asked.checkout)
    for here_, there in backward(drawn):
        print(f"backward: {here_} -> {there}")
        for line in drawn[here_, there]:
            print(f"          {line}")
    print("largest modules:")
    for number, place in largest(asked.checkout):
        print(f"{number:6d}  {place}")
    if asked.arrows:
        for (here_, there), lines in drawn.items():
            print(f"{here_} -> {there}")
            for line in lines:
                print(f"          {line}")


if __name__ == "__main__":
    main()
