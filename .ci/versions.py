"""The built wheel on each supported verl, in a clean environment of its own; and how another verl is refused.

    make versions                   the supported versions, and the newest beyond them that the package index has
    make versions VERL=0.10.0rc1    this one; what lies outside the range is allowed to fail

An environment is made as its user made it: torch and verl first. What ``pip install`` of the wheel would do there is
then read from a dry run, and it must move nothing; the same is resolved, not installed, beside vLLM. Then the wheel is
installed, and tests are run from a folder in which our sources do not lie.
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
from collections.abc import Callable
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

#: what a user's environment stands on
WATCHED = ("torch", "vllm", "ray", "transformers", "verl")

#: what is run on the installed wheel, by the step of the table; a file belongs to one of them
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
STEPS = ("installed", "dry run", "beside vLLM", *TESTS)

console = Console(width=None if sys.stdout.isatty() else 150)


class Failed(Exception):
    """A step did not give what it must; the message says what."""


@dataclass
class Row:
    """What came of one version of verl."""

    version: str
    required: bool
    cells: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def result(self) -> Text:
        """In a word."""
        if not self.failures:
            return Text("passed", "green")
        return Text("FAILED", "red") if self.required else Text("failed (allowed)", "yellow")

    def step(self, name: str, function: Callable[[], str]) -> bool:
        """Fill a cell. False where the step failed."""
        try:
            self.cells[name] = function()
        except Failed as failure:
            self.cells[name] = "failed"
            self.failures.append(f"{name}: {failure}")
            console.print(f"verl {self.version}, {name}: {failure}", style="red", markup=False)
            return False
        console.print(f"verl {self.version}, {name}: {self.cells[name]}", markup=False)
        return True


def call(*command: str | Path, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a program outside our sources; its output belongs to the error."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= options.pop("environment", {})  # type: ignore[operator, arg-type]
    words = [str(part) for part in command]
    # pytest ends a test that hangs, and what it has started, long before this
    options = {"cwd": tempfile.gettempdir(), "timeout": 1500, **options}
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired as error:
        raise Failed(str(error)) from None
    if check and done.returncode != 0:
        raise Failed(f"{' '.join(words)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}")
    return done


def pip(*arguments: str | Path) -> str:
    """The pip of this environment, on another one where ``--python`` says so."""
    return call(sys.executable, "-m", "pip", *arguments).stdout


@cache
def folders_of_wheels() -> dict[str, str]:
    """Those that pip has been told of (a CPU build of torch may lie there), for uv."""
    told = re.findall(r"find-links='([^']*)'", pip("config", "list"))
    return {"UV_FIND_LINKS": ",".join(dict.fromkeys(" ".join(told).split()))} if told else {}


def uv(*arguments: str | Path) -> str:
    """What pip does, in a tenth of the time; bytecode too, which no process writes under PYTHONDONTWRITEBYTECODE."""
    return call(find_uv_bin(), *arguments, environment={"UV_COMPILE_BYTECODE": "1", **folders_of_wheels()}).stdout


def installed(python: Path) -> dict[str, str]:
    """Version by name, of all that is in an environment."""
    found = json.loads(uv("pip", "list", "--quiet", "--format", "json", "--python", python))
    return {canonicalize_name(entry["name"]): entry["version"] for entry in found}


def said(versions: dict[str, str]) -> str:
    """``ray 2.60.0, verl 0.9.1``"""
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def check(version: str, required: bool, thoroughly: bool, wheel: Path, folder: Path) -> Row:
    """One version of verl: ``thoroughly`` with our tests, although it may be one that we refuse."""
    row, began = Row(version, required), time.monotonic()
    refused = why_unsupported(version) is not None
    python = folder / "environment" / "bin" / "python"
    before: dict[str, str] = {}

    def make() -> str:
        uv("venv", "--quiet", "--clear", "--python", sys.executable, python.parents[1])
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
        """vLLM for GPUs weighs gigabytes; what would be installed is resolved from the index."""
        (folder / "theirs.in").write_text(f"verl=={version}\nvllm\n")
        arguments = ("--quiet", "--no-header", "--no-annotate", "--python", python)
        theirs = uv("pip", "compile", *arguments, folder / "theirs.in").split("\n")
        (folder / "ours.in").write_text("\n".join([f"entropy-fork @ {wheel.as_uri()}", *theirs]))
        added = set(uv("pip", "compile", *arguments, folder / "ours.in").split("\n")) - set(theirs)
        vllm = next(line for line in theirs if line.startswith("vllm=="))
        return f"{vllm}: moves 0, adds {len(added)}"

    def install() -> str:
        (folder / "overrides").write_text(f"verl=={version}\n")  # the extra's range would move a verl outside it
        needed = (f"entropy-fork[cpu] @ {wheel.as_uri()}", "hypothesis", "pytest", "pytest-timeout")
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
        """By what every process of a masked run must import, as an old verl may not even start main_ppo today."""
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
    finally:
        shutil.rmtree(python.parents[1], ignore_errors=True)
    row.seconds = time.monotonic() - began
    return row


def run_tests(row: Row, python: Path, folder: Path, pretend: str | None) -> None:
    """Our tests beside nothing of our sources; ``pretend`` lifts the refusal, to see what would become of it."""
    checkout = folder / "checkout"
    for name in ("tests", "examples"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", checkout)  # pytest's options
    environment = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    environment["ENTROPY_FORK_TEST_WORLD"] = str(folder.parent / "world")  # built once for all versions
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


def beyond() -> tuple[str, bool] | None:
    """What may come: the newest verl beyond the supported ones, or, while there is none, the newest pre-release.

    The second is older than the range, and only its refusal is looked at.
    """
    listed = re.search(r"Available versions: (.*)", pip("index", "versions", "verl", "--pre"))
    known = sorted((Version(text) for text in listed[1].split(", ")), reverse=True) if listed else []
    newer = [version for version in known if version > Version(TESTED[-1])]
    early = [version for version in known if version.is_prerelease]
    return (str((newer or early)[0]), bool(newer)) if newer or early else None


def table_of(rows: list[Row]) -> Table:
    """A column for each version, a line for each step, and what it comes to."""
    table = Table("verl", *(row.version for row in rows), show_lines=True)
    for step in STEPS:
        table.add_row(step, *(Text(row.cells.get(step, "–")) for row in rows))
    table.add_row("seconds", *(f"{row.seconds:.0f}" for row in rows))
    table.add_row("result", *(row.result() for row in rows))
    return table


def main(versions: Annotated[list[str] | None, typer.Argument(help="Of verl; without, see above.")] = None) -> None:
    """Build the wheel, and try it on versions of verl."""
    with tempfile.TemporaryDirectory(prefix="versions-") as name:
        folder = Path(name)
        uv("build", "--quiet", "--wheel", "--out-dir", folder, ROOT)
        (wheel,) = folder.glob("*.whl")
        plan = [(version, version in TESTED, True) for version in versions or TESTED]
        if not versions and (other := beyond()):
            plan.append((other[0], False, other[1]))
        rows = []
        for version, required, thoroughly in plan:
            (folder / version).mkdir()
            rows.append(check(version, required, thoroughly, wheel, folder / version))
    console.print(table_of(rows))
    for row in rows:
        for failure in row.failures:
            console.print(f"verl {row.version}: {failure.splitlines()[0]}", markup=False)
    if any(row.required and row.failures for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
