"""A fork server for Ray's workers on a CPU: verl is imported once per run instead of once per worker.

Hook: Ray's ``runtime_env["py_executable"]``, the command with which Ray starts its workers. Neither verl nor Ray has a
hook between the config and ``ray.init``, so ``ray.init`` itself is wrapped, in the launcher only. Right before Ray
starts, the launcher starts the server (``fork_server_process.py``), which imports verl while Ray starts. The launcher
tells Ray to start each worker with ``worker_shim.py``. This program asks the server for a forked worker, and stands in
for the worker.

The server works only with a Ray that the run itself starts, on a machine without an accelerator
(``VERL_PLATFORM=cpu``). A process that has used a GPU cannot be forked, and on a cluster Ray's workers start on other
machines. ``cpu_platform.fork_server`` switches it on and off. See docs/guide/cpu.md.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread, main_thread
from typing import Any

import wrapt
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from entropy_fork.common.cores import waiting_passively
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.sweep import ray_cluster
from entropy_fork.verl.cpu import worker_shim

log = logging.getLogger(__name__)

NODE = "cpu_platform"
KEY = f"{NODE}.fork_server"

#: seconds that the run has to end by itself when there can be no more workers
GRACE_SECONDS = 20.0

#: the modules that take most of the time of importing verl and do not import Ray. Imported while Ray starts.
MODULES = (
    "torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "tensordict", "transformers",
    "datasets", "peft", "torchdata.stateful_dataloader", "pandas", "hydra", "fastapi", "uvicorn", "aiohttp", "zmq",
    "msgspec", "cachetools", "pydantic.v1",
)  # fmt: skip

#: the modules that import Ray. Imported with the first worker that Ray asks for.
WITH_RAY = (
    "ray._private.workers.default_worker", "ray._private.arrow_serialization", "verl.trainer.main_ppo",
    "verl.trainer.ppo.v1", "verl.experimental.reward_loop.reward_manager",
)  # fmt: skip

#: keys of a runtime environment that give a worker another environment than the launcher's
ELSEWHERE = ("conda", "pip", "uv", "container", "image_uri", "working_dir", "py_modules", "nsight", "rocprof-sys")


@dataclass
class CpuPlatform:
    """How a run starts on a machine without an accelerator. See docs/guide/cpu.md.

    Attributes:
        fork_server: import verl once, in a process from which Ray's workers are forked, instead of in each worker.
    """

    fork_server: bool = True


def register_schema() -> None:
    """Register the schema with Hydra. ``+cluster=cpu`` names it, so Hydra refuses a mistyped key or a wrong type."""
    ConfigStore.instance().store(group=NODE, name="schema", node=CpuPlatform, provider="entropy-fork")


def is_asked_for(config: DictConfig) -> bool:
    """Whether the config switches the fork server on. A config without the node does not.

    Raises:
        EntropyForkError: a value that is neither true nor false.
    """
    value = OmegaConf.select(config, KEY, default=False)
    if not isinstance(value, bool):
        raise EntropyForkError(f"{KEY} must be True or False, got {value!r}")
    return value


def check_opted_in(config: DictConfig) -> None:
    """Refuse the fork server if the environment does not say that this machine has no accelerator.

    Raises:
        EntropyForkError: with what to put into the environment.
    """
    if is_asked_for(config):
        raise EntropyForkError(
            f"{KEY}=True (as in +cluster=cpu) is for machines without an accelerator. On such a machine, set the "
            f"environment variable: VERL_PLATFORM=cpu python -m …; or write {KEY}=False"
        )


class ForkServer:
    """The server of one run, as the launcher sees it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.socket = folder / "socket"
        self.log = folder / "log"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(os.fspath(self.socket))
        self.listener.listen(128)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def py_executable(self) -> str:
        """The command with which Ray starts a worker, quoted for a shell."""
        return shlex.join([sys.executable, "-S", "-E", worker_shim.__file__, os.fspath(self.socket)])

    def start(
        self,
        environment: Mapping[str, str],
        modules: tuple[str, ...] = MODULES,
        with_ray: tuple[str, ...] = WITH_RAY,
    ) -> None:
        """Start the server's process. Requests wait until it has imported the modules.

        Args:
            environment: the environment variables that all workers share, as far as they are known before Ray starts.
            modules: the modules to import at once.
            with_ray: the modules to import with the first request.
        """
        settings = {
            "listener": self.listener.fileno(),
            "launcher": os.getpid(),
            "folder": os.fspath(self.folder),
            "path": sys.path,
            "modules": modules,
            "with_ray": with_ray,
        }
        program = Path(__file__).with_name("fork_server_process.py")
        flags = [flag for flag, is_set in (("-s", sys.flags.no_user_site), ("-S", sys.flags.no_site)) if is_set]
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *flags, os.fspath(program), json.dumps(settings)],
                # One thread while importing: OpenMP's and BLAS's threads do not survive a fork.
                env={**environment, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[self.listener.fileno()],
            )
        atexit.register(self._tidy)
        Thread(target=self._watch, args=(self.process,), name="fork server", daemon=True).start()

    def _tidy(self) -> None:
        """At the launcher's end, remove the folder if the server has died. A running server removes it itself."""
        if self.process is None or self.process.poll() is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """If the server ends before the launcher, let the run go on until Ray asks for another worker, then stop it.

        The launcher has the server's listening socket too, so it can answer a request for a worker.
        """
        code = process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        connection, _ = self.listener.accept()
        with suppress(OSError):
            connection.sendall(worker_shim.ANSWER.pack(worker_shim.REFUSED, 0))
        connection.close()
        said = self.log.read_text(errors="replace").strip().splitlines()[-10:] if self.log.exists() else []
        print(
            f"EntropyForkError: the fork server of Ray's workers (pid {process.pid}) {how}. Ray cannot start another "
            f"worker, so the run stops. Start it again; {KEY}=False does without the server."
            + "".join(f"\n  {line}" for line in said),
            file=sys.stderr,
            flush=True,
        )
        if callable(signal.getsignal(signal.SIGINT)):  # A background process may ignore it.
            sys.excepthook = lambda *_: None  # The error has been printed. Where the signal arrives says nothing.
            signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)  # As Ctrl-C: the run ends, and Ray with it.
            time.sleep(GRACE_SECONDS)
        self._tidy()
        os._exit(1)  # Ray's processes end with this one.


#: whether the ``ray.init`` of this process gets a fork server; None if this is not a run on a CPU
_chosen: bool | None = None


def choose(config: DictConfig) -> None:
    """Remember what the config says, for the ``ray.init`` that follows."""
    global _chosen
    _chosen = is_asked_for(config)


def why_not(arguments: Mapping[str, Any]) -> str | None:
    """Why a fork server cannot serve a ``ray.init`` with these arguments; None if it can."""
    runtime_env = arguments.get("runtime_env") or {}
    if sys.platform != "linux":
        return f"it needs Linux, and this is {sys.platform}"
    if runtime_env.get("py_executable"):
        return f"runtime_env.py_executable={runtime_env['py_executable']} names another program for the workers"
    if elsewhere := [name for name in ELSEWHERE if runtime_env.get(name)]:
        return f"runtime_env.{elsewhere[0]} gives the workers another environment"
    if address := ray_cluster.find_cluster(arguments):
        return f"the Ray cluster {address} was not started by this run"
    return None


def extend_ray(module: Any) -> None:
    """Wrap ``ray.init``."""

    @wrapt.decorator
    def with_fork_server(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        if _chosen is None:
            return wrapped(*args, **kwargs)
        runtime_env = dict(kwargs.get("runtime_env") or {})
        variables = runtime_env.get("env_vars") or {}
        variables = {**waiting_passively({**os.environ, **variables}), **variables}
        runtime_env["env_vars"] = variables
        reason = why_not({**({"address": args[0]} if args else {}), **kwargs}) if _chosen else None
        if reason is not None:
            log.warning(f"{KEY}: the workers start without a fork server, since {reason}")
        elif _chosen:
            server = ForkServer(make_folder(kwargs))
            server.start({**os.environ, **variables})
            runtime_env["py_executable"] = server.py_executable
        return wrapped(*args, **{**kwargs, "runtime_env": runtime_env})

    module.init = with_fork_server(module.init)


def make_folder(ray_init: Mapping[str, Any]) -> Path:
    """Make a folder that only this user may enter. It is beside Ray's sockets, whose paths are longer than ours."""
    from ray._common.utils import get_default_ray_temp_dir

    parent = Path(ray_init.get("_temp_dir") or get_default_ray_temp_dir())
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="fork-server-", dir=parent))
