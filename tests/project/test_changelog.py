"""The entries in changes/ are well formed, and moving them into the changelog loses no text."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / ".ci" / "changelog.py"
CHANGELOG = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")

changelog = runpy.run_path(str(SCRIPT))
entries, joined = changelog["entries"], changelog["joined"]


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_the_entries_of_this_repository_can_be_joined() -> None:
    ours = entries(REPOSITORY / "changes")
    text = joined(CHANGELOG, ours)
    assert joined(CHANGELOG, {}) == CHANGELOG, "nothing to add changes nothing"
    for entry in ours.values():
        assert entry in text
    lines = iter(text.splitlines())
    assert all(line in lines for line in CHANGELOG.splitlines()), "every line is still there, in its order"


def test_an_entry_comes_last_in_its_section_and_a_new_section_in_its_order(tmp_path: Path) -> None:
    folder = write(tmp_path / "changes", "a.fixed.md", "- Mended a.\n")
    write(folder, "b.removed.md", "- Took b away,\n  and c.\n")
    write(folder, "README.md", "How to write one.\n")
    before = (
        "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- x\n\n### Fixed\n\n- y\n\n## [0.1.0] - 2026-01-01\n\n- z\n"
    )
    assert joined(before, entries(folder)) == (
        "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- x\n\n### Removed\n\n- Took b away,\n  and c.\n\n### Fixed\n\n"
        "- y\n- Mended a.\n\n## [0.1.0] - 2026-01-01\n\n- z\n"
    )


def test_a_release_leaves_an_empty_section_for_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "changes", "a.added.md", "- New a.\n")
    file = tmp_path / "CHANGELOG.md"
    file.write_text("# Changelog\n\n## [Unreleased]\n\n### Added\n\n- x\n", encoding="utf-8")
    for version, section in (("0.2.0", "\n### Added\n\n- x\n- New a.\n"), ("0.3.0", "\n### Fixed\n\n- Mended b.\n")):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--root", str(tmp_path), "--version", version])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        assert f"1 new entries, version {version}" in capsys.readouterr().out
        assert re.search(
            rf"## \[Unreleased\]\n\n## \[{version}\] - \d{{4}}-\d\d-\d\d\n{re.escape(section)}", file.read_text()
        )
        assert not list(folder.iterdir()), "the entries are in the changelog now"
        write(folder, "b.fixed.md", "- Mended b.\n")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.md", "- New a.\n", "name it NAME.KIND.md"),
        ("a.feature.md", "- New a.\n", "KIND is one of added, changed"),
        ("a.added.md", "New a.\n", "write list items"),
        ("a.added.md", "  New a.\n", "write list items"),
        ("a.added.md", "", "write list items"),
        ("a.added.md", "- " + "a" * 119 + "\n", "120 characters at most"),
    ],
)
def test_what_is_no_entry_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        entries(write(tmp_path / "changes", name, text))


def test_a_changelog_without_its_heading_is_refused() -> None:
    with pytest.raises(SystemExit, match="write the heading"):
        joined("# Changelog\n", {})
