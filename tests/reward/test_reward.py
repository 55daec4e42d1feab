"""The reward: compare the last box mathematically, with limits on time and memory, in threads and actors."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from entropy_fork.reward import judge
from entropy_fork.reward.judge import JudgeError, Judges, judges
from entropy_fork.reward.score import MAX_CHARACTERS, compare, compute_score, last_boxed, plain_number

pytestmark = pytest.mark.process

#: pairs with a human's verdict in tests/reward/answer_pairs.tsv; all are graded so
PAIRS = 318

#: without a limit, each of these takes minutes to years
ENDLESS = {
    "tower of exponents": "9^{9^{9^9}}",
    "factorial": "100000000!",
    "factorial of a factorial": "((10!)!)!",
    "integral": r"\int_0^1 \frac{\sin(x^x)\sqrt{x^5+1}}{\ln(x+2)^{x}} dx",
    "power of a matrix": r"\begin{pmatrix}x&y&z\\y&z&x\\z&x&y\end{pmatrix}^{100}",
}

#: these took as long, until values at points were compared first
ENDLESS_BEFORE = {"binomial": r"\binom{10^{9}}{5\cdot 10^{8}}", "power of a sum": "(x+y+z+w)^{200}"}

#: keeps a process busy for seconds, in one function
BUSY = ENDLESS["integral"]


@pytest.mark.parametrize(
    ("answer", "truth", "right", "parseable"),
    [
        (r"so \boxed{32}", "32", 1, 1),
        (r"\boxed{31} no, \boxed{32}", "32", 1, 1),
        (r"\boxed{32} no, \boxed{31}", "32", 0, 1),
        (r"\boxed{\frac{1}{2}}", "0.5", 1, 1),
        (r"\boxed{0.50}", r"\frac{1}{2}", 1, 1),
        (r"\boxed{x^2 + 1}", "1 + x^2", 1, 1),
        ("the answer is 32", "32", 0, 0),
        (r"\boxed{}", "32", 0, 0),
        (r"\boxed{ }", "32", 0, 0),
        (r"\boxed{32", "32", 0, 0),
        (r"\boxed{32} and then \boxed{31", "32", 1, 1),
        (r"\boxed{a{b}c} \boxed{3{", "7", 0, 1),
        ("", "32", 0, 0),
        (r"\boxed{!?\{}", "32", 0, 0),
        (r"\boxed{???}", "32", 0, 0),
        (r"\boxed{???}", "???", 1, 1),
        # after any </think>
        (r"<think>\boxed{31}</think> \boxed{32}", "32", 1, 1),
        (r"<think>\boxed{32}</think> It is 32.", "32", 0, 0),
        (r"<think>\boxed{32}", "32", 1, 1),
        (r"<think>\boxed{32}</think>\boxed{31}</think>\boxed{30}", "30", 1, 1),
        # several accepted answers
        (r"\boxed{5}", ["4", "5"], 1, 1),
        (r"\boxed{6}", ["4", "5"], 0, 1),
        (r"\boxed{5}", 5, 1, 1),
        (r"\boxed{0.5}", 0.5, 1, 1),
    ],
)
def test_scores(answer: str, truth: Any, right: int, parseable: int) -> None:
    assert compute_score("any", answer, truth, {"index": 1}) == {
        "score": right, "acc": right, "format": parseable, "stopped": 0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{\frac{1}{2}} and text } {", r"\frac{1}{2}"),
        (r"\boxed{x=\boxed{5}}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\}} }", r"\}"),
        (r"\\boxed{5} \\boxed{", "5"),
        (r"\boxed 5 \boxed{4} \boxed", "4"),
        ("{{{ \\boxed{\n7\n}", "\n7\n"),
        (r"\boxed{1}\fbox{2}", "1"),
        ("boxed{1}", None),
    ],
)
def test_last_box(text: str, box: str | None) -> None:
    assert last_boxed(text) == box


@pytest.mark.parametrize("unit", [r"\boxed{", r"\boxed{{", "{", "}", "\\", r"\boxed", r"\boxed{1"])
def test_the_box_is_found_in_linear_time(unit: str) -> None:
    """A search from every box to the end of the text took minutes for the first of these texts."""
    text = unit * (1_000_000 // len(unit))
    begin = time.process_time()
    assert last_boxed(r"\boxed{7}" + text) == "7"
    assert time.process_time() - begin < 5


def test_agreement_with_a_human_grader() -> None:
    """Through the processes, with their limits and the guard against code."""
    with open(Path(__file__).with_name("answer_pairs.tsv"), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len({(row["answer"], row["ground truth"]) for row in rows}) == len(rows) == PAIRS
    wrong = [row for row in rows if compare(row["answer"], row["ground truth"]).equal != (row["grader"] == "=")]
    assert wrong == []


integers = st.integers(-(10**6), 10**6)
plain_numbers = st.one_of(
    integers.map(str),
    st.decimals(-1000, 1000, places=3).map(str),
    st.decimals(0, 1, places=7).map(lambda d: f"{d:f}"),
    st.tuples(integers, st.integers(1, 100)).map(lambda f: f"{f[0]}/{f[1]}"),
    st.tuples(integers, st.integers(1, 100)).map(lambda f: rf"-\dfrac{{{f[0]}}}{{{f[1]}}}"),
)


@settings(deadline=None)
@given(plain_numbers, st.one_of(plain_numbers, st.just("same")))
@example("1/3", "0.3333333")
@example("1/3", "0.33333")
@example("007", "7")
@example("-0", "0")
@example("3.0", "3")
@example(r"\frac{-1}{-3}", "1/3")
def test_plain_numbers_are_judged_as_by_the_grader(answer: str, truth: str) -> None:
    if truth == "same":
        value = plain_number(answer)
        assert value is not None
        truth = rf"\frac{{{value[0].numerator}}}{{{value[0].denominator}}}"
    assert compare(answer, truth)[:3] == judge.compare(answer, truth)[:3]


def test_plain_numbers() -> None:
    assert plain_number(r"-\tfrac{-3}{6}") == (Fraction(1, 2), False)
    assert plain_number("-0.25") == (Fraction(-1, 4), True)
    for other in ("", "1/0", r"\frac{1}{0}", "1,000", "x", "1.", "9" * 41, "٣", "1\n2", "--1"):
        assert plain_number(other) is None


@pytest.mark.parametrize("answer", ENDLESS.values(), ids=ENDLESS)
def test_an_endless_answer_is_stopped(answer: str) -> None:
    pool = judges(1, 256)
    pool.compare("x", "y", 5)  # start a child, so that its start does not count below
    begin = time.monotonic()
    score = compute_score("any", rf"\boxed{{{answer}}}", r"3\sqrt{2}+x", timeout=0.5, processes=1, memory_mib=256)
    assert time.monotonic() - begin < 0.5 * judge.WALL_FACTOR + 5  # seconds, for a busy machine
    assert score == {"score": 0, "acc": 0, "format": 0, "stopped": 1}
    assert pool.compare(r"\sqrt{8}", r"2\sqrt{2}", 5).equal


@pytest.mark.parametrize("answer", ENDLESS_BEFORE.values(), ids=ENDLESS_BEFORE)
def test_an_answer_that_was_endless_is_now_wrong_in_time(answer: str) -> None:
    score = compute_score("any", rf"\boxed{{{answer}}}", r"3\sqrt{2}+x", timeout=4)
    assert score == {"score": 0, "acc": 0, "format": 1, "stopped": 0}


@pytest.mark.parametrize(
    "answer",
    [
        "1+" * 50_000 + "1",
        r"\frac{" * 150 + "1" + "}{2}" * 150,
        r"\frac{1}{1+" * 80 + "1" + "}" * 80,
        r"\sqrt{" * 140 + "2" + "}" * 140,
        "(" * 400 + "1" + ")" * 400,
        "-" * 900 + "1",
        "\\" * 900,
        "\x00\ud800\n" * 100,
        "{}" * 400,
        "%" * 500,
    ],
    ids=["100,000 characters", "fractions", "fraction tower", "roots", "brackets", "signs", "backslashes", "no text",
         "braces", "percent"],
)  # fmt: skip
def test_a_monstrous_answer_is_wrong_and_harmless(answer: str) -> None:
    begin = time.monotonic()
    assert compute_score("any", rf"\boxed{{{answer}}}", r"7\sqrt{2}", timeout=1)["acc"] == 0
    assert time.monotonic() - begin < 1 * judge.WALL_FACTOR + 10  # a child may need to start
    assert compute_score("any", r"\boxed{\sqrt{98}}", r"7\sqrt{2}")["acc"] == 1


def test_a_long_box_is_wrong_without_being_parsed() -> None:
    long = "1+" * MAX_CHARACTERS + "1"
    assert compute_score("any", rf"\boxed{{{long}}}", "3") == {"score": 0, "acc": 0, "format": 0, "stopped": 0}
    assert compute_score("any", rf"\boxed{{{long}}}", long)["acc"] == 1
    assert compute_score("any", r"\boxed{1+1+1}", "3", max_characters=4)["acc"] == 0
    assert compute_score("any", r"\boxed{1+1+1}", "3", max_characters=5)["acc"] == 1


@pytest.fixture(scope="module")
def start_mib() -> int:
    """MiB that a process takes before its first answer. It depends on the Python, and is larger without bytecode."""
    for _ in range(2):  # the first process may have written the bytecode
        pool = Judges(1, 512)
        assert pool.compare("1+0", "1", 5).equal
        status = Path(f"/proc/{pool._idle[0]._process.pid}/status").read_text()
        pool.close()
    return int(re.findall(r"VmPeak:\s+(\d+) kB", status)[0]) // 1024


def test_memory_is_bounded(python: Callable[..., Any]) -> None:
    """An answer that needs gigabytes fails, and the same process judges the next one."""
    requests = [json.dumps([answer, "1", 5]) for answer in ("gigabytes", "1")]
    result = python(
        "-c",
        f"""
import io, sys
from entropy_fork.reward import judge
def compare(answer, truth):
    return judge.Verdict(len(bytearray(1 << 33 if answer == "gigabytes" else 1)) == 1, True)
judge.compare = compare
sys.stdin = io.StringIO({chr(10).join(requests)!r} + chr(10))
judge.serve(2048)
""",
    )
    assert result.stdout.splitlines() == [
        "ready", '[[false, false, false, "", 0.0], false]', '[[true, true, false, "", 0.0], false]',
    ], result.stderr  # fmt: skip


def test_many_threads() -> None:
    """Answers are right in all threads while other answers are endless, with no more processes than allowed."""
    answers = [ENDLESS["tower of exponents"] + f"+{i}" if i % 20 == 0 else rf"\sqrt{{{i * i}}}" for i in range(60)]
    with ThreadPoolExecutor(16) as threads:
        scores = list(
            threads.map(
                lambda i: compute_score("any", rf"\boxed{{{answers[i]}}}", f"{i}.0", timeout=2, processes=2), range(60)
            )
        )
        assert len(judges(2, 512)._children) <= 2
    assert [score["acc"] for score in scores] == [float(i % 20 != 0) for i in range(60)]
    assert [score["stopped"] for score in scores] == [float(i % 20 == 0) for i in range(60)]


def test_a_process_is_used_again(start_mib: int) -> None:
    """Also if the parent is larger than a child may be, like every reward worker. A grown process is not used again."""
    ballast = bytearray(os.urandom(1 << 20) * 300)
    pool = judges(1, 250)
    assert pool.compare("x+1", "1+x", 5).equal
    process = pool._idle[0]
    assert pool.compare("x+2", "2+x", 5).equal
    assert pool._idle == [process]
    assert len(ballast) > 250 << 20
    pool = judges(1, start_mib + 4)
    processes = set()
    for i in range(2, 120):
        assert pool.compare(rf"(x+{i})^2+\sin^2 y", rf"x^2+{2 * i}x+{i * i}+1-\cos^2 y", 5).equal
        processes |= set(pool._idle)
        if len(processes) > 1:
            return
    raise AssertionError("caches grow for ever")


def test_a_process_that_is_killed_costs_no_answer() -> None:
    pool = Judges(1, 256)
    assert pool.compare(r"\sqrt{8}", r"2\sqrt{2}", 5).equal
    os.kill(pool._idle[0]._process.pid, signal.SIGKILL)
    assert pool.compare(r"\sqrt{8}", r"2\sqrt{2}", 5).equal
    with ThreadPoolExecutor(1) as threads:
        verdict = threads.submit(pool.compare, BUSY, "2.5", 2)
        time.sleep(0.3)
        child = next(iter(pool._children))._process
        os.kill(child.pid, signal.SIGKILL)
        assert verdict.result().stopped  # by the second process, at its limit
    pool.close()
    assert child.returncode == -signal.SIGKILL
    with pytest.raises(JudgeError, match="shuts down"):
        pool.compare("x", "y", 1)


@pytest.mark.parametrize(
    ("truth", "limits", "message"),
    [
        (None, {}, "ground truth None cannot be compared"),
        ("", {}, "ground truth '' cannot"),
        ([], {}, r"ground truth \[\] cannot"),
        ({"a": 1}.items(), {}, "ground truth"),
        (True, {}, "ground truth True"),
        ("1", {"timeout": 0}, r"reward_kwargs.timeout must be positive, not 0"),
        ("1", {"processes": -1}, r"reward_kwargs.processes must be positive, not -1"),
    ],
)
def test_bad_input_is_said(truth: Any, limits: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_score("any", r"\boxed{1}", truth, **limits)


def test_processes_that_cannot_start_are_an_error_and_not_a_wrong_answer() -> None:
    with pytest.raises(JudgeError, match=r"ended before it was ready .*MemoryError.*memory_mib large enough"):
        compute_score("any", r"\boxed{x+1}", "1+x", memory_mib=30)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):  # it may end between opening and reading
        return False


@pytest.mark.parametrize("ending", ["pass", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_no_process_is_left_behind(python: Callable[..., Any], ending: str) -> None:
    """An idle child, and one in an endless answer, end with the parent, whatever ends the parent."""
    result = python("-c", f"""
import os, signal, threading, time
from entropy_fork.reward.judge import judges
pool = judges(2, 256)
pool.compare("x", "y", 5)
idle = pool._idle[0]
threading.Thread(target=pool.compare, args=({BUSY!r}, "2.5", 3), daemon=True).start()
time.sleep(0.2)
threading.Thread(target=pool.compare, args=("x", "y+1", 3), daemon=True).start()
while len(pool._idle) < 1: time.sleep(0.1)
print(*(child._process.pid for child in pool._children), flush=True)
{ending}
""")  # fmt: skip
    children = [int(pid) for pid in result.stdout.split()]
    assert len(children) == 2, result.stderr
    deadline = time.monotonic() + 20
    while any(map(_running, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_running, children))


def test_a_forked_process_has_children_of_its_own() -> None:
    pool = judges(1, 256)
    assert pool.compare("x+1", "1+x", 5).equal
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            own = judges(1, 256)
            status = 0 if own is not pool and own.compare("x+1", "1+x", 5).equal else 1
            own.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert pool.compare("x+2", "2+x", 5).equal


def test_imports_are_cheap(python: Callable[..., Any]) -> None:
    heavy = "{'torch', 'verl', 'numpy', 'ray'} & set(sys.modules)"
    worker = python(
        "-c", f"import sys, entropy_fork.reward; print({heavy} | ({{'math_verify', 'sympy'}} & set(sys.modules)))"
    )
    child = python(
        "-c", f"import sys; from entropy_fork.reward.judge import compare; compare('x', 'y'); print({heavy})"
    )
    assert (worker.stdout, child.stdout) == ("set()\n", "set()\n"), worker.stderr + child.stderr


OVERRIDES = ("+recipe=dapo", "data.max_response_length=64", "reward.reward_kwargs.overlong_buffer_cfg.len=16")


def test_verl_finds_it_and_hands_over_the_limits(compose: Callable[..., Any]) -> None:
    from verl.trainer.ppo.reward import get_custom_reward_fn

    config = compose(*OVERRIDES, "+reward.custom_reward_function.reward_kwargs.max_characters=3")
    function = get_custom_reward_fn(config)
    assert function is not None
    row = {"data_source": "any", "ground_truth": "3", "extra_info": {}}
    assert function(solution_str=r"\boxed{1+2}", **row)["acc"] == 1
    assert function(solution_str=r"\boxed{1+1+1}", **row)["acc"] == 0
    mistyped = get_custom_reward_fn(compose(*OVERRIDES, "+reward.custom_reward_function.reward_kwargs.time_out=3"))
    assert mistyped is not None
    with pytest.raises(TypeError, match="time_out"):
        mistyped(solution_str=r"\boxed{3}", **row)


def test_verl_logs_acc_and_format() -> None:
    from verl.trainer.ppo.metric_utils import process_validation_metrics

    answers = [r"\boxed{32}", r"\boxed{31}", "32", r"\boxed{\sqrt{1024}}"]
    scores = [compute_score("aime", answer, "32") for answer in answers]
    columns = {key: [score[key] for score in scores] for key in scores[0]}
    metrics = process_validation_metrics(["aime"] * 4, ["q"] * 4, columns)["aime"]
    assert metrics["acc"]["mean@4"] == 0.5
    assert metrics["format"]["mean@4"] == 0.75
    assert metrics["stopped"]["mean@4"] == 0


RAY = r"""
import asyncio, os, sys, tempfile, time
import numpy as np, ray, torch
from omegaconf import OmegaConf
from verl import DataProto

answers = [r"\boxed{9^{9^{9^9}}+%d}" % i if i % 16 == 0 else rf"\boxed{{\sqrt{{{i * i}}}}}" for i in range(32)]
config = OmegaConf.load(sys.argv[1])

class Tokenizer:
    def decode(self, ids, skip_special_tokens):
        return answers[int(ids[0])]

@ray.remote(num_cpus=0)
class Worker:  # what verl's RewardLoopWorker does with a batch
    def __init__(self, config):
        from verl.trainer.ppo.reward import load_reward_manager
        self.manager = load_reward_manager(config, Tokenizer())
    async def score(self, rows):
        return await asyncio.gather(*(self.manager.run_single(row) for row in rows))
    async def children(self):
        from entropy_fork.reward.judge import _pools
        return [child._process.pid for pool in _pools.values() for child in pool._children]

rows = [DataProto.from_dict(
    {"responses": torch.tensor([[i] + [0] * 59]), "attention_mask": torch.ones(1, 61, dtype=torch.long)},
    {"data_source": np.array(["any"]), "reward_model": np.array([{"ground_truth": f"{i}.0"}], dtype=object)},
) for i in range(32)]
with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as directory:
    ray.init(num_cpus=1, include_dashboard=False, _temp_dir=directory, logging_level="ERROR")
    try:
        worker = Worker.remote(config)
        results = ray.get(worker.score.remote(rows))
        # An answer that is stopped ends its process. Ordinary answers, all at once, start what is missing again.
        ray.get(worker.score.remote([row for i, row in enumerate(rows) if i % 16]))
        children = ray.get(worker.children.remote())
        ray.kill(worker)
        deadline = time.monotonic() + 20
        running = children
        while running and time.monotonic() < deadline:
            time.sleep(0.1)
            running = [pid for pid in running if os.path.exists(f"/proc/{pid}")]
        print(len(children), len(running))
    finally:
        ray.shutdown()
for i, result in enumerate(results):
    info = result["reward_extra_info"]
    assert set(info) == {"score", "acc", "format", "stopped"}, info
    assert info["acc"] == float(i % 16 != 0) and info["stopped"] == float(i % 16 == 0), (i, info)
    assert abs(float(result["reward_score"]) - (info["acc"] - 12 / 16)) < 1e-6, result  # 60 tokens: 12 into the last 16
print("done")
"""


def test_in_a_ray_actor_under_verls_dapo_manager(
    compose: Callable[..., Any], python: Callable[..., Any], tmp_path: Path
) -> None:
    """verl's own manager scores 32 answers at once in an actor, in the threads of its event loop."""
    from omegaconf import OmegaConf

    config = compose(*OVERRIDES, "+reward.custom_reward_function.reward_kwargs.timeout=2",
                     "+reward.custom_reward_function.reward_kwargs.processes=2")  # fmt: skip
    (tmp_path / "config.yaml").write_text(
        OmegaConf.to_yaml(OmegaConf.create({"reward": OmegaConf.to_container(config.reward, resolve=True)}))
    )
    result = python("-c", RAY, "config.yaml", timeout=500)
    assert result.stdout.split() == ["2", "0", "done"], result.stdout + result.stderr[-3000:]
