"""The wheel alone: the recipes are inside, and main_ppo finds them from an unrelated directory."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


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
    assert "entropy_fork/preflight/model_shapes/qwen3-14b.json" in names
    assert {f"entropy_fork/report/{name}" for name in ("template.html", "page.css", "page.js")} <= set(names)
    assert {name.split("/")[0].removesuffix(".dist-info").split("-")[0] for name in names} == {
        "entropy_fork",
        "hydra_plugins",
    }
    # an __init__ in Hydra's namespace package would hide the plugins of all other packages
    assert "hydra_plugins/__init__.py" not in names


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed alone in a folder. verl and the other packages are the environment's."""
    target = tmp_path_factory.mktemp("site")
    arguments = ["install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, timeout=300)
    return target


def test_main_ppo_finds_the_recipes_of_the_installed_wheel(
    site: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    main_ppo = ("-m", "verl.trainer.main_ppo")
    paths = python(*main_ppo, "--info", "searchpath", PYTHONPATH=str(site))
    assert f"file://{site}/entropy_fork/recipes" in paths.stdout, paths.stderr[-3000:]
    recipe = ("+recipe=qwen3_32b_29k", "+cluster=paper_16x8", "entropy_fork=off")
    config = python(*main_ppo, *recipe, "--cfg", "job", "--resolve", PYTHONPATH=str(site))
    assert config.returncode == 0, config.stderr[-3000:]
    assert "entropy_fork:\n  enabled: false\n" in config.stdout
    assert "clip_ratio_high: 0.28" in config.stdout
    assert "experiment_name: qwen3_32b_29k-off\n" in config.stdout


def test_every_recipe_composes_with_every_preset_from_the_installed_wheel(
    site: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Does what ``--cfg job --resolve`` does, in one process, with the recipes in the wheel, not in this checkout."""
    run = python("-c", COMPOSE_ALL, PYTHONPATH=str(site))
    assert run.returncode == 0, run.stderr[-3000:]
    names = json.loads(run.stdout.splitlines()[-1])
    assert len(names) == 6 * 5
    assert len(set(names.values())) == 30, "two runs would share their checkpoints"
    assert names["qwen3_8b_20k official"] == "qwen3_8b_20k-top0.2-current-micro_batch"
    assert names["qwen3_32b_29k bottom80"] == "qwen3_32b_29k-bottom0.8"


COMPOSE_ALL = """
import json
from pathlib import Path

import entropy_fork
import verl.trainer.main_ppo as main_ppo
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from entropy_fork.common.asked_for import preset_names, recipes_dir

assert recipes_dir() == Path(entropy_fork.__file__).parent / "recipes", recipes_dir()
names = {}
with initialize_config_dir(str(Path(main_ppo.__file__).parent / "config"), version_base=None):
    for recipe in (name for name in preset_names("recipe") if name.startswith("qwen3_")):
        for preset in ("official", "global", "off", "bottom80", "random20"):
            overrides = [f"+recipe={recipe}", "+cluster=paper_16x8", f"entropy_fork={preset}"]
            config = OmegaConf.to_container(compose("ppo_trainer", overrides), resolve=True)
            names[f"{recipe} {preset}"] = config["trainer"]["experiment_name"]
print(json.dumps(names))
"""
