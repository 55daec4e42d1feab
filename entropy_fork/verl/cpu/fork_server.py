"""A fork server for Ray's workers on a CPU: verl is imported once per run instead of once per worker.

Hook: Ray's ``runtime_env["py_executable"]``, what Ray starts its workers with. Neither verl nor Ray has a hook between
the config and ``ray.init``, so ``ray.init`` itself is wrapped, in the launcher alone: right before Ray starts, the
launcher starts the server (``fork_server_process.py``), which imports verl while Ray starts, and names
``worker_shim.py`` as the workers' Python. That asks the server for a forked worker and stands in for it.

Only for a Ray that the run starts itself on a machine without an accelerator (``VERL_PLATFORM=cpu``): a process that
has touched a GPU cannot be forked, and on a cluster Ray's workers start on other machines. ``cpu_platform.fork_server``
switches it on and off. See docs/guide/cpu.md.
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

#: for the run to end by itself when there can be no more workers
GRACE_SECONDS = 20.0

#: what most of the time of importing verl goes to, and does not import Ray: while Ray starts
MODULES = (
    "torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "tensordict", "transformers",
    "datasets", "peft", "torchdata.stateful_dataloader", "pandas", "hydra", "fastapi", "uvicorn", "aiohttp", "zmq",
    "msgspec", "cachetools", "pydantic.v1",
)  # fmt: skip

#: with the first worker that Ray asks for
WITH_RAY = (
    "ray._private.workers.default_worker", "ray._private.arrow_serialization", "verl.trainer.main_ppo",
    "verl.trainer.ppo.v1", "verl.experimental.reward_loop.reward_manager",
)  # fmt: skip

#: parts of a runtime environment with which a worker does not run in the launcher's environment
ELSEWHERE = ("conda", "pip", "uv", "container", "image_uri", "working_dir", "py_modules", "nsight", "rocprof-sys")


@dataclass
class CpuPlatform:
    """How a run on a machine without an accelerator is started. See docs/guide/cpu.md.

    Attributes:
        fork_server: import verl once, in a process from which Ray's workers are forked, and not in each of them.
    """

    fork_server: bool = True


def register_schema() -> None:
    """Let ``+cluster=cpu`` name the schema, so that Hydra itself refuses a mistyped key or type."""
    ConfigStore.instance().store(group=NODE, name="schema", node=CpuPlatform, provider="entropy-fork")


def is_asked_for(config: DictConfig) -> bool:
    """Whether the config switches the fork server on. Without the node it does not.

    Raises:
        EntropyForkError: a value that is neither true nor false.
    """
    value = OmegaConf.select(config, KEY, default=False)
    if not isinstance(value, bool):
        raise EntropyForkError(f"{KEY} must be True or False, got {value!r}")
    return value


def check_opted_in(config: DictConfig) -> None:
    """Refuse the fork server where nobody said that this is a machine without an accelerator.

    Raises:
        EntropyForkError: with what to put into the environment.
    """
    if is_asked_for(config):
        raise EntropyForkError(
            f"{KEY}=True (as in +cluster=cpu) is for machines without an accelerator, and those are opted into by the "
            f"environment: VERL_PLATFORM=cpu python -m …; or write {KEY}=False"
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
        """What Ray starts a worker with, as a shell reads it."""
        return shlex.join([sys.executable, "-S", "-E", worker_shim.__file__, os.fspath(self.socket)])

    def start(
        self,
        environment: Mapping[str, str],
        modules: tuple[str, ...] = MODULES,
        with_ray: tuple[str, ...] = WITH_RAY,
    ) -> None:
        """Start the server's process, which answers when it has imported the modules. Requests wait until then.

        Args:
            environment: of the workers, as far as it is the same in all of them and known before Ray starts.
            modules: to import at once.
            with_ray: to import with the first request.
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
        """At the launcher's end: remove the folder where the server has died. A living one does it itself."""
        if self.process is None or self.process.poll() is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Should the server end before the launcher: let the run go on until Ray wants another worker, then stop it.

        The server's listening socket is the launcher's too. So whoever asks for a worker now is answered here.
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


#: whether this process's ``ray.init`` is to have a fork server; None where it is not of a run on a CPU
_chosen: bool | None = None


def choose(config: DictConfig) -> None:
    """Note for the ``ray.init`` that follows what the config says."""
    global _chosen
    _chosen = is_asked_for(config)


def why_not(arguments: Mapping[str, Any]) -> str | None:
    """Why a fork server cannot serve a ``ray.init`` with these arguments, or None where it can."""
    runtime_env = arguments.get("runtime_env") or {}
    if sys.platform != "linux":
        return f"it needs Linux, and this is {sys.platform}"
    if runtime_env.get("py_executable"):
        return f"runtime_env.py_executable={runtime_env['py_executable']} is something else"
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
    """A new folder that only this user may enter, where Ray puts its own sockets, whose paths are longer than ours."""
    from ray._common.utils import get_default_ray_temp_dir

    parent = Path(ray_init.get("_temp_dir") or get_default_ray_temp_dir())
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="fork-server-", dir=parent))
