"""What the reward costs: answers per second, its parts, the longest time of a hanging answer, the peak of memory.

    python benchmarks/reward.py

A step of the paper's runs has 8192 answers. Here each answer is the end of a text of 60,000 characters. No answer comes
twice, so no cache helps.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from entropy_fork.common.progress import track
from entropy_fork.reward import judge
from entropy_fork.reward.score import MEMORY_MIB, PROCESSES, TIMEOUT, compute_score

TEXT = "We add {both} sides, and so on, \\frac{1}{2} at a time. " * 1100

KINDS: dict[str, tuple[Callable[[int], str], Callable[[int], str]]] = {
    "plain numbers": (lambda i: str(i), lambda i: str(i % 1000)),
    r"\frac{}{} and decimals": (lambda i: rf"\frac{{{i}}}{{8}}", lambda i: f"{i / 8}"),
    "by math-verify: roots": (lambda i: rf"{i}\sqrt{{2}}", lambda i: rf"\sqrt{{{2 * i * i}}}"),
    "by math-verify: polynomials": (lambda i: f"x^2+{i}x+1", lambda i: f"1+x(x+{i})"),
}

PATHOLOGICAL = {
    "tower of exponents": "9^{9^{9^9}}",
    "fraction tower": r"\frac{1}{1+" * 80 + "1" + "}" * 80,
    "nested fractions": r"\frac{" * 90 + "1" + "}{2}" * 90,
    "nested roots": r"\sqrt{" * 140 + "2" + "}" * 140,
    "nested brackets": "(" * 400 + "1" + ")" * 400,
    "900 signs": "-" * 900 + "1",
    "100,000 characters": "1+" * 50_000 + "1",
    "1,000,000!": "1000000!",
    "100,000,000!": "100000000!",
    "((10!)!)!": "((10!)!)!",
    "binomial": r"\binom{10^{9}}{5\cdot 10^{8}}",
    "sum to 10^12": r"\sum_{i=1}^{10^{12}} \frac{1}{i^2}",
    "product to 10^6": r"\prod_{i=1}^{1000000} i",
    "integral": r"\int_0^1 \frac{\sin(x^x)\sqrt{x^5+1}}{\ln(x+2)^{x}} dx",
    "power of a sum": "(x+y+z+w)^{200}",
    "power of a matrix": r"\begin{pmatrix}x&y&z\\y&z&x\\z&x&y\end{pmatrix}^{100}",
    "nested functions": r"\sin(\cos(\tan(\sin(\cos(\tan(\sin(\cos(\tan(x)))))))))^{20}",
    "nested radicals": r"\sqrt{\sqrt{\sqrt{x+1}+\sqrt{y+1}}+\sqrt{\sin(x)+\cos(y)^{z}}}\tan(x y z)",
    "modular power": r"2^{10^{18}} \mod 7",
    "float power": "10.0^{9999999999}",
    "900 decimals": "0." + "1" * 900,
    "set of 90 roots": r"\{" + ",".join(rf"\sqrt{{{i}}}" for i in range(90)) + r"\}",
    "gigabytes": "2^{2^{36}}",
    "binomial of numbers": r"\binom{30000000}{15000000}",
}


#: an equation that sympy expands, and the ground truth beside it
LARGE = ("(x+1)^{9000}+x=1", "x=1")


def throughput(count: int) -> Table:
    """Answers per second, for right and wrong answers of four kinds."""
    table = Table(
        "answers", "one thread", "8 threads", title="answers per second, each at the end of 60,000 characters"
    )
    start = 1000
    for kind, (answer, truth) in KINDS.items():
        number = count if kind in list(KINDS)[:2] else count // 20
        rates = []
        for threads in track(kind, (1, 8)):
            # Start the processes that compare, as they are running after the first step.
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda i: compute_score("", rf"\boxed{{x+{i}}}", f"{i}+y"), range(-start, -start + 16)))
                rows = [(rf"{TEXT}\boxed{{{answer(i)}}}.", truth(i)) for i in range(start, start + number)]
                begin = time.perf_counter()
                list(pool.map(lambda row: compute_score("", *row), rows))
                rates.append(number / (time.perf_counter() - begin))
            start += number
        table.add_row(kind, *(f"{rate:,.0f}" for rate in rates))
    return table


def opinion(count: int) -> Table:
    """Processor time of the parts of a comparison, in this process, and of math-verify's own comparison beside them."""
    import logging

    from math_verify import verify

    from entropy_fork.reward.grader import grade
    from entropy_fork.reward.reading import read
    from entropy_fork.reward.second_opinion import agree
    from entropy_fork.reward.spelling import spelled
    from entropy_fork.reward.values import value_of

    logging.disable(logging.CRITICAL)  # math-verify warns that its limits are off
    table = Table(
        "answers", "reading", "parsing", "values", "(math-verify)", "sum without it",
        title="milliseconds of processor time per answer; in brackets what math-verify's comparison would take",
    )  # fmt: skip
    start = 5000
    for kind, (answer, truth) in list(KINDS.items())[2:]:
        for right in (True, False):
            numbers = range(start, start + count)
            texts = [(answer(i if right else i + count), truth(i)) for i in numbers]
            grade(*texts[0])
            readings, reading = _timed(
                lambda texts=texts: [tuple(read(spelled(text)) for text in pair) for pair in texts]
            )
            values, parsing = _timed(lambda made=readings: [tuple(value_of(side) for side in pair) for pair in made])
            _, points = _timed(lambda made=values: [agree(*pair) for pair in made])
            _, verified = _timed(lambda made=values: [verify(b, a, timeout_seconds=None) for a, b in made])
            spent = (reading, parsing, points, verified, reading + parsing + points)
            name = f"{kind}, {'right' if right else 'wrong'}"
            table.add_row(name, *(f"{1000 * seconds / count:.2f}" for seconds in spent))
            start += 2 * count
    logging.disable(logging.NOTSET)
    return table


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.process_time()
    return work(), time.process_time() - begin


def worst_times() -> Table:
    """Clock seconds and processor seconds for each answer that would hang or need too much memory."""
    table = Table("answer", "seconds", "processor seconds", "stopped", title=f"limit: {TIMEOUT} processor seconds")
    pool = judge.judges(1, MEMORY_MIB)
    for name, answer in track("answers that would hang", PATHOLOGICAL.items()):
        pool.compare("x", "y", TIMEOUT)  # so that a process is running
        before, begin = _children_seconds(pool), time.perf_counter()
        score = compute_score("", rf"\boxed{{{answer}}}", r"3\sqrt{2}+x", processes=1)
        seconds = time.perf_counter() - begin
        used = _children_seconds(pool) - before
        table.add_row(name, f"{seconds:.2f}", f"{used:.2f}" if used >= 0 else "-", "yes" if score["stopped"] else "no")
    return table


def _children_seconds(pool: judge.Judges) -> float:
    """Processor seconds of all children, running ones and those that have ended."""
    ended = os.times()
    living = 0.0
    for child in list(pool._children):
        fields = Path(f"/proc/{child._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        living += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return ended.children_user + ended.children_system + living


def memory(seconds: float) -> Table:
    """The largest resident size of a process while it compares an answer that fills memory."""
    table = Table("memory_mib", "peak, MiB", "seconds", "stopped by the timer", title=f"{LARGE[0]}, resident memory")
    for memory_mib in track("limits of memory", (72, 128, 256, MEMORY_MIB, 4096)):
        pool = judge.Judges(1, memory_mib)
        pool.compare("x", "y", seconds)
        pid, peak, done = pool._idle[0]._process.pid, 0, threading.Event()

        def watch(pid: int = pid, done: threading.Event = done) -> None:
            nonlocal peak
            while not done.wait(0.02):
                try:
                    peak = max(peak, int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) // 1024)
                except (OSError, IndexError):
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        begin = time.perf_counter()
        verdict = pool.compare(*LARGE, seconds)
        table.add_row(
            f"{memory_mib}", f"{peak}", f"{time.perf_counter() - begin:.1f}", "yes" if verdict.stopped else "no"
        )
        done.set()
        watcher.join()
        pool.close()
    return table


def main(
    count: Annotated[int, typer.Option(help="plain answers to score; of the slower kinds a twentieth")] = 8192,
    memory_seconds: Annotated[float, typer.Option(help="processor seconds for the answer that fills memory")] = 10,
) -> None:
    """Print four tables."""
    console = Console()
    console.print(f"{PROCESSES} processes compare")
    console.print(throughput(count))
    console.print(opinion(max(20, count // 80)))
    console.print(worst_times())
    console.print(memory(memory_seconds))


if __name__ == "__main__":
    typer.run(main)
