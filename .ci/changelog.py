"""Move the entries of ``changes/`` into CHANGELOG.md: ``make changelog``, or ``make changelog VERSION=0.2.0``.

An entry is a file ``changes/NAME.KIND.md`` with list items. It goes to the end of its kind's section below
``[Unreleased]``, and the file is deleted. A version gives that section its name and the day's date.
"""

from __future__ import annotations

import argparse
import re
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("added", "changed", "deprecated", "removed", "fixed", "security")
UNRELEASED = "## [Unreleased]\n"


def entries(folder: Path) -> dict[Path, str]:
    """The text of each entry, in the order of the files' names.

    Raises:
        SystemExit: the name or the text of a file is not that of an entry.
    """
    found = {}
    for file in sorted(folder.iterdir()):
        if file.name == "README.md":
            continue
        text = file.read_text(encoding="utf-8").strip() + "\n"
        if not re.fullmatch(rf"[\w-]+\.({'|'.join(KINDS)})\.md", file.name):
            raise SystemExit(f"{file}: name it NAME.KIND.md, where KIND is one of {', '.join(KINDS)}")
        fits = all(line.startswith(("- ", "  ")) and len(line) <= 120 for line in text.splitlines())
        if not fits or not text.startswith("- "):
            raise SystemExit(f"{file}: write list items: '- ', further lines indented by two, 120 characters at most")
        found[file] = text
    return found


def joined(changelog: str, added: dict[Path, str], version: str = "", day: str = "") -> str:
    """The changelog with these entries. With a version, the section gets the version as its name.

    Raises:
        SystemExit: the changelog has no section ``[Unreleased]``.
    """
    before, heading, rest = changelog.partition(UNRELEASED)
    if not heading:
        raise SystemExit(f"CHANGELOG.md: write the heading {UNRELEASED.strip()!r} above the versions")
    unreleased, next_version, older = rest.partition("\n## [")
    introduction, *sections = re.split(r"^### (\w+)\n", unreleased, flags=re.MULTILINE)
    texts = {kind.lower(): text.strip("\n") for kind, text in zip(sections[::2], sections[1::2], strict=True)}
    for file, text in added.items():
        kind = file.name.split(".")[-2]
        texts[kind] = "\n".join(filter(None, [texts.get(kind), text.strip("\n")]))
    body = "".join(f"\n### {kind.capitalize()}\n\n{texts[kind]}\n" for kind in KINDS if kind in texts)
    title = f"{UNRELEASED}\n## [{version}] - {day}\n" if version else UNRELEASED
    return before + title + introduction.rstrip("\n") + body + next_version + older


def main() -> None:
    """Write the entries into the changelog, then delete their files."""
    parser = argparse.ArgumentParser(description="Move the entries of changes/ into CHANGELOG.md.")
    parser.add_argument("--version", default="", help="give the section this version and the day's date")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of CHANGELOG.md and changes/")
    options = parser.parse_args()
    added, changelog = entries(options.root / "changes"), options.root / "CHANGELOG.md"
    text = joined(changelog.read_text(encoding="utf-8"), added, options.version, f"{date.today():%Y-%m-%d}")
    changelog.write_text(text, encoding="utf-8")
    for file in added:
        file.unlink()
    print(f"{changelog}: {len(added)} new entries{f', version {options.version}' * bool(options.version)}")


if __name__ == "__main__":
    main()
