"""What the tests share: verl on a CPU in a subprocess, the real main_ppo, and verl's config as main_ppo composes it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from processes import PROCESSES, Processes, processes_with

if TYPE_CHECKING:
    import torch

# Before anything imports verl: the platform is resolved once in a process.
os.environ["VERL_PLATFORM"] = "cpu"

# How long an example takes says something about the machine's load, not about the code. The examples follow from each
# test's source and from hypothesis, so that a clone, CI and this folder draw the same; 'make fuzz' draws new ones.
settings.register_profile("same examples", deadline=None, derandomize=True, database=None, print_blob=True)
settings.register_profile("fuzz", deadline=None, derandomize=False, database=None, print_blob=True)
settings.load_profile("same examples")

REPOSITORY = Path(__file__).resolve().parents[1]

#: fixtures that start processes; what uses one of them, or is marked ``process``, is not in the quick tier
STARTING_PROCESSES = {
    "application", "chromium", "fused_worlds", "main_ppo", "python", "ranks", "recorded", "two_ranks", "verdicts",
    "wheel", "world", "worlds",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs other processes, so that ``make check`` can leave it out."""
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
    """The quick tier stays quick: a test that starts a process without the mark fails."""
    global _may_start_processes
    _may_start_processes = any(request.node.get_closest_marker(name) for name in ("process", "e2e", "fault"))
    yield
    _may_start_processes = True


@pytest.fixture(autouse=True)
def one_environment() -> Iterator[None]:
    """``datasets`` replaces ``os.environ`` by a copy where it maps in processes; rich goes on reading the first one."""
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
    HydraConfig.instance().cfg = None  # what 'plan' left there: here no application of Hydra's runs
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


@dataclass
class Finished:
    """A run that has ended."""

    output: str
    folder: Path

    def metric(self, name: str) -> list[float]:
        """A metric by step, as verl's console logger printed it."""
        pattern = re.compile(rf"step:[1-9]\d* - .*?{re.escape(name)}:(?:np\.\w+\()?([-\d.e+]+)")
        return [float(value) for value in pattern.findall(self.output)]

    def parameters(self, step: int) -> dict[str, torch.Tensor]:
        """The trained parameters of a checkpoint, ranks side by side."""
        shards = sorted((self.folder / "checkpoints" / f"global_step_{step}" / "actor").glob("model_*.pt"))
        assert shards, self.output[-3000:]
        import torch

        states = [torch.load(shard, weights_only=False) for shard in shards]
        local = [{name: getattr(t, "_local_tensor", t) for name, t in state.items()} for state in states]
        return {name: torch.cat([part[name].flatten() for part in local]) for name in local[0]}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's world with hardly any warm-up: random answers do for these tests."""
    folder = tmp_path_factory.mktemp("world") / "world"
    build = [sys.executable, "-m", "examples.cpu_demo.build"]
    arguments = ["--steps", "30", "--train-problems", "64", "--test-problems", "8", "--warmup-problems", "500"]
    subprocess.run([*build, "--output", str(folder), *arguments], cwd=REPOSITORY, check=True, timeout=300)
    return folder


@dataclass
class Running:
    """A run that has been started."""

    process: subprocess.Popen[bytes]
    printed: Path
    folder: Path

    @property
    def output(self) -> str:
        return self.printed.read_text(errors="replace")

    def wait(self, expect: int = 0, timeout: float = 400) -> Finished:
        self.process.wait(timeout)
        assert self.process.returncode == expect, self.output[-6000:]
        return Finished(self.output, self.folder)


class MainPPO:
    """The real main_ppo, each run in a session of its own."""

    def __init__(self, world: Path, directory: Path):
        self.world, self.directory = world, directory
        self.ray_folder = tempfile.mkdtemp(prefix="ef")  # short: Ray puts sockets there
        self.started: list[Running] = []

    def __call__(self, *overrides: str, expect: int = 0, **how: Any) -> Finished:
        """Run it to its end."""
        return self.start(*overrides, **how).wait(expect)

    def start(
        self,
        *overrides: str,
        recipe: Sequence[str] = ("+recipe=demo_cpu",),
        flags: Sequence[str] = (),
        folder: str = "run",
        program: Sequence[str] = ("-m", "verl.trainer.main_ppo"),
        **environment: str,
    ) -> Running:
        """Start it, and go on."""
        directory = self.directory / folder
        directory.mkdir(exist_ok=True)
        arguments = [
            sys.executable, *program, *flags, *recipe, f"demo.dir={self.world}",
            "data.train_batch_size=8", "data.max_response_length=24", "actor_rollout_ref.rollout.n=4",
            "actor_rollout_ref.actor.ppo_mini_batch_size=4", "algorithm.filter_groups.enable=false",
            "reward.reward_kwargs.overlong_buffer_cfg.len=8", "trainer.total_training_steps=1",
            "trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.save_freq=1", "trainer.logger=[console]",
            f"trainer.default_local_dir={directory}/checkpoints", f"hydra.run.dir={directory}/hydra", *overrides,
        ]  # fmt: skip
        printed = directory / f"output-{len(self.started)}.txt"
        with open(printed, "wb") as output:
            process = subprocess.Popen(
                arguments,
                cwd=directory,
                env={
                    **os.environ,
                    "PYTHONWARNINGS": "ignore",
                    "VERL_PLATFORM": "cpu",
                    "RAY_TMPDIR": self.ray_folder,
                    **environment,
                },
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(Running(process, printed, directory))
        return self.started[-1]

    def processes(self) -> list[int]:
        """All processes of all runs, Ray's and the workers included, that are there now."""
        return processes_with("RAY_TMPDIR", self.ray_folder)

    def close(self) -> None:
        """End what is left of the runs."""
        for run in self.started:
            with suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()
        while left := self.processes():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        shutil.rmtree(self.ray_folder, ignore_errors=True)


@pytest.fixture
def main_ppo(world: Path, tmp_path: Path) -> Iterator[MainPPO]:
    """Runs main_ppo; whatever it started is ended with the test."""
    runs = MainPPO(world, tmp_path)
    yield runs
    runs.close()


#: All tokens of a step in one pool: verl deals the answers to the ranks before it cuts mini-batches, so of several
#: mini-batches each has other members on another number of ranks. And all of them written down.
ONE_POOL = (
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "entropy_fork.dump_every=1",
    "entropy_fork.dump_answers=32",
)


@dataclass
class Recorded:
    """Four steps on one rank whose answers were recorded, and the settings that replay them."""

    run: Finished
    replay: tuple[str, ...]


@pytest.fixture(scope="session")
def recorded(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """One run for all tests that replay.

    Runs that are to be compared bit for bit all replay, because verl lays out recorded answers in the order of the
    record and new ones as they come.
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
