"""The sorting task's world: the questions, the demonstrations, reasoning-gym's scorer on them, and the build."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("typer")
pytest.importorskip("reasoning_gym")

import pyarrow.parquet as pq
import typer
from rich.console import Console
from transformers import AutoTokenizer

from entropy_fork.common.errors import EntropyForkError
from examples import tiny_world
from examples.sorting import build, exact, world

SHORT = build.Settings(
    steps=2, batch_size=4, train_problems=60, test_problems=20, warmup_problems=200, hidden_size=64, layers=1
)
POOL = list(islice(world.generate(7, "train"), 200))

problems = st.sampled_from(POOL)
seeds = st.integers(0, 2**32)


def reward(problem: world.Problem, response: str) -> float:
    """What the reward gives in a run: reasoning-gym's scorer, in its process."""
    return tiny_world.compute_score(world.DATA_SOURCE, response, problem.ground_truth)["score"]


def in_order(problem: world.Problem) -> list[int]:
    """The right order, by Python."""
    return sorted(problem.numbers, reverse="descending" in problem.prompt)


@pytest.mark.process
def test_a_right_demonstration_scores_1_and_a_random_one_hardly_ever():
    right, chosen = (
        [reward(problem, world.demonstrate(problem, random.Random(0), rate)) for problem in POOL] for rate in (1.0, 0.0)
    )
    assert set(right) == {1.0}
    assert sum(chosen) <= 0.05 * len(POOL)


@given(problems, seeds, st.sampled_from([0.0, 0.5, 1.0]))
def test_demonstrations_list_every_number_once(problem, seed, hint_rate):
    response = world.demonstrate(problem, random.Random(seed), hint_rate)
    listed = json.loads(response.removeprefix("\\boxed{").removesuffix("}"))
    assert sorted(listed) == sorted(problem.numbers)
    assert world.lists_each_number_once(problem, response)
    if hint_rate == 1.0:
        assert listed == in_order(problem)


@given(problems)
def test_the_prompt_is_the_question_of_the_ground_truth(problem):
    entry = json.loads(problem.ground_truth.removeprefix("reasoning_gym "))
    stated = [float(number) for number in re.findall(r"\d+", problem.prompt)]
    assert stated == [float(number) for number in entry["metadata"]["original_numbers"]]
    assert entry["metadata"]["direction"] in problem.prompt


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"\boxed{[3,5,5,9]}", True),
        (r"\boxed{[9,5,3,5]}", True),
        (r"\boxed{[3,5,9]}", False),
        (r"\boxed{[3,3,5,9]}", False),
        (r"\boxed{[3,5,5,9]} ", False),
        (r"\boxed{3,5,5,9}", False),
        (r"\boxed{[3,5,5,9", False),
        ("", False),
    ],
)
def test_lists_each_number_once(response, expected):
    assert world.lists_each_number_once(world.Problem((5, 3, 9, 5), world.Direction.UP), response) is expected


@pytest.mark.process
def test_the_scorer_lets_a_number_be_off_by_1_and_exact_does_not(tmp_path):
    """What the scorer overlooks is counted from the answers that verl keeps of a validation."""
    problem = next(one for one in POOL if one.direction is world.Direction.UP and 20 not in one.numbers)
    order = in_order(problem)
    answers = {"right": order, "off by 1": [*order[:-1], order[-1] + 1], "off by 2": [*order[:-1], order[-1] + 2]}
    rows = [
        {"input": f"User:\n{problem.prompt}\n", "output": text, "score": reward(problem, text)}
        for text in map(world.write_response, answers.values())
    ]
    assert [row["score"] for row in rows] == [1.0, 1.0, 0.0]
    assert [world.sorts_exactly(problem, row["output"]) for row in rows] == [True, False, False]
    (tmp_path / "30.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert exact.count(tmp_path / "30.jsonl") == (3, 2, 1)
    down = next(one for one in POOL if one.direction is world.Direction.DOWN and len(set(one.numbers)) > 1)
    assert world.sorts_exactly(down, world.write_response(sorted(down.numbers, reverse=True)))
    assert not world.sorts_exactly(down, world.write_response(sorted(down.numbers)))
    (tmp_path / "31.jsonl").write_text(json.dumps({"input": "2 + 2", "output": "4", "score": 1}))
    with pytest.raises(ValueError, match="not of the sorting task: 2"):
        exact.count(tmp_path / "31.jsonl")
    with pytest.raises(typer.BadParameter, match=r"has no STEP\.jsonl"):
        exact.main(tmp_path / "elsewhere")


def test_find_choices_leaves_out_the_last_number():
    response = r"So \boxed{[3,15,9]}"
    assert [response[choice.start : choice.end] for choice in world.find_choices(response)] == ["3", "15"]
    assert world.find_choices("[3,15,9]") == []


def test_no_problem_is_in_two_sets():
    parts = build.split_problems(SHORT)
    keys = [[problem.key for problem in part] for part in (parts.test, parts.train, parts.warmup)]
    assert [len(part) for part in keys] == [20, 60, 200]
    assert len(set(keys[0] + keys[1])) == 80
    assert not set(keys[2]) & set(keys[0] + keys[1])
    again = build.split_problems(SHORT)
    assert [again.test, again.train, again.warmup] == [parts.test, parts.train, parts.warmup]


def test_the_warm_up_leaves_out_what_is_asked():
    first = next(world.draw_unasked(random.Random(3), set()))
    assert next(world.draw_unasked(random.Random(3), {first.key})) != first


def test_without_reasoning_gym_one_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EntropyForkError, match=r"reasoning_gym.*pip install"):
        build.split_problems(SHORT)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    output = tmp_path_factory.mktemp("sorting") / "world"
    assert tiny_world.build(build.WORLD, output, SHORT, Console(quiet=True)) is not None
    return output


@pytest.mark.process
def test_the_rows_are_scored_by_reasoning_gym(built):
    for split, count in (("train", SHORT.train_problems), ("test", SHORT.test_problems)):
        rows = pq.read_table(built / f"{split}.parquet").to_pylist()
        assert len(rows) == count
        for row in rows:
            assert row["data_source"] == "reasoning_gym/number_sorting"
            facts = row["extra_info"]
            order = sorted(facts["numbers"], reverse=facts["direction"] == "descending")
            for answer, expected in ((order, 1.0), (order[::-1], 0.0)):
                response = world.write_response(answer)
                truth = row["reward_model"]["ground_truth"]
                assert tiny_world.compute_score(row["data_source"], response, truth)["acc"] == expected


@pytest.mark.process
def test_a_choice_is_one_token_and_the_same_in_prompt_and_answer(built):
    tokenizer = AutoTokenizer.from_pretrained(built / "model")

    def tokens(text: str) -> list[str]:
        return [tokenizer.decode([token]) for token in tokenizer.encode(text)]

    assert tokens(r"Sort 18,3,15, ascending, in \boxed{}.")[2:5] == ["18,", "3,", "15,"]
    assert tokens(r"\boxed{[18,3,15]}") == ["\\boxed{[", "18,", "3,", "15", "]}"]


@pytest.mark.process
def test_the_manifest_says_how_good_the_model_is_before_training(built):
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["checksum"] == SHORT.checksum
    assert set(manifest["report"]["sampled"]) == {"accuracy", "within_rules", "mean_tokens", "finished"}
