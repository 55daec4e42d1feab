"""The wheel by itself: the recipes are inside, and main_ppo finds them from an unrelated directory."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    arguments = ["wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(REPOSITORY)]
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, timeout=300)
    return next(folder.glob("entropy_fork-*.whl"))


def test_the_wheel_holds_the_recipes_and_nothing_that_is_not_ours(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    recipes = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "recipes").rglob("*.yaml")}
    assert {f"entropy_fork/{recipe}" for recipe in recipes} <= set(names)
    assert {name.split("/")[0].removesuffix(".dist-info").split("-")[0] for name in names} == {
        "entropy_fork",
        "hydra_plugins",
    }
    # with an __init__ of its own Hydra's namespace package would hide everybody else's plugins
    assert "hydra_plugins/__init__.py" not in names


def test_main_ppo_finds_the_recipes_of_the_installed_wheel(
    wheel: Path, tmp_path: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    target = tmp_path / "site"
    arguments = ["install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, timeout=300)
    main_ppo = ("-m", "verl.trainer.main_ppo")
    paths = python(*main_ppo, "--info", "searchpath", PYTHONPATH=str(target))
    assert f"file://{target}/entropy_fork/recipes" in paths.stdout, paths.stderr[-3000:]
    config = python(*main_ppo, "--cfg", "job", "+recipe=demo_cpu", "entropy_fork=off", PYTHONPATH=str(target))
    assert config.returncode == 0, config.stderr[-3000:]
    assert "entropy_fork:\n  enabled: false\n" in config.stdout
    assert "clip_ratio_high: 0.28" in config.stdout
