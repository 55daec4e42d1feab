"""Compare answers in child processes that can be stopped, so that time and memory of a comparison are limited.

Sooner or later a model in training writes ``9^{9^{9^9}}``. To compare it would take longer than the run, inside one C
function that no exception and no thread can interrupt. math-verify's own time limits are signals, which work only in a
main thread, and a reward worker calls from threads. So the comparison runs in a child, and the kernel enforces limits:

- time: a timer of the child's processor time, set for each comparison, ends the process. It counts the child's own
  seconds, so a busy machine does not make a right answer wrong, and it works also when the parent is gone. The parent
  waits :data:`WALL_FACTOR` times as long by the clock, and then kills the child.
- memory: ``RLIMIT_AS``.
- code: once a child is ready, no text becomes code in it, see :func:`_refuse_code_from_text`.

The next comparison replaces a child that ended. Children are plain subprocesses that talk JSON lines over pipes.
(multiprocessing cannot start children in some actors, and would import the parent's main module, which is verl.) They
import math-verify and the room ``reward``, but no torch. They end when their input ends, which happens at the latest
when the parent dies, in whatever way.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, NamedTuple

from entropy_fork.reward.convention import STRICT, Convention

#: how much longer than its processor time a comparison may take by the clock
WALL_FACTOR = 4

#: seconds that a child may take to import math-verify (0.6 s on an idle machine)
START_SECONDS = 120.0


class Verdict(NamedTuple):
    """The result of a comparison."""

    equal: bool
    #: whether the answer was read as words or as mathematics that math-verify's parser takes
    parseable: bool
    #: whether a limit stopped it, or the answer would have been run as code; then the other two are False
    stopped: bool = False
    #: the rule that decided, in words
    why: str = ""
    #: what a scorer that knows half-right answers gave, from 0 to 1; math-verify gives none
    credit: float = 0.0


class JudgeError(RuntimeError):
    """A child cannot be started. The environment is at fault, not the answer."""


# ---------------------------------------------------------------------------------------------------------- the child


def compare(answer: str, truth: str, convention: Convention = STRICT) -> Verdict:
    """Compare two expressions in this process, without any limit. :mod:`entropy_fork.reward.grader` does it."""
    from entropy_fork.reward.grader import grade

    graded = grade(answer, truth, convention)
    return Verdict(graded.equal, graded.parseable, graded.stopped, graded.why)


# Where sympy makes code of its own text: numbers of variables, and a table of formulas. What these functions compile
# has nothing of an answer in it.
_OWN_CODE = (("sympy/polys/monomials.py", "_build"), ("sympy/simplify/hyperexpand.py", "add_formulae"))

_DIGITS = re.compile(r"\d+(\.\d*)?([eE][+-]?\d+)?|\.\d+", re.ASCII)

#: how often this process refused to make code from text
_refused = 0


def _refuse_code_from_text() -> None:
    """From now on no text becomes code in this process. This cannot be undone.

    math-verify takes ``\\hat{anything}`` for the name of a variable, and sympy writes names into the source of
    functions that it compiles. So an answer could run as Python, and give itself a reward or worse. No list of such
    places in sympy would be complete, so an audit hook is used (PEP 578): the interpreter announces every compilation,
    and all are refused except those of an import, of :data:`_OWN_CODE`, and of a plain number, which sympy reads with
    ``eval``.
    """
    from sympy import Poly
    from sympy.core import evalf

    def without_a_compiler(variable: Any, polynomial: Any) -> Any:
        """sympy computes the value of an infinite sum with this: the quotient of two terms is one of polynomials."""
        made = Poly(polynomial, variable)
        return lambda value: int(made.eval(value))

    evalf.lambdify = without_a_compiler

    def refuse(event: str, _: object) -> None:
        global _refused
        if event in ("compile", "exec") and not _is_harmless():
            _refused += 1
            raise PermissionError("text would become code")

    sys.addaudithook(refuse)


def _is_harmless() -> bool:
    """Whether the compilation under way is one of those that :func:`_refuse_code_from_text` lets through."""
    frame = sys._getframe(2)
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith("<frozen importlib._bootstrap"):
            return True
        if any(function == name and file.endswith(end) for end, name in _OWN_CODE):
            return True
        if function == "__new__" and file.endswith("sympy/core/numbers.py"):
            text = frame.f_locals.get("obj")
            return isinstance(text, str) and _DIGITS.fullmatch(text.strip()) is not None
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _ready_to_compare() -> None:
    compare(r"\frac{1}{2}+x", "1")  # imports, and builds the tables of the grammar
    _refuse_code_from_text()


def serve(
    memory_mib: int,
    get_ready: Callable[[], None] = _ready_to_compare,
    judged: Callable[[str, str], Verdict] | None = None,
) -> None:
    """Answer the requests on standard input, one line each, until it ends. Runs in the child.

    Args:
        memory_mib: the limit of its address space.
        get_ready: called once, within the limit of memory: imports, and refuses code from text from then on.
        judged: the verdict on an answer and what it is compared with; None: that of :func:`compare`.
    """
    import logging
    import resource

    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what sympy prints must not end up between the replies
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; this process ends with its input
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # elsewhere the system refuses this limit or does not keep it
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = memory_mib << 20 if hard == resource.RLIM_INFINITY else min(memory_mib << 20, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    logging.disable(logging.CRITICAL)  # math-verify warns at each call that its timeouts are off
    get_ready()

    # Caches grow, and near its limit a process would fail the next answer because of earlier ones. So it is replaced
    # when half of the memory that it had left at the start is in use.
    enough = (_address_space() + (memory_mib << 20)) // 2
    replies.write("ready\n")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)  # nobody reads this pipe any more, and a full one would block
    for line in sys.stdin:
        answer, truth, seconds, *switches = json.loads(line)
        refused_before = _refused
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            if judged is not None:
                verdict = judged(answer, truth)
            else:
                verdict = compare(answer, truth, *(Convention(*switches) for _ in switches[:1]))
        except (Exception, RecursionError, MemoryError):
            verdict = Verdict(False, False)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if _refused > refused_before and not verdict.equal:  # sympy tries some ways by compiling, and has others
            verdict = Verdict(False, False, stopped=True, why="text would have become code")
        last = _address_space() > enough
        replies.write(json.dumps([verdict, last]) + "\n")
        if last:
            return


def _address_space() -> int:
    """Bytes that RLIMIT_AS counts. (getrusage gives the parent's peak until this process exceeds it.)"""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


# --------------------------------------------------------------------------------------------------------- the parent

# The child gets the parent's path, because Ray may have added to it after the start.
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {} import serve; serve({})"

#: the module whose ``serve`` a child runs
_MATH_VERIFY = "entropy_fork.reward.judge"


class _Child:
    """One process, used by one thread at a time."""

    def __init__(self, memory_mib: int, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT.format(module, memory_mib), json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # the same verdict in every process; and numpy sets memory aside for each thread
            env={**os.environ, "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
        )

    def wait_until_ready(self) -> None:
        """Raise JudgeError with the child's own words if it does not start."""
        line = self._line(time.monotonic() + START_SECONDS)
        with self._pipe(self._process.stderr) as errors:
            if line == "ready":
                return
            if line is None:
                self._process.kill()
            self._process.wait()
            said = errors.read().decode(errors="replace").strip().splitlines()
            raise JudgeError(
                f"a process that compares answers ended before it was ready (exit status {self._process.returncode}): "
                f"{said[-1] if said else 'it said nothing'}. Is what it imports installed, and memory_mib large enough?"
            )

    def ask(self, answer: str, truth: str, seconds: float, switches: Convention) -> tuple[Verdict | None, bool]:
        """The verdict, None if the process ended for a reason other than a limit; and whether the child can go on."""
        try:
            pipe = self._pipe(self._process.stdin)
            pipe.write(json.dumps([answer, truth, seconds, *switches]).encode() + b"\n")
            pipe.flush()
            line = self._line(time.monotonic() + WALL_FACTOR * seconds)
        except BrokenPipeError:
            line = ""
        if line:
            verdict, last = json.loads(line)
            return Verdict(*verdict), not last
        out_of_time = line is None or self._process.wait() == -signal.SIGPROF
        return Verdict(False, False, stopped=True, why="the limit of time") if out_of_time else None, False

    def end(self) -> None:
        """End the process and wait for it, so that no zombie is left."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):  # a request was never read
                self._pipe(pipe).close()

    def _line(self, deadline: float) -> str | None:
        """The next line of the process: empty if it ended, None if the deadline passed."""
        file = self._pipe(self._process.stdout).fileno()
        poll = select.poll()  # not select(): a reward worker can have more than 1024 files open
        poll.register(file, select.POLLIN)
        line = b""
        while not line.endswith(b"\n"):
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            part = os.read(file, 4096)
            if not part:
                return ""
            line += part
        return line.decode().strip()

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None  # opened with PIPE
        return pipe


class Judges:
    """Up to ``processes`` children, started when needed, shared by any number of threads.

    Args:
        processes: at most this many comparisons at the same time; others wait for their turn.
        memory_mib: address space of one child in MiB.
        module: the module whose ``serve`` they run.
    """

    def __init__(self, processes: int, memory_mib: int, module: str = _MATH_VERIFY) -> None:
        self._memory_mib, self._module = memory_mib, module
        self._turns = threading.Semaphore(processes)
        self._idle: list[_Child] = []
        self._children: set[_Child] = set()
        self._closed = False
        atexit.register(self.close)

    def compare(self, answer: str, truth: str, seconds: float, convention: Convention = STRICT) -> Verdict:
        """Compare within ``seconds`` of processor time.

        Raises:
            JudgeError: no child could be started.
        """
        with self._turns:
            # A process can end without fault of the answer (the kernel had no memory left): try a second time.
            for _ in range(2):
                verdict = self._compare(answer, truth, seconds, convention)
                if verdict is not None:
                    return verdict
        return Verdict(False, False, stopped=True, why="the process ended twice")

    def _compare(self, answer: str, truth: str, seconds: float, convention: Convention) -> Verdict | None:
        child = self._take()
        usable = False
        try:
            verdict, usable = child.ask(answer, truth, seconds, convention)
        finally:  # also if this thread is interrupted between question and answer
            if usable:
                self._idle.append(child)
            else:
                self._children.discard(child)
                child.end()
        return verdict

    def _take(self) -> _Child:
        if self._closed:
            raise JudgeError("answers cannot be compared while the interpreter shuts down")
        try:
            return self._idle.pop()
        except IndexError:
            pass
        try:
            child = _Child(self._memory_mib, self._module)
        except OSError as error:
            raise JudgeError(f"a process that compares answers cannot be started: {error}") from error
        self._children.add(child)
        try:
            child.wait_until_ready()
        except BaseException:
            self._children.discard(child)
            child.end()
            raise
        return child

    def close(self) -> None:
        """End all children."""
        self._closed = True
        while self._children:
            self._children.pop().end()


_pools: dict[tuple[int, int, str], Judges] = {}
_lock = threading.Lock()


def judges(processes: int, memory_mib: int, module: str = _MATH_VERIFY) -> Judges:
    """The children of this process, of this number, size and module."""
    with _lock:
        pool = _pools.get((processes, memory_mib, module))
        if pool is None:
            pool = _pools[processes, memory_mib, module] = Judges(processes, memory_mib, module)
        return pool


def _after_fork() -> None:
    """A forked process must not talk through its parent's pipes, nor end its parent's children."""
    global _pools, _lock
    for pool in _pools.values():
        atexit.unregister(pool.close)
    _pools, _lock = {}, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
