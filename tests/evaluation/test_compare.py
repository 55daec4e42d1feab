"""``entropy-fork compare-evaluations``: numbers, files, what is refused and what is said."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.evaluations import QUIET, write_data
from helpers.finished_evaluations import write_evaluation
from typer.testing import CliRunner

from entropy_fork.cli import app
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.evaluation import compare, compare_results
from entropy_fork.evaluation import evaluate as evaluation
from entropy_fork.evaluation.checkpoint import ModelRecord
from entropy_fork.evaluation.engines import SamplingSettings

BEFORE = {
    "aime24": np.array([[0, 0], [1, 0], [1, 1], [0, 1]], bool),
    "own": np.array([[0, 0], [1, 1], [0, 1]], bool),
}
AFTER = {
    "aime24": np.array([[1, 0], [1, 1], [1, 1], [0, 0]], bool),
    "own": np.array([[0, 1], [1, 1], [0, 1]], bool),
}
LENGTHS = {"aime24": np.full((4, 2), 10), "own": np.full((3, 2), 10)}
LONGER = {"aime24": np.full((4, 2), 16), "own": np.array([[10, 10], [11, 11], [12, 12]])}
TRAINED = ModelRecord("/runs/a/global_step_30/actor", 30, {"top_ratio": 0.2, "select": "top"})


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["compare-evaluations", *map(str, arguments)])


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return (
        write_evaluation(tmp_path / "before", BEFORE, LENGTHS),
        write_evaluation(tmp_path / "after", AFTER, LONGER, TRAINED),
    )


def test_the_numbers_of_a_small_example(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LINES", "50")
    result = run(*pair, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "difference.json").read_text())
    aime, own, mean = found["benchmarks"]["aime24"], found["benchmarks"]["own"], found["average"]
    # per question +1/2, +1/2, 0, −1/2: mean 1/8, and 2·(1/2)² is added to the squares 3/4 − 4/64
    assert (aime["better"], aime["worse"], aime["same"]) == (2, 1, 1)
    assert (aime["accuracy"]["before"], aime["accuracy"]["after"]) == (1 / 2, 5 / 8)
    error = ((3 / 4 - 4 / 64 + 2 / 4) / 3 / 4) ** 0.5
    assert aime["accuracy"]["standard_error"] == pytest.approx(error)
    assert aime["accuracy"]["interval"] == pytest.approx([1 / 8 - 3.182 * error, 1], abs=1e-3)
    assert aime["pass_at"]["2"]["difference"] == pytest.approx(0)
    assert aime["tokens"] == {
        "before": 10, "after": 16, "difference": 6, "interval": [6, 6], "standard_error": 0, "degrees": 3
    }  # fmt: skip
    assert own["accuracy"]["difference"] == pytest.approx(1 / 6)
    assert own["tokens"]["difference"] == pytest.approx(1)
    assert mean["accuracy"]["difference"] == pytest.approx((1 / 8 + 1 / 6) / 2)
    assert (mean["questions"], mean["better"], mean["worse"]) == (7, 3, 1)
    assert found["after"]["model"] == TRAINED.as_dict()
    assert found["before"]["model"]["path"] == "/models/before"

    markdown = (tmp_path / "out" / "difference.md").read_text()
    assert re.search(
        r"^\| aime24 \| 50\.00 \| 62\.50 \| \+12\.50 \| -\d+\.\d to \+\d+\.\d \| \d+\.\d\d \|$", markdown, re.M
    )
    assert "| aime24 | 2 | 1 | 1 | 4 |" in markdown
    assert f"| after | {pair[1]} | /runs/a/global_step_30/actor | 30 | top_ratio=0.2 select=top |" in markdown
    assert "| aime24 | 10.0 | 16.0 | +6.0 | +6.0 to +6.0 |" in markdown
    assert "| own | 2 | 66.67 | 100.00 | +33.33 |" in markdown
    for cell in ("+12.50", "/runs/a/global_step_30/actor", "average"):
        assert cell in result.output
    names = ["difference.json", "difference.md", "difference.png", "difference.svg"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names


def test_real_evaluations_are_compared(settings: Callable[..., evaluation.EvaluationSettings], tmp_path: Path) -> None:
    """Of one model: the same seed gives no difference, and another seed only that of the draw."""
    from entropy_fork.evaluation import results

    for name, changes in (("a", {}), ("b", {}), ("c", {"sampling": SamplingSettings(max_tokens=12, seed=5)})):
        results.write(evaluation.evaluate(settings(output=tmp_path / name, **changes), QUIET), tmp_path / name, None)
    paired = compare.compare_evaluations(tmp_path / "a", tmp_path / "b")
    assert [summary.tokens.difference for _, summary in paired.rows] == [0, 0, 0]
    assert paired.notes == ("Both have the same model: the difference shows how much another draw of answers changes",)
    assert paired.before.model == paired.after.model
    other = compare.compare_evaluations(tmp_path / "a", tmp_path / "c")
    assert any(summary.tokens.difference != 0 for _, summary in other.rows)
    assert other.notes[0] == "They also differ in sampling.seed: 0 before, 5 after"


def test_all_reasons_against_a_comparison_are_listed_at_once(tmp_path: Path) -> None:
    before = write_evaluation(tmp_path / "before", BEFORE)
    after = write_evaluation(
        tmp_path / "after", {"aime24": np.zeros((3, 3), bool)}, questions="r" * 64, sampling__temperature=0.6,
        sampling__max_tokens=9,
    )  # fmt: skip
    result = run(before, after, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert re.sub(r"^.*?error: ", "", result.stderr, flags=re.S).splitlines()[:5] == [
        f"{before} and {after} cannot be compared question by question:",
        "  questions: aime24 (4), own (3) before, aime24 (3) after",
        "  answers per question (--answers): 2 before, 3 after",
        "  sampling.temperature: 1.0 before, 0.6 after",
        "  sampling.max_tokens: 20480 before, 9 after",
    ]
    assert not (tmp_path / "out").exists()


def test_other_questions_of_the_same_number_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_evaluation(tmp_path / "other", AFTER, questions="r" * 64)
    with pytest.raises(EntropyForkError, match=r"\n  questions: as many, but other texts, .* \(checksum q{12} before"):
        compare.compare_evaluations(pair[0], other)


def test_real_questions_in_another_order_are_refused(
    settings: Callable[..., evaluation.EvaluationSettings], tmp_path: Path
) -> None:
    from entropy_fork.evaluation import results

    for name, sources in (("a", ["x", "x", "y"]), ("b", ["x", "y", "x"])):
        asked = settings(data=[write_data(tmp_path / f"{name}.parquet", sources)], output=tmp_path / name, answers=1)
        results.write(evaluation.evaluate(asked, QUIET), tmp_path / name, None)
    with pytest.raises(EntropyForkError, match="questions: as many, but other texts"):
        compare.compare_evaluations(tmp_path / "a", tmp_path / "b")


def test_what_else_differs_is_said_and_not_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A base model needs --chat-template, where a checkpoint has the template in its tokenizer."""
    other = write_evaluation(
        tmp_path / "other", AFTER, chat_template="c" * 64, engine={"name": "vllm", "dtype": "auto"}, tokenizer="t" * 64,
        reward="entropy_fork.reward 2",
    )  # fmt: skip
    result = run(pair[0], other, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for line in (
        "chat_template: the model's before, cccccccccccc… after",
        "engine.name: transformers before, vllm after",
        "engine.batch_size: 64 before, none after",
        "tokenizer: the model's before, tttttttttttt… after",
        "reward: entropy_fork.reward 1 before, entropy_fork.reward 2 after",
    ):
        assert f"They also differ in {line}.\n" in result.output
        assert f"They also differ in {line}" in json.loads((tmp_path / "out" / "difference.json").read_text())["notes"]
    assert (tmp_path / "out" / "difference.md").read_text().count("- They also differ in ") == 5


def test_a_folder_that_is_not_a_finished_evaluation_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    before, after = pair
    with pytest.raises(
        EntropyForkError, match=r"there is no folder .*nowhere: name a folder of 'entropy-fork evaluate'"
    ):
        compare.compare_evaluations(before, tmp_path / "nowhere")
    with pytest.raises(EntropyForkError, match=f"{tmp_path} is no folder of 'entropy-fork evaluate'"):
        compare.compare_evaluations(tmp_path, after)
    analysis = tmp_path / "analysis"
    analysis.mkdir()
    (analysis / "manifest.json").write_text(
        json.dumps({"format": 2, "source": "model", "temperature": 1.0, "identity": {}})
    )
    with pytest.raises(
        EntropyForkError, match=r"analysis is of 'entropy-fork analyze', .*write 'entropy-fork compare'"
    ):
        compare.compare_evaluations(before, analysis)

    answers = after / "answers.jsonl"
    whole = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(whole[:-1]) + whole[-1][:10])  # a kill in the middle of a line
    with pytest.raises(
        EntropyForkError, match=r"after is not a finished evaluation: .*answers to question 0 are missing"
    ):
        compare.compare_evaluations(before, after)
    assert answers.read_text().endswith(whole[-1][:10]), "nothing is changed in a folder that is only read"
    answers.write_text("{}\n")
    with pytest.raises(EntropyForkError, match=r"line 1 of .*answers.jsonl is not an answer"):
        compare.compare_evaluations(before, after)
    (before / "results.json").unlink()
    with pytest.raises(
        EntropyForkError, match=r"before is not a finished evaluation: .* \(it has no results.json yet\)"
    ):
        compare.compare_evaluations(before, after)


def test_the_command_for_analyses_names_this_one(pair: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(app, ["compare", *map(str, pair)])
    assert result.exit_code == 1
    assert f"{pair[0]} is of 'entropy-fork evaluate'" in result.stderr
    assert "write 'entropy-fork compare-evaluations BEFORE AFTER'" in result.stderr


def test_more_answers_than_the_results_have_are_left_out(pair: tuple[Path, Path]) -> None:
    """An evaluation that was continued with more --answers and stopped."""
    before, after = pair
    answers = after / "answers.jsonl"
    line = json.loads(answers.read_text().splitlines()[0])
    with answers.open("a") as file:
        file.write(json.dumps({**line, "question": 0, "sample": 2, "score": 1.0, "tokens": 999}) + "\n")
    paired = compare.compare_evaluations(before, after)
    assert paired.benchmarks["aime24"].tokens.after == 16
    assert paired.after.answers == 2


def test_a_folder_of_an_earlier_version_has_its_path_in_the_manifest(pair: tuple[Path, Path]) -> None:
    manifest = json.loads((pair[0] / "manifest.json").read_text())
    del manifest["model"]
    (pair[0] / "manifest.json").write_text(json.dumps(manifest | {"model_path": "/old/model"}))
    paired = compare.compare_evaluations(*pair)
    assert paired.before.model == ModelRecord("/old/model")
    (pair[0] / "manifest.json").write_text(json.dumps(manifest))
    assert compare_results.tables(compare.compare_evaluations(*pair))[0].rows[0][2:] == ["not recorded"] * 3


def test_the_figure_has_a_row_per_benchmark_in_the_colour_of_its_interval(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    low, high = rng.random((40, 8)) < 0.2, rng.random((40, 8)) < 0.9
    names = ("up_$x$", "down", "unclear", "_hidden")
    before = write_evaluation(tmp_path / "before", dict(zip(names, (low, high, low, low), strict=True)))
    after = write_evaluation(tmp_path / "after", dict(zip(names, (high, low, low, high), strict=True)))
    paired = compare.compare_evaluations(before, after)
    figure = compare_results.figure(paired)
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert [label.split(" (")[1] for label in labels] == ["40)", "40)", "40)", "40)", "160)"]
    assert labels[0].startswith(r"up_\$x\$"), "no formula"
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_ydata()[0] == line.get_ydata()[1]]
    reaches = [line for line in lines if line.get_linewidth() > 2]
    colors = [line.get_color() for line in reaches]
    up, down, grey = compare_results.BETTER, compare_results.WORSE, compare_results.GREY
    assert colors[:4] == [up, down, grey, up]
    for line, (_, summary) in zip(reaches, paired.rows, strict=True):
        assert summary.accuracy.interval is not None
        assert list(line.get_xdata()) == pytest.approx([100 * end for end in summary.accuracy.interval])
        begin, end = axes.get_xlim()
        assert begin < line.get_xdata()[0] < line.get_xdata()[1] < end
    assert "grey" in axes.get_xlabel()

    compare_results.write(paired, tmp_path / "out")
    picture = (tmp_path / "out" / "difference.svg").read_bytes()
    ET.fromstring(picture)
    compare_results.write(paired, tmp_path / "again")
    assert (tmp_path / "again" / "difference.svg").read_bytes() == picture


def test_one_benchmark_has_no_average_and_one_answer_no_table_of_pass_at_k(tmp_path: Path) -> None:
    before = write_evaluation(tmp_path / "before", {"own": np.array([[0], [1], [0]], bool)})
    after = write_evaluation(tmp_path / "after", {"own": np.array([[0], [1], [1]], bool)})
    tables = compare_results.tables(compare.compare_evaluations(before, after))
    assert [[row[0] for row in table.rows] for table in tables] == [["before", "after"], ["own"], ["own"], ["own"]]
    assert tables[1].rows[0][-1] == "–"


def test_a_single_question_has_no_interval(tmp_path: Path) -> None:
    before = write_evaluation(tmp_path / "before", {"own": np.array([[0, 1]], bool), "x": np.zeros((3, 2), bool)})
    after = write_evaluation(tmp_path / "after", {"own": np.array([[1, 1]], bool), "x": np.zeros((3, 2), bool)})
    paired = compare.compare_evaluations(before, after)
    assert [summary.accuracy.interval is None for _, summary in paired.rows] == [True, False, True]
    compare_results.write(paired, tmp_path / "out")
    assert "| own | 50.00 | 100.00 | +50.00 | – |" in (tmp_path / "out" / "difference.md").read_text()


def test_without_matplotlib_the_tables_are_still_printed(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = compare_results.importlib.util.find_spec
    monkeypatch.setattr(
        compare_results.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    refused = run(*pair, "--output", tmp_path / "out")
    assert refused.exit_code == 1
    assert "matplotlib is not installed" in refused.stderr
    assert "Without --output only tables are printed" in refused.stderr
    assert run(*pair).exit_code == 0
