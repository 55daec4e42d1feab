"""The folder of recipes and presets that this install ships."""

from __future__ import annotations

from pathlib import Path


def preset_names(group: str) -> list[str]:
    """The options of a config group that this install ships."""
    return sorted(path.stem for path in (recipes_dir() / group).glob("*.yaml"))


def recipes_dir() -> Path:
    """The folder of the shipped config groups: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed, checkout = package / "recipes", package.parent / "recipes"
    return installed if installed.is_dir() else checkout
