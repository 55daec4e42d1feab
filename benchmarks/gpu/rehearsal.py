"""Processes that have only the modules of given folders, to try wheels here as on a machine without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import distributions
from pathlib import Path

from benchmarks.gpu.cases import environment

#: what a run imports; an import fails if it needs a module that is neither carried nor there
MODULES = ("verl.trainer.main_ppo", "verl.workers.engine", "verl.workers.rollout.llm_server", "transfer_queue",
           "entropy_fork.verl.engine", "entropy_fork.verl.cpu.rollout", "math_verify", "datasets")  # fmt: skip

#: a process that has no network: it imports modules, and says where they are
IMPORT = """
import importlib, socket, sys
def refuse(*_, **__):
    raise OSError("there is no network here")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
for name in sys.argv[1:]:
    print(name, importlib.import_module(name).__file__)
"""

#: a Ray without its jars and pages starts, and runs a function in a worker that has loaded the plugin. Ray's workers
#: see the other modules of this Python too.
RAY = """
import ray, sys
ray.init(num_cpus=1, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
@ray.remote
def loaded():
    import verl
    return "entropy_fork.verl.plugin" in sys.modules
assert ray.get(loaded.remote()), "verl did not load this package's plugin in a Ray worker"
print("Ray", ray.__version__, ray.__file__)
"""


def link_what_is_there(folder: Path, has: Callable[[str], bool]) -> None:
    """Link into a folder what the machine has of its own, as far as the Python that runs this has it.

    Args:
        folder: is made.
        has: whether the machine has a package of this name.
    """
    folder.mkdir(parents=True)
    for package in distributions():
        if has(package.metadata["Name"]):
            for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
                if not (folder / top).exists():
                    (folder / top).symlink_to(Path(str(package.locate_file(top))))


def run_clean(folders: Sequence[Path], code: str, *arguments: str) -> str:
    """Run code in this Python with the modules of these folders and no others; returns what it printed.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    known = {name: value for name, value in environment("cpu").items() if name != "VIRTUAL_ENV"}
    known["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in folders)
    with tempfile.TemporaryDirectory(prefix="ef", ignore_cleanup_errors=True) as empty:  # short: Ray puts sockets there
        done = subprocess.run([sys.executable, "-S", "-c", code, *arguments], cwd=empty, check=False,
                              env=known | {"RAY_TMPDIR": empty}, capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-3000:])
    return done.stdout
