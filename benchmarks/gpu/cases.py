"""How a stage is run: case by case in a process of its own, each within a time, and what came of it as a CSV file.

A stage is a list of cases. A child process runs them one after the other and notes each one as it begins and ends. If
the child dies or a case takes too long, the parent notes that, ends the child with all that it started, and goes on
with the next case in a new child. So one broken case, or one broken CUDA context, costs one case.

A CSV file has one row per number (:data:`FIELDS`), with the command that measured it. A case that gave no number has
one row that says why.
"""

from __future__ import annotations

import csv
import gc
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from entropy_fork.common.processes import end_processes
from entropy_fork.common.progress import task

REPOSITORY = Path(__file__).resolve().parents[2]
CONSOLE = Console()

#: where the results of a GPU are kept; those of a CPU prove the code and nothing else, so they stay out of the docs
RESULTS = {"cuda": Path("docs/lab/performance"), "cpu": Path("build/gpu-cpu")}

#: the packages whose versions stand in each row, where they are installed
PACKAGES = ("torch", "triton", "transformers", "verl", "ray", "tensordict", "flash-attn", "vllm", "entropy-fork")

#: what became of a case
MEASURED, FAILED, ENDED, NOT_MEASURED = "measured", "failed", "ended", "not measured"

#: the environment variable that all processes of a child have, by which they are found and ended
MARK = "ENTROPY_FORK_GPU_CASES"


@dataclass(frozen=True)
class Measured:
    """One number of a case.

    Attributes:
        row: what it is a number of: the row of the table.
        measure: its column, with the unit.
        value: the number.
    """

    row: str
    measure: str
    value: float


@dataclass(frozen=True)
class Case:
    """A piece of a stage.

    Attributes:
        name: distinct in its stage.
        table: the heading that its numbers stand under.
        run: measures, and yields the numbers.
        lacks: why it cannot run here; empty if it can.
        seconds: it is ended after this long.
        alone: whether it changes its process (verl's fused heads replace the model's class), so no case may follow it.
    """

    name: str
    table: str
    run: Callable[[], Iterable[Measured]]
    lacks: str = ""
    seconds: float = 180.0
    alone: bool = False


@dataclass(frozen=True)
class Stage:
    """A stage of the proof.

    Attributes:
        letter: its place in the order.
        title: what it proves.
        module: the module that runs it.
        cases: makes the cases for a device (``cpu`` or ``cuda``) and a folder for large files. It must not use a GPU.
        seconds: the stage is ended after this long.
    """

    letter: str
    title: str
    module: str
    cases: Callable[[str, Path], list[Case]]
    seconds: float = 8 * 60

    @property
    def file_name(self) -> str:
        """The name of its CSV file."""
        return f"gpu-{self.letter}-{self.module.rpartition('.')[2]}.csv"


@dataclass(frozen=True)
class Row:
    """A row of the CSV file."""

    date: str
    device: str
    chip: str
    versions: str
    command: str
    stage: str
    table: str
    case: str
    row: str
    measure: str
    value: str
    status: str
    note: str = ""


FIELDS = tuple(Row.__dataclass_fields__)


def is_installed(module: str) -> bool:
    """Whether a module can be found. It is not imported."""
    return importlib.util.find_spec(module) is not None


def versions() -> str:
    """The versions of everything that a number may depend on, in one line."""
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def run_stage(
    stage: Stage, device: str, output: Path, only: Sequence[str] = (), seconds: float | None = None
) -> list[Row]:
    """Run the cases of a stage in child processes, and write its CSV file after each of them.

    Args:
        stage: the stage.
        device: ``cpu`` or ``cuda``.
        output: the folder of the CSV file; large files go to a temporary folder.
        only: the names of the cases to run; all if empty.
        seconds: the limit of the whole stage; by default the stage's own.
    """
    end = time.monotonic() + (stage.seconds if seconds is None else seconds)
    with tempfile.TemporaryDirectory(prefix="entropy-fork-gpu-") as folder:
        cases = [case for case in stage.cases(device, Path(folder)) if not only or case.name in only]
        run = _Run(stage, device, Path(folder), output / stage.file_name, end)
        with task(f"stage {stage.letter}: {stage.title}", len(cases), console=CONSOLE) as shown:
            run.shown = shown
            for case in cases:
                if case.lacks:
                    run.note(case, NOT_MEASURED, case.lacks)
            run.all([case for case in cases if not case.lacks])
    return run.rows


@dataclass
class _Run:
    """A stage while it runs."""

    stage: Stage
    device: str
    folder: Path
    csv: Path
    end: float
    chip: str = ""
    rows: list[Row] = field(default_factory=list)
    shown: Any = None

    def all(self, cases: list[Case]) -> None:
        left = list(cases)
        while left and time.monotonic() < self.end:
            together = next((number for number, case in enumerate(left) if case.alone), len(left))
            left = left[self._child(left[: max(1, together)]) :]
        for case in left:
            self.note(case, NOT_MEASURED, "the stage's time was over before its turn")

    def note(self, case: Case, status: str, note: str, measured: Sequence[Measured] = ()) -> None:
        """Add what became of a case, and write the file."""
        of_case = Row(
            date=datetime.now(timezone.utc).date().isoformat(), device=self.device, chip=self.chip,
            versions=versions(), command=self._command(case), stage=self.stage.letter, table=case.table,
            case=case.name, row=case.name, measure="", value="", status=status, note=" ".join(note.split()),
        )  # fmt: skip
        of_numbers = [replace(of_case, row=m.row, measure=m.measure, value=repr(m.value)) for m in measured]
        self.rows += of_numbers or [of_case]
        write_rows(self.rows, self.csv)
        if self.shown is not None:
            self.shown.advance(note=f"{case.name}: {status}")
        CONSOLE.print(f"stage {self.stage.letter}, {case.name}: {status} {note[-500:]}", highlight=False, markup=False)

    def _command(self, case: Case) -> str:
        return shlex.join(["python", "-m", self.stage.module, "--device", self.device, "--case", case.name])

    def _child(self, cases: list[Case]) -> int:
        """Run cases in one child, as far as it comes; returns how many of them are done with."""
        record, mark = self.folder / "record.jsonl", uuid.uuid4().hex
        record.write_text("")
        arguments = [sys.executable, "-m", self.stage.module, "--device", self.device, "--record", str(record)]
        arguments += ["--folder", str(self.folder), *(part for case in cases for part in ("--case", case.name))]
        log = self.folder / "log.txt"
        done, begun, read, said_before = 0, time.monotonic(), 0, 0
        with log.open("wb") as out:
            child = subprocess.Popen(
                arguments, cwd=REPOSITORY, env=environment(self.device) | {MARK: mark}, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            while True:
                has_ended = child.poll() is not None
                lines = [line for line in record.read_text().splitlines(keepends=True) if line.endswith("\n")]
                for line in lines[read:]:
                    said = json.loads(line)
                    if "chip" in said:
                        self.chip = said["chip"]
                        begun = time.monotonic()  # the imports are done: now the first case has its own time
                        continue
                    measured = [Measured(**number) for number in said["measured"]]
                    self.note(cases[done], said["status"], said["note"], measured)
                    done, begun, said_before = done + 1, time.monotonic(), log.stat().st_size
                read = len(lines)
                if done == len(cases) or has_ended:
                    break
                late = time.monotonic() >= min(self.end, begun + cases[done].seconds)
                if late:
                    break
                time.sleep(0.05)
            if done == len(cases) and not has_ended:
                _wait(child)
            end_processes(MARK, mark, patience_s=20.0)
            child.wait()
        if done < len(cases):
            last = log.read_bytes()[said_before:].decode(errors="replace")[-1500:]
            if has_ended:
                self.note(cases[done], FAILED, f"its process ended with {child.returncode}: {last}")
            else:
                self.note(cases[done], ENDED, f"took longer than {time.monotonic() - begun:.0f} s. {last}")
            done += 1
        return done


def _wait(child: subprocess.Popen[bytes]) -> None:
    """Let a child that is done end by itself."""
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        return


def environment(device: str) -> dict[str, str]:
    """The environment of a child: verl's platform follows the device."""
    known = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    known["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    known.pop("VERL_PLATFORM", None)
    return known | ({"VERL_PLATFORM": "cpu"} if device == "cpu" else {})


def write_rows(rows: Sequence[Row], file: Path) -> None:
    """Write rows as a CSV file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, FIELDS)
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    part.replace(file)


def read_rows(file: Path) -> list[Row]:
    """Read a CSV file that :func:`write_rows` wrote."""
    with file.open(newline="", encoding="utf-8") as lines:
        return [Row(**line) for line in csv.DictReader(lines)]


def run_cases(stage: Stage, device: str, names: Sequence[str], folder: Path, record: Path) -> None:
    """What a child does: run these cases, and append to ``record`` what became of each."""

    def append(**said: Any) -> None:
        with record.open("a") as out:
            out.write(json.dumps(said) + "\n")

    by_name = {case.name: case for case in stage.cases(device, folder)}
    from report import chip

    append(chip=chip(device))
    for name in names:
        try:
            measured = [asdict(number) for number in by_name[name].run()]
            append(status=MEASURED, note="", measured=measured)
        except Exception as error:
            traceback.print_exc()
            if _is_broken(device):  # every further case would fail as well: leave this one to the parent
                sys.exit(1)
            append(status=FAILED, note=f"{type(error).__name__}: {error}"[:1500], measured=[])
        _free(device)


def _free(device: str) -> None:
    """Give the memory of a finished case back to the GPU."""
    gc.collect()
    if device != "cpu" and "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def _is_broken(device: str) -> bool:
    """Whether the process can no longer use its GPU, as after an assertion in a kernel."""
    if device == "cpu":
        return False
    import torch

    try:
        torch.zeros(1, device=device).item()
    except Exception:
        return True
    return False


Device = Annotated[str, typer.Option(help="cuda; or cpu, with tiny shapes, to prove the code.")]
Output = Annotated[
    Path | None, typer.Option(help="Folder of the CSV; by default docs/lab/performance, on a CPU build/.")
]
Only = Annotated[list[str] | None, typer.Option("--case", help="Only this case; may be repeated.")]


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        typer.BadParameter: with what is there.
    """
    if device not in RESULTS:
        raise typer.BadParameter(f"{device}: write cuda or cpu")
    if device == "cuda":
        asked = [sys.executable, "-c", "import torch, sys; sys.exit(not torch.cuda.is_available())"]
        if subprocess.run(asked, check=False).returncode:
            raise typer.BadParameter("torch finds no GPU here. '--device cpu' runs the same code on tiny shapes.")


def command(stage: Stage) -> Callable[..., None]:
    """The command line of a stage's module."""

    def main(
        device: Device = "cuda",
        output: Output = None,
        case: Only = None,
        record: Annotated[Path | None, typer.Option(hidden=True)] = None,
        folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
    ) -> None:
        if record is not None and folder is not None:
            run_cases(stage, device, case or [], folder, record)
            return
        check_device(device)
        from benchmarks.gpu.tables import markdown

        rows = run_stage(stage, device, output or RESULTS[device], case or [])
        CONSOLE.print(markdown(rows), markup=False, highlight=False, soft_wrap=True)

    main.__doc__ = f"Stage {stage.letter}: {stage.title}."
    return main
