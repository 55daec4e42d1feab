"""What the tests share: a subprocess with verl on a CPU, and verl's config as main_ppo composes it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from processes import Processes

# Before anything imports verl: the platform is resolved once in a process.
os.environ["VERL_PLATFORM"] = "cpu"

# How long an example takes says something about the machine's load, not about the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def worlds() -> Iterator[dict[int, Processes]]:
    """1, 2 and 4 real ranks."""
    worlds = {size: Processes(size) for size in (1, 2, 4)}
    yield worlds
    for world in worlds.values():
        world.close()


@pytest.fixture
def compose() -> Iterator[Callable[..., object]]:
    """Compose verl's config with overrides, on the search path that main_ppo has."""
    import verl.trainer.main_ppo as main_ppo
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    config_dir = str(Path(main_ppo.__file__).parent / "config")
    with initialize_config_dir(config_dir, version_base=None):
        yield lambda *overrides: hydra_compose("ppo_trainer", overrides=list(overrides))


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run this interpreter in an unrelated directory with verl's platform set to the CPU."""

    def run(*arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
