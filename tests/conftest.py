"""The fixtures that tests share: ranks, verl on a CPU in a subprocess, the real main_ppo, and verl's config."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.main_ppo import ONE_POOL, MainPPO, Recorded
from helpers.places import REPOSITORY
from helpers.processes import PROCESSES, Processes
from hypothesis import settings

# Set this before anything imports verl, because verl chooses the platform once per process.
os.environ["VERL_PLATFORM"] = "cpu"

# No deadline: the time of an example depends on the machine's load, not on the code. The examples follow from the
# test's source and from hypothesis, so that a clone, CI and this folder draw the same. 'make fuzz' draws new ones.
settings.register_profile("same examples", deadline=None, derandomize=True, database=None, print_blob=True)
settings.register_profile("fuzz", deadline=None, derandomize=False, database=None, print_blob=True)
settings.load_profile("same examples")

#: fixtures that start processes. A test that uses one of them, or has the mark ``process``, is not in the quick tier.
STARTING_PROCESSES = {
    "application", "chromium", "fused_worlds", "main_ppo", "python", "ranks", "recorded", "two_ranks", "verdicts",
    "wheel", "world", "worlds",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need other processes, so that ``make check`` can leave them out."""
    for item in items:
        if STARTING_PROCESSES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.process)


_may_start_processes = True


def _refuse_processes(event: str, _: object) -> None:
    if not _may_start_processes and event in ("subprocess.Popen", "os.fork", "os.posix_spawn", PROCESSES):
        raise AssertionError("this test starts a process: mark it with pytest.mark.process")


sys.addaudithook(_refuse_processes)


@pytest.fixture(autouse=True)
def processes_only_where_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keep the quick tier quick: a test that starts a process without the mark fails."""
    global _may_start_processes
    _may_start_processes = any(request.node.get_closest_marker(name) for name in ("process", "e2e", "fault"))
    yield
    _may_start_processes = True


@pytest.fixture(autouse=True)
def one_environment() -> Iterator[None]:
    """Keep one ``os.environ``. ``datasets`` sometimes replaces it by a copy, and rich would still read the old one."""
    environment = os.environ
    yield
    os.environ = environment  # noqa: B003


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
    from hydra.core.hydra_config import HydraConfig

    config_dir = str(Path(main_ppo.__file__).parent / "config")
    HydraConfig.instance().cfg = None  # 'plan' may have set it, but no application of Hydra runs here
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


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's world with almost no warm-up: random answers are good enough for these tests."""
    folder = tmp_path_factory.mktemp("world") / "world"
    build = [sys.executable, "-m", "examples.cpu_demo.build"]
    arguments = ["--steps", "30", "--train-problems", "64", "--test-problems", "8", "--warmup-problems", "500"]
    subprocess.run([*build, "--output", str(folder), *arguments], cwd=REPOSITORY, check=True, timeout=300)
    return folder


@pytest.fixture
def main_ppo(world: Path, tmp_path: Path) -> Iterator[MainPPO]:
    """Runs main_ppo. All processes that it started are ended with the test."""
    runs = MainPPO(world, tmp_path)
    yield runs
    runs.close()


@pytest.fixture(scope="session")
def recorded(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """One run for all tests that replay.

    Tests that compare runs bit for bit replay recorded answers in all of them. verl lays out recorded answers in the
    order of the record, but new answers in the order of their arrival.
    """
    directory = tmp_path_factory.mktemp("recorded")
    dump = f"skip.rollout_tq.dump_dir={directory}/answers"
    replay = ("skip.rollout_tq.enable=true", dump, "skip.rollout_tq.steps=[1,2,3,4]")
    runs = MainPPO(world, directory)
    try:
        run = runs(*replay, *ONE_POOL, "trainer.total_training_steps=4", "trainer.max_actor_ckpt_to_keep=4")
    finally:
        runs.close()
    return Recorded(run, replay)
