"""The process of the fork server: it imports verl once, and forks a worker for each request. See ``fork_server.py``.

The launcher starts this file by its path, with one argument (:class:`ForkServerSettings` as JSON), in the environment
of the run's workers. A forked worker takes over from the process that asked for it (``worker_shim.py``): arguments,
environment, directory, descriptors 0 to 2, session and process group, priority, limits, signals. So the worker is as if
that process had started Python itself.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import json
import os
import resource
import runpy
import selectors
import shutil
import signal
import socket
import sys
import threading
import types
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

#: whether Python leaves a script's folder out of ``sys.path`` (PYTHONSAFEPATH, since Python 3.11)
IS_SAFE_PATH = getattr(sys.flags, "safe_path", False)

#: seconds between two checks that the launcher still runs
LOOK_SECONDS = 1.0

#: the number of Linux's ``prctl`` option: which signal a process gets when its parent ends
PR_SET_PDEATHSIG = 1

#: seconds within which a request must arrive, once its connection is open
REQUEST_SECONDS = 10.0

#: Variables that Ray sets for the workers of a run. They are not known before Ray has started. Ray's C++ core reads
#: them once, when ``ray`` is imported. So the server imports ``ray`` with the first request, in its environment.
OF_THE_RUN = frozenset({
    "RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_AUTH_MODE", "RAY_LD_PRELOAD_ON_WORKERS", "RAY_USAGE_STATS_ENABLED",
    "SPT_NOENV",
})  # fmt: skip

#: Variables that may differ from worker to worker: libraries do not read them at import, or :func:`become` applies
#: them again. If any other variable differs from the server's, the worker starts as an ordinary Python.
OF_A_WORKER = frozenset({
    # Ray's
    "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
    # verl's, of a rank
    "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RAY_LOCAL_RANK",
    "RAY_LOCAL_WORLD_SIZE", "WG_BACKEND", "WG_PREFIX",
    # a shell's
    "_", "PWD", "OLDPWD", "SHLVL",
})  # fmt: skip


@dataclass
class ForkServerSettings:
    """What the launcher tells the server.

    Attributes:
        listener: the descriptor of the listening socket.
        launcher: the launcher's pid. The server ends when the launcher has ended.
        folder: the socket's folder, which the server removes at its end.
        path: the launcher's ``sys.path``, which Ray gives its workers too.
        modules: the modules to import at once; none of them imports ``ray``. One that is not installed is left out.
        with_ray: the modules to import with the first request.
    """

    listener: int
    launcher: int
    folder: str
    path: list[str]
    modules: list[str]
    with_ray: list[str]


class Imports:
    """Imports modules, and records how they change the environment.

    Attributes:
        changes: the new value of each changed variable of ``os.environ``; None for a removed one.
    """

    def __init__(self, path: list[str]):
        self.path = path
        self.changes: dict[str, str | None] = {}
        if not IS_SAFE_PATH:
            del sys.path[0]  # this script's folder. The rest is the path of a fresh interpreter.

    def add(self, names: list[str]) -> None:
        """Import those of the modules that are installed, on the launcher's ``sys.path``."""
        fresh, before = sys.path[:], dict(os.environ)
        sys.path[:] = self.path
        gc.disable()
        for name in names:
            with suppress(ModuleNotFoundError):
                importlib.import_module(name)
            if "ray.actor" in sys.modules:
                leave_rays_generator_alone(sys.modules["ray.actor"])
        sys.path[:] = fresh
        for name in before.keys() | os.environ.keys():
            if os.environ.get(name) != before.get(name):
                self.changes[name] = os.environ.get(name)


def leave_rays_generator_alone(actor: Any) -> None:
    """Let ``@ray.remote`` draw a class's id from the operating system.

    Ray draws the id from a generator in its C++ core, which gets its seed at its first use. If that happened in this
    process, all forked workers would draw the same ids.
    """
    class_id: Any = actor.ActorClassID
    if not isinstance(class_id, types.SimpleNamespace):  # else it was done before
        actor.ActorClassID = types.SimpleNamespace(from_random=lambda: class_id(os.urandom(class_id.size())))


def end_with_launcher(settings: ForkServerSettings) -> None:
    """End as soon as the launcher has ended, even during an import: the kernel then sends SIGTERM."""

    def end(*_: object) -> None:
        if os.getppid() != settings.launcher:
            shutil.rmtree(settings.folder, ignore_errors=True)
            os._exit(0)

    signal.signal(signal.SIGTERM, end)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Server:
    """Answers requests one after another, in one thread."""

    def __init__(
        self, settings: ForkServerSettings, imports: Imports, environment: dict[str, str], shim: types.ModuleType
    ):
        self.settings, self.imports, self.environment, self.shim = settings, imports, environment, shim
        self.is_complete = False
        self.listener = socket.socket(fileno=settings.listener)
        self.workers: dict[int, socket.socket] = {}  # by pid: the connection to the process that asked for it
        self.selector = selectors.DefaultSelector()
        self.woken, self.wake = socket.socketpair()

    def serve(self) -> dict[str, Any] | None:
        """Serve until the launcher has ended, then return None. In each forked worker, return the worker's request."""
        for end in (self.woken, self.wake):
            end.setblocking(False)
        signal.set_wakeup_fd(self.wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # so that it wakes this process
        self.selector.register(self.woken, selectors.EVENT_READ)
        self.selector.register(self.listener, selectors.EVENT_READ)
        while os.getppid() == self.settings.launcher:
            for key, _ in self.selector.select(LOOK_SECONDS):
                if key.fileobj is self.woken:
                    with suppress(BlockingIOError):
                        self.woken.recv(4096)
                    self.report_ended()
                elif key.fileobj is self.listener:
                    request = self.answer(self.listener.accept()[0])
                    if request is not None:
                        return request
                else:  # A process that stood in for a worker was killed.
                    self.forget(key.data, kill=True)
        shutil.rmtree(self.settings.folder, ignore_errors=True)
        return None

    def report_ended(self) -> None:
        """For each worker that has ended, tell the process that asked for it how it ended."""
        while self.workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if pid in self.workers:
                with suppress(OSError):
                    self.workers[pid].sendall(self.shim.ANSWER.pack(self.shim.ENDED, status))
                self.forget(pid)

    def forget(self, pid: int, kill: bool = False) -> None:
        """Close the connection of a worker that has ended, or that is to be killed."""
        connection = self.workers.pop(pid)
        self.selector.unregister(connection)
        connection.close()
        if kill:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def answer(self, connection: socket.socket) -> dict[str, Any] | None:
        """Fork a worker, or say why not. Returns the request in the worker, and None in the server."""
        connection.settimeout(REQUEST_SECONDS)
        try:
            request, descriptors = self.receive(connection)
        except (OSError, ValueError) as error:
            print(f"a request did not arrive: {error!r}", flush=True)
            connection.close()
            return None
        try:
            reasons = self.differences(request)
            if not reasons:
                self.complete(request)
                if threading.active_count() > 1:  # A lock that a thread holds would stay locked in the worker.
                    reasons = [f"threads of an imported module: {threading.enumerate()}"]
            if reasons:
                print(f"ordinary start of {request['pid']}: {', '.join(reasons)}", flush=True)
                connection.sendall(self.shim.ANSWER.pack(self.shim.ORDINARY, 0))
                connection.close()
                return None
            if (pid := os.fork()) == 0:
                self.let_go()
                connection.close()
                taken, descriptors = descriptors, []
                return request | {"descriptors": taken}
            connection.settimeout(None)
            self.workers[pid] = connection
            self.selector.register(connection, selectors.EVENT_READ, pid)
            with suppress(OSError):  # if that process was killed meanwhile, the selector reports it
                connection.sendall(self.shim.ANSWER.pack(self.shim.PID, pid))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return None

    def receive(self, connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
        """Receive a request, and the descriptors that came with it.

        Raises:
            ValueError: the request did not arrive completely.
            OSError: the connection broke.
        """
        head, descriptors, *_ = socket.recv_fds(connection, self.shim.LENGTH.size, 3)
        if len(head) < self.shim.LENGTH.size:
            raise ValueError("it has no length")
        (length,) = self.shim.LENGTH.unpack(head)
        data = bytearray()
        while len(data) < length:
            if not (part := connection.recv(length - len(data))):
                raise ValueError(f"{len(data)} of {length} bytes")
            data += part
        return json.loads(data), descriptors

    def complete(self, request: dict[str, Any]) -> None:
        """At the first request, import the remaining modules in its environment."""
        if self.is_complete:
            return
        for name in OF_THE_RUN & request["environment"].keys():
            self.environment[name] = os.environ[name] = request["environment"][name]
        self.imports.add(self.settings.with_ray)
        gc.collect()
        gc.freeze()  # else the first collection in each worker would write to all shared memory, and so copy it
        self.is_complete = True

    def differences(self, request: dict[str, Any]) -> list[str]:
        """The variables that differ between this worker and the server, and that an import may have read."""
        wanted = request["environment"]
        may_differ = OF_A_WORKER if self.is_complete else OF_A_WORKER | OF_THE_RUN
        reasons = sorted(
            name
            for name in (self.environment.keys() | wanted.keys()) - may_differ
            if self.environment.get(name) != wanted.get(name)
        )
        if not wanted.get("RAY_JOB_ID"):  # one of Ray's own processes, or one that waits for a job
            reasons.append("no job")
        return reasons

    def let_go(self) -> None:
        """In a worker, let go of everything that belongs to the server."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        self.selector.close()
        for connection in (self.woken, self.wake, self.listener, *self.workers.values()):
            connection.close()


def become(request: dict[str, Any], changes: dict[str, str | None], shim: types.ModuleType) -> str:
    """Take over what the process that asked would have passed to its child. Returns the path of the program to run.

    Args:
        request: what ``worker_shim.py`` sent.
        changes: :attr:`Imports.changes`.
        shim: the module ``worker_shim``.
    """
    with suppress(OSError):  # the group may belong to another session
        if request["session"] == request["pid"]:
            os.setsid()
        elif request["group"] == request["pid"]:
            os.setpgid(0, 0)
        else:
            os.setpgid(0, request["group"])
    for target, descriptor in enumerate(request["descriptors"]):
        os.dup2(descriptor, target)
    for descriptor in request["descriptors"]:
        os.close(descriptor)
    os.chdir(request["directory"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for name, value in changes.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    with suppress(OSError):  # a process may always lower its priority, but not raise it
        os.setpriority(os.PRIO_PROCESS, 0, request["nice"])
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(request["oom_score_adj"]))
    for number, soft, hard in request["limits"]:
        with suppress(OSError, ValueError):
            resource.setrlimit(number, (soft, hard))
    for number in shim.PASSED_ON:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else default)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    flags = [argument for argument in request["arguments"][:1] if argument in ("-s", "-S")]
    sys.argv = request["arguments"][len(flags) :]
    sys.orig_argv = [sys.executable, *request["arguments"]]
    if not IS_SAFE_PATH:
        sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    gc.enable()
    refresh_libraries()
    return sys.argv[0]


def refresh_libraries() -> None:
    """Set again what libraries read from the environment, or drew at random, while the server imported them."""
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()
        threads = os.environ.get("OMP_NUM_THREADS", "")
        torch.set_num_threads(int(threads) if threads.isdigit() and int(threads) > 0 else len(os.sched_getaffinity(0)))


def load_shim() -> types.ModuleType:
    """Import ``worker_shim.py``, which is beside this file, by its path. Its package's name would import verl too."""
    file = os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker_shim.py")
    spec = importlib.util.spec_from_file_location("worker_shim", file)
    assert spec is not None
    assert spec.loader is not None
    shim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shim)
    return shim


def main() -> None:
    """Import the modules and serve. In a forked worker, run the worker's program."""
    settings = ForkServerSettings(**json.loads(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the launcher. It ends the run, and then this ends.
    end_with_launcher(settings)
    shim = load_shim()
    environment = dict(os.environ)
    imports = Imports(settings.path)
    imports.add(settings.modules)
    request = Server(settings, imports, environment, shim).serve()
    if request is not None:
        runpy.run_path(become(request, imports.changes, shim), run_name="__main__")


if __name__ == "__main__":
    main()
