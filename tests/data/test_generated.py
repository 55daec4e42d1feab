"""``entropy-fork data prepare reasoning_gym``: questions from a seed, and none of them in both files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

pytest.importorskip("reasoning_gym")

from entropy_fork.cli import app
from entropy_fork.data import generated
from entropy_fork.data.generated import example_of, known_tasks, options_of, seed_of
from entropy_fork.data.prepare import SCHEMA
from entropy_fork.data.template import INSTRUCTION
from entropy_fork.reward import compute_score


def run(output: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["data", "prepare", "reasoning_gym", "--output", str(output), *arguments])


def rows(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return found


def questions(file: Path) -> list[str]:
    return [" ".join(row["prompt"][0]["content"].split()) for row in rows(file)]


TWO = ["--task", "chain_sum", "--task", "spell_backward", "--set", "chain_sum.max_digits=1", "--set",
       "chain_sum.max_terms=2", "--size", "100", "--holdout", "50"]  # fmt: skip


@pytest.mark.process
def test_two_tasks_with_a_difficulty(tmp_path: Path) -> None:
    """One-digit sums of two terms have 200 different questions, so that half of the draws are copies."""
    result = run(tmp_path, *TWO)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "reasoning_gym"
    train, test = folder / "train.parquet", folder / "test.parquet"
    assert f"{train}: 200 rows (seed 0)" in result.output
    assert pq.read_schema(train).equals(SCHEMA)
    assert pq.read_schema(test).equals(SCHEMA)
    for file, count in ((train, 100), (test, 50)):
        found = rows(file)
        assert [row["data_source"] for row in found] == (
            ["reasoning_gym/chain_sum"] * count + ["reasoning_gym/spell_backward"] * count
        )
        assert [row["extra_info"]["index"] for row in found] == list(range(2 * count))
        assert {row["extra_info"]["split"] for row in found} == {file.stem}
        assert {row["ability"] for row in found} == {"arithmetic", "algorithmic"}
        for row in found:
            (message,) = row["prompt"]
            assert message["role"] == "user"
            assert message["content"].endswith(f"\n{INSTRUCTION}")
            truth = row["reward_model"]["ground_truth"]
            assert compute_score(row["data_source"], f"\\boxed{{{truth}}}", truth)["acc"] == 1.0
        sums = [row["prompt"][0]["content"].split("problem: ")[1].split(" =")[0] for row in found[:count]]
        assert all(len(each.split()) == 3 and len(each) == 5 for each in sums)
    everything = questions(train) + questions(test)
    assert len(set(everything)) == len(everything) == 300
    manifest = json.loads((folder / "manifest.json").read_text())
    told = manifest["tasks"]["chain_sum"]
    assert told["options"] == {"max_digits": 1, "max_terms": 2}
    assert (told["train"], told["test"]) == (100, 50)
    assert told["drawn"] == 150 + told["dropped"]["duplicate"] > 150
    assert manifest["files"]["test"]["rows"] == 100
    assert (folder / "rejected.jsonl").read_text() == ""


@pytest.mark.process
def test_the_seed_says_which_questions(tmp_path: Path) -> None:
    arguments = ["--task", "chain_sum", "--size", "40", "--holdout", "10"]
    for place, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert run(tmp_path / place, *arguments, "--seed", seed).exit_code == 0
    found = {
        place: [questions(tmp_path / place / "reasoning_gym" / f"{use}.parquet") for use in ("train", "test")]
        for place in "abc"
    }
    assert found["a"] == found["b"]
    assert not set(found["a"][0]) & set(found["c"][0])
    assert not set(found["a"][0]) & set(found["a"][1])


def test_seeds_are_far_apart() -> None:
    """reasoning-gym makes question n from the seed plus n: seed 1 would repeat the questions of seed 0."""
    seeds = [seed_of(seed, task, use) for seed in range(20) for task in ("a", "b") for use in ("train", "test")]
    apart = [after - before for before, after in zip(sorted(seeds), sorted(seeds)[1:], strict=False)]
    assert min(apart) > 1000
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.process
def test_a_question_is_never_in_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if both seeds are the same."""
    monkeypatch.setattr(generated, "seed_of", lambda *_: 1)
    assert run(tmp_path, "--task", "chain_sum", "--size", "30", "--holdout", "30").exit_code == 0
    folder = tmp_path / "reasoning_gym"
    both = questions(folder / "train.parquet") + questions(folder / "test.parquet")
    assert len(set(both)) == len(both) == 60


def said(output: Path, *arguments: str) -> str:
    result = run(output, *arguments)
    assert result.exit_code == 1, result.output
    (error,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert not (output / "reasoning_gym").exists()
    return str(error)


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "chain_sum", "--set", "chain_sum.max_digits=1", "--set", "chain_sum.max_terms=2", "--size", "201"],
         "chain_sum has too few different questions: 4220 draws brought 200 of the 201"),
        (["--task", "game_of_life_halting", "--size", "3"], "any_answer_is_right"),
        (["--task", "arc_agi", "--size", "3"], "of arc_agi can be used: 200 answer_not_scorable. Leave the task out"),
        (["--task", "graph_color", "--size", "3"], "no_answer"),
    ],
)  # fmt: skip
def test_tasks_that_cannot_be_used(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert message in said(tmp_path, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "reasoning_gym needs --task TASK"),
        (["--task", "chain_sums"], "has no task 'chain_sums'. Did you mean chain_sum?"),
        (["--task", "composite"], "has no task 'composite'"),
        (
            ["--task", "chain_sum", "--set", "chain_sum.max_digit=1"],
            "has no option max_digit. Did you mean max_digits?",
        ),
        (["--task", "chain_sum", "--set", "max_digits=1"], "write TASK.OPTION=VALUE"),
        (["--task", "chain_sum", "--set", "gcd.max_value=1"], "there is no --task gcd"),
        (["--task", "chain_sum", "--set", "chain_sum.max_digits=0"], "max_digits must be >= min_digits"),
        (
            ["--task", "chain_sum", "--set", "chain_sum.max_digits=many"],
            "cannot be made with chain_sum.max_digits=many",
        ),
        (["--task", "chain_sum", "--set", "chain_sum.seed=1"], "has no option seed"),
        (["--task", "chain_sum", "--limit", "3"], "--limit is not for reasoning_gym"),
        (["--task", "chain_sum", "--name", "../up"], "--name '../up' must begin with"),
        (["gsm8k", "--task", "chain_sum"], "prepared in a call of its own"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert message in said(tmp_path, *arguments)


def test_other_sources_take_no_task() -> None:
    result = CliRunner().invoke(app, ["data", "prepare", "gsm8k", "--size", "3"])
    assert result.exit_code == 1
    assert "prepared in a call of its own" in result.output


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "reasoning_gym" else find(name, *rest)
    )
    message = said(tmp_path, "--task", "chain_sum")
    assert "reasoning_gym is not installed. Install the extra: pip install" in message
    assert "[reasoning-gym]" in message


@pytest.mark.process
def test_what_is_there_is_replaced_only_if_asked(tmp_path: Path) -> None:
    arguments = ["--task", "gcd", "--size", "5"]
    assert run(tmp_path, *arguments).exit_code == 0
    assert not (tmp_path / "reasoning_gym" / "test.parquet").exists()
    assert "--overwrite" in run(tmp_path, *arguments).output
    assert run(tmp_path, *arguments, "--overwrite", "--seed", "1").exit_code == 0
    assert [folder.name for folder in tmp_path.iterdir()] == ["reasoning_gym"]


def test_the_tasks_and_their_options_are_listed() -> None:
    listed = CliRunner().invoke(app, ["data", "tasks"])
    assert listed.exit_code == 0
    assert len(known_tasks()) > 100
    assert all(task in listed.output for task in known_tasks())
    one = CliRunner().invoke(app, ["data", "tasks", "chain_sum"]).output
    assert all(f"chain_sum.{option}" in one for option in options_of("chain_sum"))
    assert example_of("chain_sum")["question"] in one
    assert "reasoning_gym" in CliRunner().invoke(app, ["data", "list"]).output
