"""The fork server for Ray's workers: a forked worker is like one that Python started. These tests need no Ray."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.errors import HydraException
from verl.utils.config import validate_config

from entropy_fork.common.cores import PASSIVE_WAITING
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.verl import plugin
from entropy_fork.verl.cpu import fork_server
from entropy_fork.verl.cpu.fork_server_process import OF_A_WORKER, OF_THE_RUN

pytestmark = pytest.mark.process

#: a launcher: it starts the server, prints the command that asks for a worker, and waits
LAUNCHER = """
import json, os, signal, sys
from entropy_fork.verl.cpu import fork_server
signal.signal(signal.SIGINT, signal.SIG_IGN if "DEAF" in os.environ else signal.default_int_handler)
server = fork_server.ForkServer(fork_server.make_folder({"_temp_dir": sys.argv[1]}))
modules = tuple(sys.argv[2:])
server.start(os.environ, *([modules[:-1], modules[-1:]] if modules else []))
print(json.dumps([server.py_executable, server.process.pid, os.fspath(server.folder), dict(os.environ)]), flush=True)
sys.stdin.read()
"""

#: a worker: it prints everything that it has inherited
INHERITED = """
import gc, json, os, resource, signal, stat, sys, threading
import __main__
print(json.dumps({
    "arguments": sys.argv, "original": sys.orig_argv, "name": __name__, "file": __file__, "main": __main__.__file__,
    "environment": dict(os.environ), "directory": os.getcwd(), "path": sys.path, "flags": str(sys.flags),
    "input": sys.stdin.read(), "nice": os.nice(0), "umask": os.umask(0), "collects": gc.isenabled(),
    "limits": [resource.getrlimit(number) for number in range(16)],
    "leads a group": os.getpgid(0) == os.getpid(), "leads a session": os.getsid(0) == os.getpid(),
    "signals": [str(signal.getsignal(number)) for number in range(1, 32)],
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "files": [(fd, stat.S_IFMT(os.fstat(fd).st_mode)) for fd in range(50) if os.path.exists(f"/proc/self/fd/{fd}")],
    "adjusted": open("/proc/self/oom_score_adj").read(), "threads": threading.active_count(),
    "is forked": "numpy" in sys.modules,
}), flush=True)
print("said on stderr", file=sys.stderr)
sys.exit(7)
"""


class Launcher:
    """A process that has started a server."""

    def __init__(self, folder: Path, *modules: str, **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(folder), *modules],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.shim, self.server, place, self.environment = json.loads(self.process.stdout.readline())
        self.folder = Path(place)

    def start(self, *arguments: str, before: str = "", python: str | None = None, **how: Any) -> subprocess.Popen[str]:
        """Start a worker as Ray does: through a shell that becomes the worker."""
        command = f"{before} exec {python or self.shim} {shlex.join(arguments)}"
        how["env"] = {**self.environment, "RAY_JOB_ID": "01000000", **how.get("env", {})}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(["bash", "-c", command], text=True, **pipes, **how)  # type: ignore[call-overload,no-any-return]

    def run(self, *arguments: str, **how: Any) -> tuple[str, str, int]:
        """Run a worker. Returns what it printed, and how it ended."""
        worker = self.start(*arguments, **how)
        output, errors = worker.communicate("given", timeout=60)
        return output, errors, worker.returncode

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.server, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("l"), "a_module_that_is_not_installed", "numpy")
    yield launcher
    launcher.close()


@pytest.fixture
def new_launcher(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    started = []

    def start(*modules: str, **environment: str) -> Launcher:
        started.append(Launcher(tmp_path, *modules, **environment))
        return started[-1]

    yield start
    for launcher in started:
        launcher.close()


@pytest.fixture(autouse=True)
def no_worker_is_left(tmp_path: Path) -> Iterator[None]:
    """End the workers that a test started, even if the test fails."""
    yield
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(tmp_path).encode() in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        file = tmp_path / "worker.py"
        file.write_text(text)
        return str(file)

    return write


def wait_until(condition: Callable[[], Any], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("new_session", [False, True])
def test_a_forked_worker_inherits_what_python_would(launcher: Launcher, script, new_session: bool) -> None:  # type: ignore[no-untyped-def]
    """The same program, started by the server and by Python from the same parent, finds the same environment."""
    worker = script(INHERITED)
    how: dict[str, Any] = {
        "before": "umask 027; ulimit -n 321; trap '' USR1;",
        "cwd": "/usr",
        "env": {"RANK": "3", "MASTER_ADDR": "ü b"},
        "start_new_session": new_session,
        "preexec_fn": lambda: (os.nice(3), signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})),
    }
    forked = launcher.run(worker, "--one", "two words", **how)
    plain = launcher.run(worker, "--one", "two words", python=sys.executable, **how)
    found, expected = json.loads(forked[0]), json.loads(plain[0])
    assert (found.pop("is forked"), expected.pop("is forked")) == (True, False)
    assert found == expected
    assert forked[1:] == plain[1:] == ("said on stderr\n", 7)
    assert found["input"] == "given"


def test_a_worker_is_forked_and_draws_numbers_of_its_own(launcher: Launcher, script) -> None:  # type: ignore[no-untyped-def]
    worker = script(
        "import os, random, sys; is_there = 'numpy' in sys.modules; import numpy\n"
        "print(is_there, os.getpid(), random.random(), numpy.random.rand())"
    )
    process = launcher.start(worker)
    first, second = process.communicate(timeout=60)[0].split(), launcher.run(worker)[0].split()
    assert first[0] == second[0] == "True", "not forked"
    assert first[1] != str(process.pid)
    assert all(one != other for one, other in zip(first[1:], second[1:], strict=True))


def test_a_worker_in_another_environment_starts_in_the_ordinary_way(launcher: Launcher, script) -> None:  # type: ignore[no-untyped-def]
    """A module may have read the variable at import."""
    worker = script("import os, sys; print('numpy' in sys.modules, os.getpid(), os.environ['SET'], sys.argv[1:])")
    process = launcher.start(worker, "a b", env={"SET": "for one"})
    output = process.communicate(timeout=60)[0]
    assert output == f"False {process.pid} for one ['a b']\n"
    assert "SET" not in OF_A_WORKER | OF_THE_RUN


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("raise KeyError('no')", 1, "KeyError: 'no'"),
        ("import os; os._exit(9)", 9, ""),
        ("no program", 1, "SyntaxError"),
    ],
)
def test_a_workers_end_is_passed_on(launcher: Launcher, script, program: str, code: int, said: str) -> None:  # type: ignore[no-untyped-def]
    _, errors, ended = launcher.run(script(program))
    assert ended == code
    assert said in errors
    assert "fork_server" not in errors.replace("fork_server_process.py", ""), errors


WAITING = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


def test_signals_go_both_ways(launcher: Launcher, script) -> None:  # type: ignore[no-untyped-def]
    catching = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
    worker = launcher.start(script(catching + WAITING))
    worker.stdout.readline()  # type: ignore[union-attr]
    worker.terminate()
    assert worker.wait(10) == 5

    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGABRT):
        worker = launcher.start(script(WAITING))
        os.kill(int(worker.stdout.readline()), number)  # type: ignore[union-attr]
        assert worker.wait(10) == -number

    worker = launcher.start(script(WAITING))
    pid = int(worker.stdout.readline())  # type: ignore[union-attr]
    assert is_running(pid)
    worker.kill()
    wait_until(lambda: not is_running(pid))


def test_only_the_user_may_ask(launcher: Launcher) -> None:
    assert launcher.folder.stat().st_mode & 0o777 == 0o700


def test_the_server_ends_with_the_launcher(new_launcher) -> None:  # type: ignore[no-untyped-def]
    """Also if the launcher is killed while a worker runs. Such a worker must end by itself, as Ray's workers do."""
    launcher = new_launcher("json")
    assert is_running(launcher.server)
    launcher.process.kill()
    wait_until(lambda: not is_running(launcher.server))
    wait_until(lambda: not launcher.folder.exists())


@pytest.mark.parametrize("environment", [{}, {"DEAF": "to Ctrl-C"}])
def test_a_server_that_dies_is_one_clear_error(new_launcher, script, environment: dict[str, str]) -> None:  # type: ignore[no-untyped-def]
    """Running workers go on. The next request for a worker is refused, and the run stops."""
    launcher = new_launcher("json", **environment)
    worker = launcher.start(script(WAITING))
    pid = int(worker.stdout.readline())
    os.kill(launcher.server, signal.SIGKILL)
    with pytest.raises(subprocess.TimeoutExpired):
        launcher.process.wait(1)
    assert is_running(pid)
    assert worker.poll() is None

    _, errors, code = launcher.run(script("print('never')"))
    assert code == 1
    assert errors.strip() == (
        "EntropyForkError: the fork server of this run has ended, so Ray cannot start another worker."
    )
    launcher.process.wait(10)
    errors = launcher.process.stderr.read()
    assert launcher.process.returncode == 1
    assert not launcher.folder.exists()
    assert errors.count("EntropyForkError") == 1
    assert "Traceback" not in errors
    assert f"(pid {launcher.server}) was killed by signal 9." in errors
    assert "cpu_platform.fork_server=False" in errors

    os.kill(pid, signal.SIGKILL)
    assert worker.wait(10) == 1


def test_a_server_that_cannot_import_says_why(new_launcher, script, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "broken.py").write_text("raise RuntimeError('a broken installation')")
    launcher = new_launcher("broken", PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert launcher.run(script("print('never')"))[::2] == ("", 1)
    launcher.process.wait(10)
    errors = launcher.process.stderr.read()
    assert "ended with code 1" in errors
    assert "RuntimeError: a broken installation" in errors


def test_two_runs_at_once_do_not_meet(launcher: Launcher, new_launcher, script) -> None:  # type: ignore[no-untyped-def]
    other = new_launcher("json")
    worker = script("import os, sys; print(os.getppid(), 'numpy' in sys.modules)")
    assert launcher.run(worker)[0] == f"{launcher.server} True\n"
    assert other.run(worker)[0] == f"{other.server} False\n"


def test_threads_of_an_extension_stop_the_forking(new_launcher, script, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    thread = "threading.Thread(target=threading.Event().wait, daemon=True)"
    (tmp_path / "threaded.py").write_text(f"import threading; {thread}.start()")
    launcher = new_launcher("threaded", PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    process = launcher.start(script("import os; print(os.getpid())"))
    assert process.communicate(timeout=60)[0] == f"{process.pid}\n"


def test_the_modules_of_a_run_can_be_forked(new_launcher, script) -> None:  # type: ignore[no-untyped-def]
    """verl, torch and Ray are imported, OpenMP has started no thread, and each worker draws new random numbers."""
    launcher = new_launcher()
    worker = script(
        "import json, sys, threading; there = [name in sys.modules for name in ('verl', 'torch', 'ray._raylet')]\n"
        "import ray, torch, os\n"
        "print(json.dumps([there, threading.active_count(), torch.get_num_threads(), torch.initial_seed(),\n"
        "                  ray.ObjectRef.from_random().hex(), os.environ.get('OMP_NUM_THREADS')]))\n"
        "torch.ones(300, 300) @ torch.ones(300, 300)"
    )
    forked = [json.loads(launcher.run(worker, env={"OMP_NUM_THREADS": "2"})[0]) for _ in range(2)]
    plain = json.loads(launcher.run(worker, env={"OMP_NUM_THREADS": "2"}, python=sys.executable)[0])
    assert [one[0] for one in (*forked, plain)] == [[True] * 3, [True] * 3, [False] * 3]
    assert [one[1:3] for one in forked] == [plain[1:3]] * 2
    for drawn in (3, 4):
        assert len({one[drawn] for one in (*forked, plain)}) == 3
    # pyarrow's allocator may have one
    assert len(os.listdir(f"/proc/{launcher.server}/task")) <= 2


# --- what ray.init is given


@pytest.fixture
def ray_init(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Call the wrapped ``ray.init``. Returns the arguments that the real one would get."""
    started: list[dict[str, str]] = []
    monkeypatch.setattr(fork_server.ForkServer, "start", lambda self, environment: started.append(dict(environment)))
    monkeypatch.setattr(fork_server.ray_cluster, "find_cluster", lambda arguments: arguments.get("address"))
    for name in PASSIVE_WAITING:
        monkeypatch.delenv(name, raising=False)
    module = SimpleNamespace(init=lambda *args, **kwargs: kwargs)
    fork_server.extend_ray(module)  # type: ignore[arg-type]

    def init(chosen: bool | None, **kwargs: Any) -> dict[str, Any]:
        started.clear()
        monkeypatch.setattr(fork_server, "_chosen", chosen)
        given = module.init(_temp_dir=str(tmp_path), **kwargs)
        return {**given, "started": list(started)}

    return init


def test_the_workers_python_is_the_shim(ray_init) -> None:  # type: ignore[no-untyped-def]
    given = ray_init(True, num_cpus=3, runtime_env={"env_vars": {"A": "b"}, "py_executable": None})
    python, _, _, shim, _ = shlex.split(given["runtime_env"]["py_executable"])
    assert (python, Path(shim).name, given["num_cpus"]) == (sys.executable, "worker_shim.py", 3)
    assert given["runtime_env"]["env_vars"] == {"A": "b", **PASSIVE_WAITING}
    (environment,) = given["started"]
    assert environment.items() >= given["runtime_env"]["env_vars"].items()


def test_without_the_server_workers_still_wait_passively(ray_init) -> None:  # type: ignore[no-untyped-def]
    given = ray_init(False)
    assert given["runtime_env"] == {"env_vars": PASSIVE_WAITING}
    assert given["started"] == []
    user = {"env_vars": {"OMP_WAIT_POLICY": "ACTIVE"}}
    assert ray_init(False, runtime_env=user)["runtime_env"] == user


def test_a_process_that_is_no_launcher_is_left_alone(ray_init) -> None:  # type: ignore[no-untyped-def]
    assert "runtime_env" not in ray_init(None)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"address": "10.0.0.1:6379"}, "the Ray cluster 10.0.0.1:6379 was not started by this run"),
        ({"runtime_env": {"py_executable": "python -X dev"}}, "py_executable=python -X dev names another program"),
        ({"runtime_env": {"pip": ["six"]}}, "runtime_env.pip gives the workers another environment"),
    ],
)
def test_where_it_cannot_serve_it_says_so(ray_init, caplog, kwargs: dict[str, Any], reason: str) -> None:  # type: ignore[no-untyped-def]
    given = ray_init(True, **kwargs)
    assert given["started"] == []
    assert given["runtime_env"].get("py_executable") == kwargs.get("runtime_env", {}).get("py_executable")
    assert reason in caplog.text


# --- the key


def test_the_cpus_recipes_switch_it_on(compose) -> None:  # type: ignore[no-untyped-def]
    assert fork_server.is_asked_for(compose("+recipe=demo_cpu"))
    assert fork_server.is_asked_for(compose("+recipe=dapo", "+cluster=cpu_smoke"))
    assert not fork_server.is_asked_for(compose("+recipe=demo_cpu", "cpu_platform.fork_server=False"))
    assert not fork_server.is_asked_for(compose())


@pytest.mark.parametrize("override", ["cpu_platform.fork_server=perhaps", "cpu_platform.fork_sever=True"])
def test_the_key_is_typed(compose, override: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(HydraException):
        compose("+recipe=demo_cpu", override)
    with pytest.raises(EntropyForkError, match=r"cpu_platform.fork_server must be True or False, got 'perhaps'"):
        fork_server.is_asked_for(compose("+cpu_platform.fork_server=perhaps"))


def test_it_is_refused_where_the_run_is_not_on_a_cpu(compose, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(plugin, "ON_CPU", False)
    config = compose("+recipe=demo_cpu", "actor_rollout_ref.rollout.name=vllm")
    with pytest.raises(EntropyForkError, match=r"cpu_platform.fork_server=True .*VERL_PLATFORM=cpu python"):
        validate_config(config, use_reference_policy=False, use_critic=False)
