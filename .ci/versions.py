"""Test the built wheel on each supported verl, in a clean environment, and test that another verl is refused.

    make versions                   the supported versions, and the newest one beyond them in the package index
    make versions VERL=0.10.0rc1    this version; a version outside the range may fail
    make versions PYTHON_VERSIONS="3.12 3.10"       with torch on these Pythons, also if torch has no CPU build there

Each environment is made as a user makes it: first torch and verl. Then a dry run of ``pip install`` shows what the
wheel would change there: it must change nothing. The same is resolved, not installed, beside vLLM. Then the wheel is
installed, and the tests run from a folder without our sources.

On every other Python that pyproject.toml names, all tests run that need no torch. The other tests run there if torch
has a CPU build (the one for CUDA has gigabytes).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import typer
from packaging.utils import canonicalize_name
from packaging.version import Version
from rich.console import Console
from rich.table import Table
from rich.text import Text
from uv import find_uv_bin

from entropy_fork.common.supported import SUPPORTED, TESTED, why_unsupported

ROOT = Path(__file__).resolve().parents[1]
TORCH = os.environ.get("TORCH", "torch==2.13.0")

#: the packages that a user's environment has first
WATCHED = ("torch", "vllm", "ray", "transformers", "verl")

#: the tests that run on the installed wheel, for each step of the table; a file belongs to one step
TESTS = {
    "registration": (
        "preflight/test_doctor.py::test_this_process_is_healthy",
        "verl/test_engine.py",
        "verl/cpu/test_cpu_platform.py",
        "verl/test_plugin.py::test_the_range_is_the_one_that_a_new_environment_gets",
        "verl/test_plugin.py::test_a_masked_run_in_another_verl_stops_before_ray",
        "verl/test_trainer.py::test_mini_batches_are_those_that_verls_worker_cuts",
        "verl/test_trainer.py::test_verls_older_trainer_refuses_a_mask",
    ),
    "composition": (
        "verl/test_config.py::test_recipes_name_only_keys_that_verl_has",
        "verl/test_config.py::test_which_losses_have_a_mean_of_their_own",
        "recipes/test_recipes.py::test_a_recipe_is_the_papers_run_on_every_cluster",
        "recipes/test_recipes.py::test_a_recipe_passes_all_checks_on_every_cluster_with_every_preset",
    ),
    "end to end": ("e2e/test_main_ppo.py::test_the_weights_in_the_worker_are_the_ones_selected",),
}
#: the tests that start processes and run on another Python without torch
JUDGE = (
    "reward/test_reward.py::test_agreement_with_a_human_grader",
    "reward/test_reward.py::test_memory_is_bounded",
    "reward/test_reward.py::test_a_process_is_used_again",
    "reward/test_reward.py::test_an_endless_answer_is_stopped[tower of exponents]",
)
FOR_TESTS = ("hypothesis", "pytest", "pytest-timeout")
STEPS = ("installed", "dry run", "beside vLLM", *TESTS)
ON_ANOTHER_PYTHON = ("types", "dependencies", "modules", "without torch", "with torch", *STEPS, "unit tests")

#: the tests of 'make check'
QUICK = "not process and not e2e and not fault"

RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"

console = Console(width=None if sys.stdout.isatty() else 150)


class Failed(Exception):
    """A step failed; the message says how."""


@dataclass
class Row:
    """The results of one version of verl on one Python."""

    version: str
    required: bool
    python: str = RUNNING
    cells: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def title(self) -> str:
        """The name of the row in messages."""
        return f"verl {self.version}" + (f", Python {self.python}" if self.python != RUNNING else "")

    def result(self) -> Text:
        """The result in one word."""
        if not self.failures:
            left_out = any(cell.endswith("not run") for cell in self.cells.values())
            return Text("what was run passed", "yellow") if left_out else Text("passed", "green")
        return Text("FAILED", "red") if self.required else Text("failed (allowed)", "yellow")

    def step(self, name: str, function: Callable[[], str]) -> bool:
        """Run a step and fill its cell. Returns False if the step failed."""
        try:
            self.cells[name] = function()
        except Failed as failure:
            self.cells[name] = "failed"
            self.failures.append(f"{name}: {failure}")
            console.print(f"{self.title}, {name}: {failure}", style="red", markup=False)
            return False
        console.print(f"{self.title}, {name}: {self.cells[name]}", markup=False)
        return True


def call(*command: str | Path, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a program outside our sources. If it fails, the error contains its output."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= options.pop("environment", {})  # type: ignore[operator, arg-type]
    words = [str(part) for part in command]
    # long after pytest would have ended a test that hangs
    options = {"cwd": tempfile.gettempdir(), "timeout": 1500, **options}
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired as error:
        raise Failed(str(error)) from None
    if check and done.returncode != 0:
        raise Failed(f"{' '.join(words)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}")
    return done


def pip(*arguments: str | Path) -> str:
    """Run the pip of this environment, on another environment if the arguments have ``--python``."""
    return call(sys.executable, "-m", "pip", *arguments).stdout


@cache
def folders_of_wheels() -> dict[str, str]:
    """The folders of wheels from pip's settings, for uv. A CPU build of torch may be there."""
    told = re.findall(r"find-links='([^']*)'", pip("config", "list"))
    return {"UV_FIND_LINKS": ",".join(dict.fromkeys(" ".join(told).split()))} if told else {}


def uv(*arguments: str | Path, bytecode: bool = True) -> str:
    """Run uv: it does what pip does in a tenth of the time, and writes bytecode even with PYTHONDONTWRITEBYTECODE."""
    environment = {"UV_COMPILE_BYTECODE": str(int(bytecode)), **folders_of_wheels()}
    return call(find_uv_bin(), *arguments, environment=environment).stdout


def resolved(python: Path, *requirements: str, there: dict[str, str] | None = None) -> dict[str, str]:
    """The version of each package that would be installed on this Python beside ``there``. Installs nothing."""
    with tempfile.TemporaryDirectory() as name:
        wanted, found = Path(name) / "wanted.in", Path(name) / "found.txt"
        wanted.write_text("\n".join(requirements))
        found.write_text("\n".join(f"{name}=={version}" for name, version in (there or {}).items()))  # uv prefers these
        options = ("--quiet", "--no-header", "--no-annotate", "--output-file", found, "--python", python)
        uv("pip", "compile", *options, wanted)
        lines = re.findall(r"^([\w.-]+)(?:==| @ )(\S+)", found.read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in lines}


def installed(python: Path) -> dict[str, str]:
    """The version of each package in an environment."""
    found = json.loads(uv("pip", "list", "--quiet", "--format", "json", "--python", python))
    return {canonicalize_name(entry["name"]): entry["version"] for entry in found}


def said(versions: dict[str, str]) -> str:
    """``ray 2.60.0, verl 0.9.1``"""
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def check(row: Row, interpreter: Path, thoroughly: bool, wheel: Path, folder: Path) -> None:
    """Check one version of verl. ``thoroughly`` runs our tests, even if we refuse this version."""
    version, began = row.version, time.monotonic()
    refused = why_unsupported(version) is not None
    folder.mkdir(parents=True)
    python = folder / "environment" / "bin" / "python"
    before: dict[str, str] = {}

    def make() -> str:
        uv("venv", "--quiet", "--clear", "--python", interpreter, python.parents[1])
        uv("pip", "install", "--quiet", "--python", python, TORCH, f"verl=={version}")
        before.update(installed(python))
        return said({name: before[name] for name in WATCHED if name in before})

    def dry_run() -> str:
        report = pip("--python", python, "install", "--dry-run", "--quiet", "--report", "-", wheel)
        wanted = {
            canonicalize_name(entry["metadata"]["name"]): entry["metadata"]["version"]
            for entry in json.loads(report)["install"]
        }
        if moved := wanted.keys() & before.keys():
            raise Failed(f"pip would replace {said({n: before[n] for n in moved})} by {said(wanted)}")
        return f"moves 0, adds {said(wanted)}"

    def beside_vllm() -> str:
        """Resolve the wheel beside vLLM from the index, without installing: vLLM for GPUs has gigabytes."""
        theirs = resolved(python, f"verl=={version}", "vllm")
        ours = resolved(python, f"verl=={version}", "vllm", f"entropy-fork @ {wheel.as_uri()}", there=theirs)
        moved = {name: ours.get(name, "removed") for name in theirs if ours.get(name) != theirs[name]}
        if moved.keys() & set(WATCHED):
            raise Failed(f"pip would make {said(moved)} of {said({name: theirs[name] for name in moved})}")
        others = f" ({said({name: f'{theirs[name]} to {moved[name]}' for name in moved})})" if moved else ""
        return f"vllm {theirs['vllm']}: moves {len(moved)}{others}, adds {len(ours.keys() - theirs.keys())}"

    def install() -> str:
        (folder / "overrides").write_text(f"verl=={version}\n")  # the extra's range would replace a verl outside it
        needed = (f"entropy-fork[cpu] @ {wheel.as_uri()}", *FOR_TESTS)
        uv("pip", "install", "--quiet", "--python", python, "--overrides", folder / "overrides", *needed)
        after = installed(python)
        if moved := {name: after.get(name, "removed") for name in before if after.get(name) != before[name]}:
            raise Failed(f"the install made {said(moved)} of {said({name: before[name] for name in moved})}")
        uv("pip", "check", "--python", python)
        place = call(python, "-c", "import entropy_fork; print(entropy_fork.__file__)").stdout.strip()
        if "site-packages" not in Path(place).relative_to(python.parents[1]).parts:
            raise Failed(f"entropy_fork is imported from {place}")
        return row.cells["installed"]

    def refusal() -> str:
        """Import what every process of a masked run imports: it must refuse. (An old verl may not start main_ppo.)"""
        run = call(python, "-c", "import entropy_fork.verl", check=False)
        if run.returncode == 0 or f"works with verl {SUPPORTED}" not in run.stderr:
            raise Failed(f"it was not refused with the range {SUPPORTED}: {run.stderr[-3000:]}")
        return f"refused, naming {SUPPORTED}"

    try:
        if row.step("installed", make) and row.step("dry run", dry_run) and row.step("installed", install):
            if refused and row.step("registration", refusal):
                row.failures.append("not supported")
            if thoroughly:
                row.step("beside vLLM", beside_vllm)
                run_tests(row, python, folder, pretend=TESTED[-1] if refused else None)
                if row.python != RUNNING:
                    row.step("unit tests", partial(unit_tests, python, wheel, folder))
    finally:
        shutil.rmtree(python.parents[1], ignore_errors=True)
    row.seconds += time.monotonic() - began


def run_tests(row: Row, python: Path, folder: Path, pretend: str | None) -> None:
    """Run our tests without our sources. ``pretend`` turns the refusal off, to see whether this verl would work."""
    checkout = folder / "checkout"
    for name in ("tests", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", checkout)  # pytest's options
    environment = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    if pretend is not None:
        modules = {"VERL_USE_EXTERNAL_MODULES": "helpers.pretend_verl", "PRETENDED_VERL": pretend}
        environment |= {**modules, "PYTHONPATH": str(checkout / "tests")}
    names = [f"tests/{name}" for group in TESTS.values() for name in group]
    results = folder / "results.xml"
    command = (python, "-m", "pytest", "-p", "no:cacheprovider", "--quiet", f"--junitxml={results}", *names)
    run = call(*command, check=False, cwd=checkout, environment=environment)
    column = {Path(name.partition("::")[0]).stem: group for group, names in TESTS.items() for name in names}
    outcomes: dict[str, Counter[str]] = {group: Counter() for group in TESTS}
    seconds: Counter[str] = Counter()
    for case in ElementTree.parse(results).iter("testcase") if results.is_file() else ():
        group = column[case.get("classname", "").split(".")[-1]]
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        outcomes[group][outcome] += 1
        seconds[group] += float(case.get("time", 0))

    def outcome_of(group: str) -> str:
        counts = outcomes[group]
        text = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "nothing ran"
        if counts["failure"] or counts["error"] or not counts["passed"]:
            raise Failed(text)
        return f"{text}, {seconds[group]:.0f} s"

    failures = len(row.failures)
    for group in TESTS:
        row.step(group, partial(outcome_of, group))
    if len(row.failures) > failures:
        console.print(run.stdout[-12000:] + run.stderr[-3000:], markup=False, highlight=False)


def named_pythons() -> list[str]:
    """The Python versions that pyproject.toml names."""
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())


def interpreter_of(python: str) -> Path | None:
    """The path of a Python of this version: on the PATH, or installed by uv or pyenv."""
    environment = {}
    if shutil.which("pyenv"):
        folders = sorted(Path(call("pyenv", "root").stdout.strip()).glob("versions/*/bin"))
        environment["PATH"] = os.pathsep.join([*map(str, folders), os.environ["PATH"]])
    search = (find_uv_bin(), "python", "find", "--system", "--no-python-downloads", python)
    found = call(*search, check=False, environment=environment)
    return Path(found.stdout.strip()) if found.returncode == 0 else None


def on_another_python(row: Row, asked: bool, wheel: Path, folder: Path) -> Path | None:
    """Test what needs no torch. Returns this Python if the rest can run: with a CPU build of torch, or any if asked."""
    python, began = row.python, time.monotonic()
    row.step("types", lambda: call(sys.executable, "-m", "mypy", "--python-version", python, cwd=ROOT).stdout.strip())
    interpreter = interpreter_of(python)
    if interpreter is None:
        row.cells["modules"] = f"no Python {python} on this machine: not run"
        if asked:
            row.failures.append(f"no Python {python} on this machine: install it, with uv or pyenv for example")
        return None
    folder.mkdir()
    without_torch(row, interpreter, wheel, folder)

    def build() -> str:
        packages = resolved(interpreter, TORCH)
        torch = f"torch {packages['torch']}"
        if not any(name.startswith(("nvidia-", "cuda-")) for name in packages):
            return torch
        return f"{torch}, the build for CUDA" if asked else f"no CPU build of torch for Python {python} here: not run"

    installable = "failed" not in (row.cells["dependencies"], row.cells["modules"])
    there = installable and row.step("with torch", build) and not row.cells["with torch"].endswith("not run")
    row.seconds = time.monotonic() - began
    return interpreter if there else None


def without_torch(row: Row, interpreter: Path, wheel: Path, folder: Path) -> None:
    """Check that a set of versions exists. Import every module that needs no torch, and run the tests without torch."""
    python = folder / "environment" / "bin" / "python"

    def dependencies() -> str:
        """Ask pip which verl fits this Python, because uv ignores an upper bound in Requires-Python."""
        counts = []
        for version in TESTED:
            asks = ("--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--target", folder / "nothing")
            try:
                pip("install", *asks, "--only-binary", ":all:", "--python-version", row.python, f"verl=={version}")
            except Failed as error:
                raise Failed(f"pip finds no verl {version} for Python {row.python}\n{error}") from None
            ours = f"entropy-fork[cpu,analysis] @ {wheel.as_uri()}"
            packages = resolved(interpreter, ours, f"verl=={version}", TORCH)
            counts.append(f"verl {version}: {len(packages)} packages")
        return ", ".join(counts)

    def modules() -> str:
        (folder / "excluded").write_text("torch\n")
        uv("venv", "--quiet", "--python", interpreter, python.parents[1])
        needed = (f"entropy-fork[cpu,analysis] @ {wheel.as_uri()}", f"verl=={row.version}", *FOR_TESTS)
        options = ("--quiet", "--python", python, "--excludes", folder / "excluded")
        uv("pip", "install", *options, *needed, bytecode=False)
        found = json.loads(call(python, ROOT / ".ci" / "without_torch.py").stdout)
        if found["errors"]:
            raise Failed("\n".join(f"{name}: {error}" for name, error in found["errors"].items()))
        return f"{found['compiled']} compiled, {found['imported']} of them imported (the others need torch)"

    def tests() -> str:
        checkout = repository(folder / "checkout")
        quick = pytest(
            python, checkout, "-p", "without_torch", "-m", QUICK, "--ignore", "tests/project/test_docs.py", "tests"
        )
        judged = pytest(python, checkout, "-p", "without_torch", *(f"tests/{name}" for name in JUDGE))
        return f"{quick}; the judge: {judged}"

    row.step("dependencies", dependencies)
    if row.step("modules", modules):
        row.step("without torch", tests)
    shutil.rmtree(python.parents[1], ignore_errors=True)


def unit_tests(python: Path, wheel: Path, folder: Path) -> str:
    """Run the tests of ``make check``, in the environment that :func:`check` has made."""
    needed = f"entropy-fork[cpu,dev] @ {wheel.as_uri()}"
    uv("pip", "install", "--quiet", "--python", python, "--overrides", folder / "overrides", needed)
    return pytest(python, repository(folder / "repository"), "-n", "2", "--dist", "loadfile", "-m", QUICK, "tests")


def repository(folder: Path) -> Path:
    """Copy all files that git tracks."""
    listed = call("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout
    for name in listed.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def pytest(python: Path, checkout: Path, *arguments: str) -> str:
    """Run pytest; the result in a line.

    The tests must find the wheel. ``python -m pytest`` and pyproject.toml's ``pythonpath`` would find our sources, so
    this runs the program ``pytest``, with only the tests, the examples and the benchmarks on the path.
    """
    scripts = checkout.with_name("scripts")
    scripts.mkdir(exist_ok=True)
    for name in ("examples", "benchmarks"):
        if not (scripts / name).is_symlink():
            (scripts / name).symlink_to(checkout / name)
    environment = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(checkout / ".ci")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}  # the judge's processes start in less memory
    options = ("-p", "no:cacheprovider", "--quiet", "-o", f"pythonpath=tests {scripts}")
    command = (python.with_name("pytest"), *options, *arguments)
    run = call(*command, check=False, cwd=checkout, environment=environment)
    said = run.stdout.strip() or run.stderr.strip()  # pytest writes only to stderr if it cannot start
    outcome = said.split("\n")[-1]
    if run.returncode != 0:
        console.print(run.stdout[-12000:] + run.stderr[-3000:], markup=False, highlight=False)
        raise Failed(outcome)
    return outcome


def beyond() -> tuple[str, bool] | None:
    """The newest verl beyond the supported ones; if there is none, the newest pre-release.

    Such a pre-release is older than the range, and only its refusal is tested.
    """
    listed = re.search(r"Available versions: (.*)", pip("index", "versions", "verl", "--pre"))
    known = sorted((Version(text) for text in listed[1].split(", ")), reverse=True) if listed else []
    newer = [version for version in known if version > Version(TESTED[-1])]
    early = [version for version in known if version.is_prerelease]
    return (str((newer or early)[0]), bool(newer)) if newer or early else None


def table_of(what: str, rows: dict[str, Row], steps: Sequence[str]) -> Table:
    """The table: a column for each version, a line for each step, and the result."""
    table = Table(what, *rows, show_lines=True)
    for step in steps:
        if any(step in row.cells for row in rows.values()):
            table.add_row(step, *(Text(row.cells.get(step, "–")) for row in rows.values()))
    table.add_row("seconds", *(f"{row.seconds:.0f}" for row in rows.values()))
    table.add_row("result", *(row.result() for row in rows.values()))
    return table


def main(
    versions: Annotated[list[str] | None, typer.Argument(help="Of verl; without, see above.")] = None,
    pythons: Annotated[list[str] | None, typer.Option("--python", help="With torch on it, as 3.12.")] = None,
) -> None:
    """Build the wheel, and test it on versions of verl and of Python."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="versions-") as name:
        folder = Path(name)
        uv("build", "--quiet", "--wheel", "--out-dir", folder, ROOT)
        (wheel,) = folder.glob("*.whl")
        if not pythons or RUNNING in pythons:
            plan = [(version, version in TESTED, True) for version in versions or TESTED]
            if not versions and (other := beyond()):
                plan.append((other[0], False, other[1]))
            for version, required, thoroughly in plan:
                rows.append(Row(version, required))
                check(rows[-1], Path(sys.executable), thoroughly, wheel, folder / version)
        others = [python for python in pythons or ([] if versions else named_pythons()) if python != RUNNING]
        first = [Row((versions or TESTED)[-1], True, python) for python in others]
        with ThreadPoolExecutor() as pool:
            tried = [pool.submit(on_another_python, row, bool(pythons), wheel, folder / row.python) for row in first]
        for row, interpreter in zip(first, [future.result() for future in tried], strict=True):
            rows.append(row)
            if interpreter is not None:
                check(row, interpreter, True, wheel, folder / row.python / row.version)
    if here := [row for row in rows if row.python == RUNNING]:
        console.print(table_of("verl", {row.version: row for row in here}, STEPS))
    if titles := {f"Python {row.python}, verl {row.version}": row for row in rows if row.python != RUNNING}:
        console.print(table_of("another Python", titles, ON_ANOTHER_PYTHON))
    for row in rows:
        for failure in row.failures:
            console.print(f"{row.title}: {failure.splitlines()[0]}", markup=False)
    if any(row.required and row.failures for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
