"""The command that installs an extra names the place that the package came from, not an index without the package."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from entropy_fork.common import installing
from entropy_fork.common.installing import install_command, why_missing

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def installed_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An installed entropy-fork, first on the path, with pip's record of its origin."""

    def install(origin: dict[str, Any] | None) -> None:
        folder = tmp_path / "site" / "entropy_fork-0.0.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: entropy-fork\nVersion: 0.0.0\n")
        if origin is not None:
            (folder / "direct_url.json").write_text(json.dumps(origin))
        monkeypatch.setattr(sys, "path", [str(folder.parent), *sys.path])

    return install


@pytest.mark.parametrize("editable", [True, False])
def test_from_the_folder_of_a_clone(installed_from: Any, tmp_path: Path, editable: bool) -> None:
    clone = tmp_path / "my clone"
    clone.mkdir()
    installed_from({"url": clone.as_uri(), "dir_info": {"editable": editable} if editable else {}})
    words = shlex.split(install_command("analysis"))
    assert words == ["pip", "install", *(["-e"] if editable else []), f"{clone}[analysis]"]
    assert shlex.split(install_command())[-1] == str(clone)


def test_from_a_clone_that_is_gone(installed_from: Any, tmp_path: Path) -> None:
    installed_from({"url": (tmp_path / "gone").as_uri(), "dir_info": {"editable": True}})
    assert install_command("cpu") == "pip install '.[cpu]' (in the folder of a clone of entropy-fork)"


def test_from_a_repository(installed_from: Any) -> None:
    git = {"vcs": "git", "commit_id": COMMIT, "requested_revision": "main"}
    installed_from({"url": "https://example.org/entropy-fork.git", "vcs_info": git})
    wanted = "entropy-fork[cpu-vllm] @ git+https://example.org/entropy-fork.git@main"
    assert shlex.split(install_command("cpu-vllm")) == ["pip", "install", wanted]


def test_from_a_wheel(installed_from: Any) -> None:
    url = "file:///wheels/entropy_fork-0.1.0-py3-none-any.whl"
    installed_from({"url": url, "archive_info": {}})
    assert shlex.split(install_command("data")) == ["pip", "install", f"entropy-fork[data] @ {url}"]


def test_from_nothing_that_pip_wrote_down(installed_from: Any) -> None:
    installed_from(None)
    assert install_command("analysis") == "pip install '.[analysis]' (in the folder of a clone of entropy-fork)"


def test_not_installed_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is only a checkout on PYTHONPATH."""
    monkeypatch.setattr(installing, "NAME", "entropy-fork-that-is-not-installed")
    assert install_command("analysis").startswith("pip install '.[analysis]' (in the folder of a clone")


def test_the_sentence_agrees_with_the_number_of_modules(installed_from: Any) -> None:
    installed_from(None)
    assert why_missing(["jinja2"], "analysis").startswith("jinja2 is not installed. Install the extra: pip install '.[")
    assert why_missing(["matplotlib", "wordcloud"], "analysis").startswith(
        "matplotlib and wordcloud are not installed."
    )
    assert why_missing(["a", "b", "c"], "data").startswith("a, b and c are not installed.")


def test_no_message_says_to_install_the_package_from_an_index() -> None:
    """The package is on no index."""
    package = Path(installing.__file__).parents[1]
    files = [*package.rglob("*.py"), *(package.parent / "hydra_plugins").rglob("*.py")]
    assert len(files) > 80
    assert [file.name for file in files if "pip install 'entropy-fork" in file.read_text("utf-8")] == []
    assert [file.name for file in files if "pip install entropy-fork" in file.read_text("utf-8")] == []
