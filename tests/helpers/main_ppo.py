"""Start the real main_ppo, wait for it, and read its results, also what ``spy.py`` recorded."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_fork.common.processes import processes_with
from entropy_fork.watch.follow import BEGIN, ELSEWHERE, OUTPUT
from helpers.places import PYTHONPATH

if TYPE_CHECKING:
    import torch


@dataclass
class Finished:
    """A run that has ended."""

    output: str
    folder: Path

    def metric(self, name: str) -> list[float]:
        """The values of a metric, one per step, from the output of verl's console logger."""
        pattern = re.compile(rf"step:[1-9]\d* - .*?{re.escape(name)}:(?:np\.\w+\()?([-\d.e+]+)")
        return [float(value) for value in pattern.findall(self.output)]

    def parameters(self, step: int) -> dict[str, torch.Tensor]:
        """The trained parameters of a checkpoint, of all ranks."""
        shards = sorted((self.folder / "checkpoints" / f"global_step_{step}" / "actor").glob("model_*.pt"))
        assert shards, self.output[-3000:]
        import torch

        states = [torch.load(shard, weights_only=False) for shard in shards]
        local = [{name: getattr(t, "_local_tensor", t) for name, t in state.items()} for state in states]
        return {name: torch.cat([part[name].flatten() for part in local]) for name in local[0]}


@dataclass
class Running:
    """A run that has been started."""

    process: subprocess.Popen[bytes]
    printed: Path
    folder: Path

    @property
    def output(self) -> str:
        """What it printed, and what verl printed into the file of the run; of several runs in a folder the last."""
        text, log = self.printed.read_text(errors="replace"), self.folder / "checkpoints" / OUTPUT
        if ELSEWHERE not in text or not log.is_file():
            return text
        return text + log.read_text(errors="replace").rpartition(BEGIN)[2]

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
        """Start it, and return without waiting."""
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
        """The pids of all running processes of all runs, with Ray's and the workers'."""
        return processes_with("RAY_TMPDIR", self.ray_folder)

    def close(self) -> None:
        """End all processes of the runs."""
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


#: All tokens of a step are one pool, and all are dumped. There is one mini-batch, because verl deals the answers to the
#: ranks before it cuts mini-batches: with several, the number of ranks would change which answers share one.
ONE_POOL = (
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "entropy_fork.dump_every=1",
    "entropy_fork.dump_answers=32",
)


@dataclass
class Recorded:
    """A run of four steps on one rank with recorded answers, and the settings that replay these answers."""

    run: Finished
    replay: tuple[str, ...]


def spy_environment(folder: Path) -> dict[str, str]:
    """The environment variables with which the processes of a run record in a folder what they see."""
    folder.mkdir()
    modules = ",".join(filter(None, (os.environ.get("VERL_USE_EXTERNAL_MODULES"), "helpers.spy")))
    return {"VERL_USE_EXTERNAL_MODULES": modules, "PYTHONPATH": PYTHONPATH, "ENTROPY_FORK_SPY": str(folder)}


def load(folder: Path, kind: str) -> list[dict[str, torch.Tensor]]:
    """All records of one kind."""
    import torch

    return [torch.load(file) for file in sorted(folder.glob(f"{kind}-*.pt"))]
