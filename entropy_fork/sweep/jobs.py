"""The jobs of a Hydra sweep (``-m``): each in its own process, Ray session and folders, and a table of all of them.

Hook: the Hydra launcher in ``hydra_plugins/entropy_fork/launcher.py``, which hands over the composed jobs. A job is the
command that one would type for it alone, ``python -m verl.trainer.main_ppo OVERRIDES``, so it runs exactly like a
single run. The price is that Python and verl start again for each job.

Two things go wrong in stock verl:

- It runs all jobs in one process. The second job still has the Ray session and the actors of the first one, so it finds
  no free GPU. It also has the environment variables that ``run_ppo`` set for Ray's workers. And a crash or a
  ``SystemExit`` of one job ends all of them. ``ray.shutdown()`` between the jobs would help only against the first.
- The jobs share ``trainer.experiment_name``, and with it the folder of checkpoints. With ``trainer.resume_mode=auto``
  the second job would resume from the *first one's* last checkpoint, find its training done, and end without an error.
  :class:`Places` gives each job its own names.
"""

from __future__ import annotations

import csv
import ctypes
import hashlib
import io
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from entropy_fork.common.foreign_text import spreadsheet_cell, visible
from entropy_fork.common.output_folder import write_whole
from entropy_fork.common.processes import end_processes
from entropy_fork.watch.output import Reader as RunOutput
from entropy_fork.watch.output import Step, text_and_process
from entropy_fork.watch.view import View

NAME = "trainer.experiment_name"

#: folders that verl and the plugin write to, under names that are the same for all jobs
FOLDERS = (
    "trainer.default_local_dir",
    "trainer.default_hdfs_dir",
    "trainer.rollout_data_dir",
    "trainer.validation_data_dir",
    "entropy_fork.dump_dir",
)

#: in the environment of every process that a job starts on this machine
MARK = "ENTROPY_FORK_SWEEP_JOB"

FINISHED, FAILED, INTERRUPTED, NOT_RUN = "finished", "failed", "interrupted", "not run"


@dataclass(frozen=True)
class Job:
    """One job, ready to run.

    Attributes:
        number: Hydra's ``job.num``.
        swept: the overrides in which it differs from the others.
        command: the command that is executed.
        directory: Hydra's output directory of the job.
        name: its ``trainer.experiment_name``; None in an application without one.
        environment: variables that are added to the environment of the sweep.
        short_output: whether the sweep shows one line per step of the job, not everything that it prints.
    """

    number: int
    swept: list[str]
    command: list[str]
    directory: Path
    name: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    short_output: bool = False

    @property
    def log(self) -> Path:
        """The file with everything that the job and verl's processes printed."""
        return self.directory / "output.log"


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        metrics: the last value of each metric that verl's console logger printed, and its step.
        error: why the job did not finish, in one line; None if it did.
    """

    job: Job
    status: str
    seconds: float = 0.0
    metrics: dict[str, tuple[float, int]] = field(default_factory=dict)
    error: str | None = None

    @property
    def step(self) -> int | None:
        """The last step that was logged."""
        return max((step for _, step in self.metrics.values()), default=None)

    @property
    def validation(self) -> dict[str, tuple[float, int]]:
        """verl's main validation metrics: the mean accuracy over the answers to a question, one per benchmark."""
        return {key: value for key, value in self.metrics.items() if re.fullmatch(r"val-core/.*/mean@\d+", key)}

    @property
    def accuracy(self) -> tuple[float, int] | None:
        """The last validation's accuracy, averaged over the benchmarks, and its step."""
        if not self.validation:
            return None
        last = max(step for _, step in self.validation.values())
        return statistics.fmean(value for value, step in self.validation.values() if step == last), last


def swept_overrides(job: Sequence[str], typed: Sequence[str]) -> list[str]:
    """The overrides of a job that the sweep made: all that were not typed with a single value.

    Args:
        job: the overrides of the job, as the sweeper made them.
        typed: the overrides on the command line; those of ``hydra.sweeper.params`` are not there, and count as swept.
    """
    parsed = OverridesParser.create().parse_overrides(list(typed))
    fixed = {
        f"{override.get_key_element()}={override.get_value_element_as_str()}"
        for override in parsed
        if not override.is_sweep_override()
    }
    return [override for override in job if override not in fixed and override not in typed]


def short_form(swept: Sequence[str]) -> str:
    """A short name for a job, from its overrides, for files: ``entropy_fork.top_ratio=0.1`` becomes ``top_ratio=0.1``.

    The same overrides give the same name in every sweep, so that a sweep that is started again can continue.
    """
    pairs = [override.lstrip("+~").partition("=")[::2] for override in swept]
    last_parts = [re.split(r"[./]", key)[-1] for key, _ in pairs]
    shown = [last if last_parts.count(last) == 1 else key for last, (key, _) in zip(last_parts, pairs, strict=True)]
    exact = ",".join(f"{key}={value}" for key, (_, value) in zip(shown, pairs, strict=True))
    clean = re.sub(r"[^\w.=,+-]", "_", exact, flags=re.ASCII)
    if clean == exact and len(clean) <= 100:
        return clean
    return f"{clean[:90]}-{hashlib.sha256(exact.encode(errors='surrogatepass')).hexdigest()[:8]}"


class Places:
    """The names and folders of the jobs of one sweep, over all batches that its sweeper launches."""

    def __init__(self) -> None:
        self._taken: dict[str, set[str]] = {}

    def own(self, configs: Sequence[DictConfig], short_forms: Sequence[str]) -> list[dict[str, str]]:
        """Change the jobs so that no two of them share a name or a folder.

        A value that is already different for every job (``trainer.experiment_name='run-${hydra:job.num}'``) stays as it
        is. A single job in a batch gets its own name, because other batches may follow.

        Args:
            configs: the configs of a batch of jobs, each with its ``hydra`` node; they are changed.
            short_forms: the short name of each job; a job with an empty one stays as it is.

        Returns:
            For each job the values that were changed, by key.
        """
        changes: list[dict[str, str]] = [{} for _ in configs]
        for key in (NAME, *FOLDERS):
            taken = self._taken.setdefault(key, set())
            values = [value_of(config, key) for config in configs]
            given = [value for value in values if value is not None]
            are_distinct = len(given) > 1 and len(set(given)) == len(given) and not taken & set(given)
            for index, (value, form) in enumerate(zip(values, short_forms, strict=True)):
                if value is None:
                    continue
                if form and not are_distinct:
                    value = own = f"{value}-{form}" if key == NAME else os.path.join(value, form)
                    again = 2
                    while value in taken:  # the same overrides twice in one sweep
                        value, again = f"{own}-{again}", again + 1
                    changes[index][key] = value
                    OmegaConf.update(configs[index], key, value)
                taken.add(value)
        return changes


@contextmanager
def hydra_config(config: DictConfig) -> Iterator[None]:
    """Resolve ``${hydra:…}`` in this block with this job's config, as Hydra does while it runs a job."""
    instance = HydraConfig.instance()
    before = instance.cfg
    try:
        instance.set_config(config)
        yield
    finally:
        instance.cfg = before


def value_of(config: DictConfig, key: str) -> str | None:
    """A resolved value; None if it is null, absent, or cannot be resolved (the job itself will then say why)."""
    try:
        with hydra_config(config):
            value = OmegaConf.select(config, key)
    except OmegaConfBaseException:
        return None
    return None if value is None else str(value)


def continues_from(config: DictConfig) -> str | None:
    """The checkpoint from which verl will resume by itself: that of the same job in an earlier run of this sweep."""
    folder = value_of(config, "trainer.default_local_dir")
    if folder is None or value_of(config, "trainer.resume_mode") != "auto":
        return None
    tracker = Path(folder, "latest_checkpointed_iteration.txt")
    return str(Path(folder, f"global_step_{tracker.read_text().strip()}")) if tracker.is_file() else None


def own_environment(form: str) -> dict[str, str]:
    """For one job, the two variables that say where verl's loggers write, if the user has set them."""
    own = {}
    if folder := os.environ.get("TENSORBOARD_DIR"):
        own["TENSORBOARD_DIR"] = os.path.join(folder, form)
    if file := os.environ.get("VERL_FILE_LOGGER_PATH"):
        stem, ending = os.path.splitext(file)
        own["VERL_FILE_LOGGER_PATH"] = f"{stem}-{form}{ending}"
    return own if form else {}


def command(
    program: Sequence[str], hydra_overrides: Sequence[str], job: Sequence[str], changes: Mapping[str, object]
) -> list[str]:
    """The command line of one job alone.

    Args:
        program: interpreter, program and Hydra's flags (``--config-name=…``).
        hydra_overrides: the overrides on the sweep's command line that start with ``hydra``.
        job: the other overrides of the job.
        changes: values that replace those of the sweep, by key.
    """
    of_the_sweep = re.compile(r"\+*hydra[./](mode|launcher|sweeper|sweep)\b")
    kept = [
        override
        for override in (*hydra_overrides, *job)
        if not of_the_sweep.match(override) and override.lstrip("+").partition("=")[0] not in changes
    ]
    quoted = {key: QuotedString(str(value), Quote.single).with_quotes() for key, value in changes.items()}
    return [*program, *kept, *(f"{key}={value}" for key, value in quoted.items()), "hydra.mode=RUN"]


def run(job: Job, grace_s: float) -> Outcome:
    """Run a job to its end. When this returns, every process that it started on this machine has ended.

    Ctrl-C (or SIGTERM) is passed on to the job once. A second one kills the job.

    Args:
        job: its command, environment and folder.
        grace_s: seconds that a job may go on after Ctrl-C, and that its other processes may go on after its end.
    """
    job.directory.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    # Unbuffered: else what verl prints would come in blocks of 8 KB, long after its tracebacks.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **job.environment, MARK: mark}
    started = time.monotonic()
    is_interrupted = False
    with _sigterm_is_ctrl_c(), open(job.log, "wb") as log:
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C of the terminal reaches only the sweep, which passes it on once
            preexec_fn=_in_the_job,
        )
        assert process.stdout is not None
        reader = _Reader(
            process.stdout, log, View(Console(emoji=False), place=str(job.log)) if job.short_output else None
        )
        reader.start()
        try:
            code = process.wait()
        except KeyboardInterrupt:
            is_interrupted = True
            code = _stop(process, grace_s)
        try:
            _end(mark, grace_s, reader)
        except KeyboardInterrupt:
            is_interrupted = True
            _end(mark, 0, reader)
    seconds = time.monotonic() - started
    if is_interrupted:
        return Outcome(job, INTERRUPTED, seconds, reader.metrics, "stopped by Ctrl-C or SIGTERM")
    if code != 0:
        return Outcome(job, FAILED, seconds, reader.metrics, _reason(code, reader))
    return Outcome(job, FINISHED, seconds, reader.metrics)


def _end(mark: str, grace_s: float, reader: threading.Thread) -> None:
    """End the processes of the job, until none is left that could print.

    A process that is just starting has no environment yet by which it could be found, but it holds the job's output.
    """
    end_processes(MARK, mark, grace_s)
    reader.join(1)
    while reader.is_alive():
        end_processes(MARK, mark, grace_s)
        reader.join(1)


def _stop(process: subprocess.Popen[bytes], grace_s: float) -> int:
    process.send_signal(signal.SIGINT)
    try:
        return process.wait(grace_s)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        return process.wait()


@contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, which Slurm or a supervisor sends, end a sweep as Ctrl-C does. Works only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _in_the_job() -> None:
    """Runs in the new process before the program: make sure that signals end it."""
    # a shell script makes its background processes ignore Ctrl-C, and children inherit that
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        # get SIGTERM when the sweep is killed (SIGKILL), so that no job is left over
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class _Reader(threading.Thread):
    """Copies what a job prints to the terminal and to its log, and remembers its metrics and its last error."""

    _EXCEPTION = re.compile(r"^(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Fault)\b(?:\(\w+\))?(?::|$)")
    _HINT = "Set the environment variable HYDRA_FULL_ERROR"

    def __init__(self, pipe: IO[bytes], log: IO[bytes], view: View | None):
        super().__init__(daemon=True)
        self._pipe = pipe
        self._view = view
        self._output = RunOutput()
        self._sinks: list[IO[bytes]] = [log] if view else [sys.stdout.buffer, log]
        self.metrics: dict[str, tuple[float, int]] = {}
        self.exception = ""
        self.last_line = ""

    def run(self) -> None:
        with self._view or nullcontext():
            self._read()

    def _read(self) -> None:
        rest = b""
        while chunk := self._pipe.read1(1 << 16):  # type: ignore[attr-defined]
            for sink in list(self._sinks):
                try:
                    sink.write(chunk)
                    sink.flush()
                except OSError:  # a closed terminal, a full disk: go on reading, or the job would wait for ever
                    self._sinks.remove(sink)
            *lines, rest = re.split(rb"[\r\n]", rest + chunk)
            for line in lines:
                self._see(line.decode(errors="replace"))
        self._see(rest.decode(errors="replace"))

    def _see(self, line: str) -> None:
        with suppress(Exception):  # whatever a terminal does, the job must be able to write on
            if self._view:
                self._view.feed(line)
        step = self._output.read(line)
        text, process = text_and_process(line)
        if isinstance(step, Step):
            for name, value in step.metrics.items():
                if math.isfinite(value):
                    self.metrics[name] = (value, step.number)
        elif not process and text and not text.startswith(self._HINT):  # by the job's own process, not by a worker
            self.last_line = text
            if self._EXCEPTION.match(text):
                self.exception = text


def _reason(code: int, reader: _Reader) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        killed = f"killed by {name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
        return f"{killed}; its last words: {reader.last_line}" if reader.last_line else killed
    return reader.exception or reader.last_line or f"exit code {code}"


def as_table(outcomes: Sequence[Outcome]) -> Any:
    """The jobs as a table of rich."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="sweep")
    for title in ("job", "overrides", "status", "time", "step", "accuracy @step", "kept"):
        table.add_column(title, justify="left" if title in ("overrides", "status") else "right")
    colours = {FINISHED: "green", FAILED: "red", INTERRUPTED: "yellow", NOT_RUN: "dim"}
    for outcome in outcomes:
        kept = outcome.metrics.get("entropy_fork/kept_ratio")
        table.add_row(
            str(outcome.job.number),
            Text("\n".join(map(visible, outcome.job.swept))),
            Text(outcome.status, colours[outcome.status]),
            _duration(outcome.seconds) if outcome.seconds else "",
            "" if outcome.step is None else str(outcome.step),
            "" if outcome.accuracy is None else "{:.1%} @{}".format(*outcome.accuracy),
            "" if kept is None else f"{kept[0]:.4f}",
        )
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def print_results(outcomes: Sequence[Outcome], results: Path) -> None:
    """Print the table of a sweep, and for each job that did not finish its error and its log."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(emoji=False, width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print()
    console.print(as_table(outcomes))
    for outcome in outcomes:
        if outcome.error:
            console.print(
                f"job {outcome.job.number} {outcome.status}: {escape(visible(outcome.error))}", soft_wrap=True
            )
            if outcome.job.log.exists():
                console.print(f"  its output: {escape(str(outcome.job.log))}", soft_wrap=True)
    console.print(f"all of it, with the metrics of each benchmark: {escape(str(results))}", soft_wrap=True)


def write_results(outcomes: Sequence[Outcome], file: Path) -> None:
    """Write the table as CSV, never half-written: a row per job, a column per validation metric."""
    metrics = sorted({key for outcome in outcomes for key in outcome.validation})
    head = ["job", "overrides", "status", "seconds", "step", "accuracy", "accuracy_step", "kept_ratio", *metrics]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(spreadsheet_cell, [*head, "experiment_name", "directory", "error"]))
    for outcome in outcomes:
        accuracy, accuracy_step = outcome.accuracy or ("", "")
        kept, _ = outcome.metrics.get("entropy_fork/kept_ratio", ("", 0))
        measured = [outcome.validation.get(key, ("", 0))[0] for key in metrics]
        job = outcome.job
        how = [job.number, " ".join(job.swept), outcome.status, round(outcome.seconds, 1), outcome.step]
        what = [accuracy, accuracy_step, kept, *measured]
        writer.writerow(map(spreadsheet_cell, [*how, *what, job.name, str(job.directory), outcome.error]))
    write_whole(file, text.getvalue())
