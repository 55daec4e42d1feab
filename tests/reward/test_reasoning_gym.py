"""Rows that reasoning-gym generated: its own scorers, within limits, and without running what a model wrote."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.reward import compute_score, reasoning_gym
from entropy_fork.reward.judge import judges
from entropy_fork.reward.reasoning_gym import ground_truth_of, without_latex

#: scorers that cannot be used: no right answer is known, or the scorer reads tuples, which JSON does not have
WITHOUT = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour", "arc_agi", "rearc"}


def entry_of(task: str, number: int = 0, **options: Any) -> tuple[Any, dict[str, Any]]:
    from reasoning_gym.factory import DATASETS

    dataset, config = DATASETS[task]
    made = dataset(config=config(seed=1, size=number + 1, **options))
    return made, made[number]


def score(task: str, answer: str, truth: Any = None, **limits: float) -> dict[str, float]:
    if truth is None:
        truth = ground_truth_of(*entry_of(task), {})
    return compute_score(f"reasoning_gym/{task}", answer, truth, **limits)


def tasks() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - {"composite"})


@pytest.mark.process
def test_each_tasks_right_answer_is_right() -> None:
    wrong = set()
    for task in tasks():
        dataset, entry = entry_of(task)
        truth = ground_truth_of(dataset, entry, {})
        scored = None if truth is None else score(task, f"so \\boxed{{{entry['answer']}}}", truth)
        if scored != {"score": 1.0, "acc": 1.0, "format": 1.0, "stopped": 0.0}:
            wrong.add(task)
    assert wrong == WITHOUT


@pytest.mark.process
@pytest.mark.parametrize(
    ("task", "answer", "truth", "expected"),
    [
        ("chain_sum", r"\boxed{+4.0}", "4", 1.0),
        ("chain_sum", r"\boxed{1,004}", "1004", 1.0),
        ("chain_sum", r"\boxed{14}", "4", 0.5),  # its scorer gives a part where the right answer is in the text
        ("chain_sum", r"\boxed{5}", "4", 0.0),
        ("chain_sum", "4", "4", 0.0),
        ("chain_sum", r"\boxed{4} or \boxed{5}", "4", 0.0),
        ("calendar_arithmetic", r"\boxed{\text{Friday}}", None, 1.0),
        ("dice", r"\boxed{\frac{737}{960}}", "737/960", 1.0),
        ("spell_backward", r"\boxed{ainomma}", "ainomma", 1.0),
        ("countdown", r"\boxed{94 \times 4 - 61 - 6}", None, 1.0),
        ("polynomial_multiplication", r"\boxed{x + x}", "2*x", 1.0),
        ("simple_integration", r"\boxed{-34*x**8/15 - 5*x/4 + 7 + C}", None, 1.0),
    ],
)
def test_scores(task: str, answer: str, truth: str | None, expected: float) -> None:
    scored = score(task, answer, truth)
    assert scored["score"] == expected
    assert scored["acc"] == float(expected == 1.0)
    assert scored["format"] == float("boxed" in answer)


def test_the_ground_truth_holds_no_more_than_the_scorer_reads() -> None:
    assert ground_truth_of(*entry_of("chain_sum"), {}) == entry_of("chain_sum")[1]["answer"]
    whole = ground_truth_of(*entry_of("countdown"), {})
    assert whole is not None
    kept = json.loads(whole.removeprefix("reasoning_gym "))
    assert set(kept) == {"answer", "metadata"}
    options = {"max_num_decimal_places": 3}
    rounded = ground_truth_of(*entry_of("decimal_arithmetic", **options), options)
    assert rounded is not None
    assert json.loads(rounded.removeprefix("reasoning_gym "))["options"] == options
    # a list in Python's notation is no answer to our other checks of data, so it is wrapped
    listed = ground_truth_of(*entry_of("number_filtering"), {})
    assert listed is not None
    assert listed.startswith('reasoning_gym {"answer": "[')


@pytest.mark.process
def test_the_options_reach_the_scorer() -> None:
    whole = 'reasoning_gym {"answer": "2*3*4*1", "options": {"max_value": %d, "data_file": "/etc/passwd", "size": -1}}'
    assert score("puzzle24", r"\boxed{2*3*4*1}", whole % 10)["acc"] == 1.0
    assert score("puzzle24", r"\boxed{2*3*4*1}", whole % 3)["acc"] == 0.0


HOSTILE = {
    "import": "__import__('pathlib').Path('{file}').touch()",
    "in a list": "[[__import__('pathlib').Path('{file}').touch()]]",
    "open": "open('{file}','w')",
    "attribute": "().__class__.__base__.__subclasses__()",
    "attribute of a symbol": "x.__class__.__init__.__globals__",
    "a comprehension": "[[y for y in (1).__class__.__mro__]]",
    "lambda": "(lambda: 1)()",
    "a text for sympy": "S('__import__(1)')",
    "an assignment": "(y:=open)",
    "a format": "'{{0.__class__}}'.format(1)",
}


@pytest.mark.process
@pytest.mark.parametrize("task", ["countdown", "binary_matrix", "n_queens", "string_insertion", "simple_integration"])
@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE)
def test_what_a_model_writes_is_not_run(task: str, answer: str, tmp_path: Path) -> None:
    file = tmp_path / "ran"
    scored = score(task, f"\\boxed{{{answer.format(file=file)}}}")
    assert scored["acc"] == 0.0
    assert scored["score"] <= 0.05
    assert not file.exists()


@pytest.mark.process
def test_what_a_data_file_holds_is_not_run(tmp_path: Path) -> None:
    """bitwise_arithmetic evaluates its problem, and number_sorting the right answer: both come from the file."""
    file = tmp_path / "ran"
    code = HOSTILE["import"].format(file=file)
    problem = "reasoning_gym " + json.dumps({"answer": "1", "metadata": {"problem": code}})
    listed = "reasoning_gym " + json.dumps({"answer": f"[{code}]", "metadata": {"direction": "ascending"}})
    for task, truth in (("bitwise_arithmetic", problem), ("number_sorting", listed)):
        assert score(task, r"\boxed{[1]}", truth)["stopped"] == 1.0
    assert not file.exists()


HARMLESS = reasoning_gym._HARMLESS


@pytest.mark.parametrize(
    "text",
    ["1 + 2*(3 - 4)/5", "[[0, 1], [2, 3]]", "['1.5', '-2']", "Integer (1 )*Symbol ('x')**Integer (2 )", "(0x1F << 0x2)",
     "sin (Symbol ('x'))", "Float ('1.5e3')", ".5 + 1.", "True"],
)  # fmt: skip
def test_expressions_may_become_code(text: str) -> None:
    assert HARMLESS.fullmatch(text)


@pytest.mark.parametrize(
    "text",
    ["exec", "0xexec", "1if 1else open", "a.b", "(1).real", "x .y", "open('f')", "'a b'", '"x"', "f'1'", "b'1'",
     "x=1", "lambda:1", "__name__", "xy", "Integer.x", "[x for x in y]", "1;2", "{1}", "@", "#", "x\n:1", "'x'.y",
     "sinx", "é"],
)  # fmt: skip
def test_other_text_may_not(text: str) -> None:
    assert not HARMLESS.fullmatch(text)


@pytest.mark.process
def test_an_endless_answer_is_stopped() -> None:
    began = time.monotonic()
    scored = score("countdown", r"\boxed{9**9**9**9}", timeout=1.0)
    assert scored == {"score": 0.0, "acc": 0.0, "format": 0.0, "stopped": 1.0}
    assert time.monotonic() - began < 60
    assert score("chain_sum", r"\boxed{4}", "4")["acc"] == 1.0


@pytest.mark.process
def test_memory_is_bounded() -> None:
    """A list of 10^10 places needs 80 GB. The limit is reached at once, and the process goes on."""
    scored = score("binary_matrix", r"\boxed{[[0]*9999999999]}", memory_mib=512)
    assert scored["acc"] == 0.0
    (pool,) = [judges(each[0], each[1], each[2]) for each in pools() if each[1:] == (512, reasoning_gym.__name__)]
    for child in pool._children:
        peak = Path(f"/proc/{child._process.pid}/status").read_text().split("VmPeak:")[1].split()[0]
        assert int(peak) <= 512 * 1024


def pools() -> list[Any]:
    from entropy_fork.reward import judge

    return list(judge._pools)


def test_a_long_answer_is_wrong_without_being_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("it was handed to a process")

    monkeypatch.setattr(reasoning_gym, "judges", refuse)
    assert score("chain_sum", f"\\boxed{{{'4' * 1001}}}", "4") == {
        "score": 0.0, "acc": 0.0, "format": 1.0, "stopped": 0.0,
    }  # fmt: skip
    for empty in ("", r"\boxed{}", r"\boxed{ }"):
        assert score("chain_sum", empty, "4")["format"] == 0.0


@pytest.mark.parametrize(
    ("source", "truth", "message"),
    [
        ("reasoning_gym/no such", "1", "has no task of this name"),
        ("reasoning_gym/composite", "1", "has no task of this name"),
        ("reasoning_gym/chain_sum", 1, "must be a text"),
        ("reasoning_gym/countdown", 'reasoning_gym {"answer"', "is not whole"),
    ],
)
def test_bad_rows_are_said(source: str, truth: Any, message: str) -> None:
    with pytest.raises(EntropyForkError, match=message):
        compute_score(source, r"\boxed{1}", truth)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "reasoning_gym" else find(name, *rest)
    )
    reasoning_gym._check.cache_clear()
    with pytest.raises(EntropyForkError, match=r"reasoning_gym is not installed. Install the extra: .*\[reasoning-gym"):
        score("chain_sum", r"\boxed{1}", "1")


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        (r"\text{Friday}", "Friday"), (r"$\mathrm{A}$", "A"), (r"\frac{1}{2}", "1/2"), (r"1{,}000", "1,000"),
        (r"3 \times 4 \div 2", "3 * 4 / 2"), (r"50\%", "50%"), (r"a\_b", "a_b"),
        ("[[0, 1], [2, 3]]", "[[0, 1], [2, 3]]"),
        ("1 0\n0 1", "1 0\n0 1"), (r"\timesheet", r"\timesheet"),
    ],
)  # fmt: skip
def test_what_latex_adds_is_taken_off(answer: str, plain: str) -> None:
    assert without_latex(answer) == plain


def test_the_package_is_imported_in_the_child_only(python: Callable[..., Any]) -> None:
    code = (
        "from entropy_fork.reward import compute_score; "
        "assert compute_score('reasoning_gym/chain_sum', '\\\\boxed{4}', '4')['acc'] == 1.0; "
        "import sys; print([name for name in ('reasoning_gym', 'numpy', 'torch', 'sympy') if name in sys.modules])"
    )
    run = python("-c", code)
    assert run.stdout == "[]\n", run.stderr
