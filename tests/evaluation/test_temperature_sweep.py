"""``entropy-fork temperatures`` end to end on a tiny model."""

from __future__ import annotations

import csv
import inspect
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.evaluations import QUIET, lines
from typer.testing import CliRunner, Result

from entropy_fork import cli
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.installing import install_command
from entropy_fork.evaluation import evaluate as evaluation
from entropy_fork.evaluation import temperature_sweep
from entropy_fork.evaluation.answer_store import ANSWERS, AnswerStore, ScoredAnswer
from entropy_fork.evaluation.checkpoint import Checkpoint, ModelRecord
from entropy_fork.evaluation.engines import SamplingSettings
from entropy_fork.evaluation.statistics import summarise_benchmark
from entropy_fork.evaluation.temperature_sweep import CSV, JSON, PLOTS, TemperatureSweep, run_sweep
from entropy_fork.sampling.two_temperatures import PAPER_TEMPERATURES, TwoTemperatures

TAU = 2.5
SWEEP = TemperatureSweep(high=(0.0, 1.0), low=(1.0, 2.5), threshold=TAU)


@pytest.fixture
def sweep_of(settings: Callable[..., evaluation.EvaluationSettings]) -> Callable[..., list[temperature_sweep.Point]]:
    """Run SWEEP in the folder that is given."""

    def make(output: Path, sweep: TemperatureSweep = SWEEP, **changes: Any) -> list[temperature_sweep.Point]:
        return run_sweep(settings(output=output, answers=2, batch_size=9, **changes), sweep, QUIET)

    return make


@pytest.fixture
def command(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LINES", "50")

    def invoke(*arguments: str) -> Result:
        fixed = ["temperatures", str(model), "--data", str(data), "--output", str(tmp_path / "out"), "--answers", "2"]
        fixed += ["--max-tokens", "12", "--engine", "transformers"]
        return CliRunner().invoke(cli.app, [*fixed, *arguments])

    return invoke


def test_the_command_end_to_end(command: Callable[..., Result], tmp_path: Path) -> None:
    result = command("--high", "0,1", "--low", "1, 2.5", "--threshold", str(TAU))
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    folders = {"high0_low1": (0, 1), "high1_low1": (1, 1), "high1_low2.5": (1, 2.5)}
    assert {path.name for path in out.iterdir()} == {*folders, CSV, JSON, *PLOTS}

    rows = list(csv.DictReader((out / CSV).open()))
    assert [(row["varied"], row["temperature_high"], row["temperature_low"]) for row in rows[::3]] == [
        ("high", "0.0", "1.0"),
        ("high", "1.0", "1.0"),
        ("low", "1.0", "1.0"),
        ("low", "1.0", "2.5"),
    ]
    assert [row["benchmark"] for row in rows] == ["aime24", "cpu", "average"] * 4
    for row in rows:
        if row["benchmark"] == "average":
            continue
        folder = out / f"high{float(row['temperature_high']):g}_low{float(row['temperature_low']):g}"
        answers = [json.loads(line) for line in lines(folder)]
        answers = [answer for answer in answers if answer["data_source"] == row["benchmark"]]
        tokens = sum(answer["tokens"] for answer in answers)
        assert float(row["above"]) == pytest.approx(sum(answer["above"] for answer in answers) / tokens)
        assert float(row["mean_tokens"]) == pytest.approx(tokens / len(answers))
        assert float(row["truncated"]) == pytest.approx(sum(answer["truncated"] for answer in answers) / len(answers))
        assert float(row["accuracy"]) == pytest.approx(sum(answer["score"] for answer in answers) / len(answers))
        assert 0.05 < float(row["above"]) < 0.95, "the threshold should part the tokens"
        assert (row["questions"], row["answers"], row["threshold"]) == (str(len(answers) // 2), "2", str(TAU))

    points = json.loads((out / JSON).read_text())["points"]
    assert len(points) == 4
    assert points[1]["average"] == points[2]["average"]
    assert points[1]["benchmarks"]["cpu"]["above"] == float(rows[4]["above"])
    table = [line for line in result.output.splitlines() if "│ T_" in line]
    assert [line.split("│")[1:4] for line in table][3] == [" T_low  ", "      1 ", "   2.5 "]
    assert f" {100 * float(rows[2]['above']):.1f}% " in table[0]
    assert (out / "temperatures.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "temperatures.svg").read_text().count("<svg") == 1


def test_the_plot_shows_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A curve for each temperature, a point for each value, error bars that are the intervals."""
    from matplotlib.axes import Axes

    drawn: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    errorbar = Axes.errorbar

    def spy(axes: Axes, *arguments: Any, **options: Any) -> Any:
        drawn.append((arguments, options))
        return errorbar(axes, *arguments, **options)

    monkeypatch.setattr(Axes, "errorbar", spy)
    points = []
    for (varied, pair), num_right in zip(SWEEP.points(), (2, 5, 5, 9), strict=True):
        right = np.arange(10)[:, None] < num_right
        summary = summarise_benchmark(right, 3 * np.ones((10, 1), int), ~right, right, np.ones((10, 1), int))
        points.append(
            temperature_sweep.Point(varied, pair, evaluation.Evaluation({}, {"x": summary}, ModelRecord("m")))
        )
    temperature_sweep._plot(points, SWEEP, tmp_path)
    (high, low) = drawn
    assert (high[0], low[0]) == (([0, 1], [20.0, 50.0]), ([1, 2], [50.0, 90.0]))
    assert [options["label"] for _, options in drawn] == ["T_high, with T_low = 1", "T_low, with T_high = 1"]
    below, above = low[1]["yerr"]
    assert (90 - below[1], 90 + above[1]) == pytest.approx([100 * end for end in points[3].average.interval])
    content = (tmp_path / "temperatures.svg").read_bytes()
    temperature_sweep._plot(points, SWEEP, tmp_path)
    assert (tmp_path / "temperatures.svg").read_bytes() == content, "the same results, the same file"
    assert {path.name for path in tmp_path.iterdir()} == set(PLOTS)


def test_both_at_one_is_ordinary_sampling(
    sweep_of: Callable[..., list[temperature_sweep.Point]],
    settings: Callable[..., evaluation.EvaluationSettings],
    tmp_path: Path,
) -> None:
    points = sweep_of(tmp_path / "out")
    plain = evaluation.evaluate(settings(output=tmp_path / "plain", answers=2, batch_size=9), QUIET)

    def texts(folder: Path) -> list[str]:
        return [json.loads(line)["text"] for line in lines(folder)]

    assert texts(tmp_path / "out" / "high1_low1") == texts(tmp_path / "plain")
    assert texts(tmp_path / "out" / "high1_low2.5") != texts(tmp_path / "plain")
    for name, summary in plain.benchmarks.items():
        assert summary.above is None
        assert replace(points[1].evaluation.benchmarks[name], above=None) == summary


def test_the_model_is_loaded_once_and_an_interrupted_sweep_goes_on(
    sweep_of: Callable[..., list[temperature_sweep.Point]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Path] = []

    class Engine(evaluation.TransformersEngine):
        def __init__(self, folder: Path, *arguments: Any):
            loads.append(folder)
            super().__init__(folder, *arguments)

    monkeypatch.setattr(evaluation, "TransformersEngine", Engine)
    whole = sweep_of(tmp_path / "whole")
    assert len(loads) == 1

    appended = []
    append = AnswerStore.append

    def dying_append(store: AnswerStore, records: Sequence[ScoredAnswer]) -> None:
        append(store, records)
        appended.append(len(records))
        if len(appended) == 3:  # of two batches for each pair
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerStore, "append", dying_append)
    with pytest.raises(KeyboardInterrupt):
        sweep_of(tmp_path / "parts")
    assert not (tmp_path / "parts" / CSV).exists()
    assert sweep_of(tmp_path / "parts") == whole
    for name in (CSV, JSON, "temperatures.svg"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    loads.clear()
    assert sweep_of(tmp_path / "whole") == whole
    assert not loads, "nothing was left to answer"


def test_shards_are_merged_once_and_removed(
    sweep_of: Callable[..., list[temperature_sweep.Point]],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets: list[Path] = []

    class Sharded(Checkpoint):
        tokenizer_folder = model

        def fingerprint(self) -> str:
            return "shards"

        def merge(self, target: Path) -> Path:
            if not target.exists():
                targets.append(target)
                shutil.copytree(model, target)
            return target

    monkeypatch.setattr(evaluation.Checkpoint, "find", lambda _: Sharded(model, "fsdp"))
    sweep_of(tmp_path / "out", replace(SWEEP, low=()))
    assert targets == [tmp_path / "out" / "merged"]
    assert not targets[0].exists()
    sweep_of(tmp_path / "other", TemperatureSweep((0.5,), (), threshold=TAU), merged=tmp_path / "kept")
    assert (tmp_path / "kept" / "config.json").is_file()


def test_answers_of_older_versions_are_taken_up(
    settings: Callable[..., evaluation.EvaluationSettings],
    tmp_path: Path,
) -> None:
    """Their lines have no count of tokens above a threshold, and their manifests no two temperatures."""
    first = evaluation.evaluate(settings(), QUIET)
    file, manifest = tmp_path / "out" / ANSWERS, tmp_path / "out" / "manifest.json"
    old = [{key: value for key, value in json.loads(line).items() if key != "above"} for line in lines(file.parent)]
    file.write_text("".join(json.dumps(values) + "\n" for values in old[:-3]))
    there = json.loads(manifest.read_text())
    del there["identity"]["sampling"]["two_temperatures"]
    manifest.write_text(json.dumps(there))
    assert evaluation.evaluate(settings(), QUIET).benchmarks == first.benchmarks


def test_a_threshold_that_parts_almost_no_tokens_is_said(command: Callable[..., Result], tmp_path: Path) -> None:
    """A pair measures one temperature alone if nearly all tokens are on one side of τ. Two equal ones have no sides."""
    high = command("--high", "0.5,1", "--low", "1,0.5", "--threshold", "9")
    assert high.exit_code == 0, high.output
    said = [line for line in high.output.splitlines() if line.startswith("note: ")]
    assert [line.split(". To")[0] for line in said] == [
        "note: with T_high 0.5 and T_low 1, 0.0% of the tokens were above τ = 9 nats, so this is T = 1 alone",
        "note: with T_high 1 and T_low 0.5, 0.0% of the tokens were above τ = 9 nats, so this is T = 0.5 alone",
    ]
    assert "--like" in said[0]
    between = command("--high", "0.5", "--low", "", "--threshold", str(TAU), "--output", str(tmp_path / "between"))
    assert between.exit_code == 0, between.output
    assert "note: " not in between.output
    low = command("--high", "0.5", "--low", "", "--threshold", "0.0001", "--output", str(tmp_path / "low"))
    assert "100.0% of the tokens were above τ = 0.0001 nats, so this is T = 0.5 alone" in low.output


def test_the_defaults_are_the_papers() -> None:
    parameters = inspect.signature(cli.temperatures).parameters
    for name in ("high", "low"):
        assert temperature_sweep.parse_values(parameters[name].default, f"--{name}") == PAPER_TEMPERATURES
    assert (TemperatureSweep((1.0,), ()).threshold, TwoTemperatures(1, 1).threshold) == (0.672, 0.672)
    pairs = {(pair.high, pair.low) for _, pair in TemperatureSweep(PAPER_TEMPERATURES, PAPER_TEMPERATURES).points()}
    assert len(pairs) == 15
    assert all(1.0 in pair for pair in pairs)


def test_mistakes_are_named_before_anything_is_answered(command: Callable[..., Result], tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    (tokens / "manifest.json").write_text(json.dumps({"format": 1, "threshold": None}))
    for arguments, message in (
        (["--high", "0,hot"], "--high 0,hot must be temperatures with commas between"),
        (["--high", "-1"], "T_high is -1.0, and must be 0"),
        (["--low", "inf"], "T_low is inf, and must be 0"),
        (["--high", "", "--low", ""], "neither T_high nor T_low has a value"),
        (["--threshold", "-0.5"], "the threshold is -0.5"),
        (["--threshold", "nan"], "the threshold is nan"),
        (["--threshold", "1", "--like", str(tokens)], "write one of them"),
        (["--like", str(tokens)], "its manifest has no threshold"),
        (["--like", str(tmp_path / "nowhere")], f"no folder {tmp_path / 'nowhere'}: name a folder that"),
        (["--temperature", "0"], "entropies are measured at it"),
        (["--high", "0", "--fixed-low", "0"], "write --answers 1"),
        (["--fixed-high", "-2"], "T_high is -2.0"),
    ):
        result = command(*arguments)
        assert result.exit_code == 1, arguments
        assert message in result.output, result.output
        assert result.output.count("error:") == 1
        assert not (tmp_path / "out").exists(), arguments


def test_a_threshold_from_a_folder_of_tokens_and_another_one_in_the_same_folder(
    command: Callable[..., Result], tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    (tokens / "manifest.json").write_text(json.dumps({"format": 1, "threshold": TAU}))
    one = ["--high", "0.5", "--low", ""]
    assert command(*one, "--like", str(tokens)).exit_code == 0
    written = (tmp_path / "out" / CSV).read_bytes()
    assert json.loads((tmp_path / "out" / JSON).read_text())["threshold"] == TAU
    assert command(*one, "--threshold", str(TAU)).exit_code == 0, "the same sweep"
    result = command(*one)
    assert result.exit_code == 1
    assert "sampling.two_temperatures.threshold: 2.5 there, 0.672 now" in result.output
    assert (tmp_path / "out" / CSV).read_bytes() == written


def test_without_matplotlib_it_says_so_first(
    sweep_of: Callable[..., list[temperature_sweep.Point]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temperature_sweep.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EntropyForkError, match=re.escape(install_command("analysis"))):
        sweep_of(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_greedy_settings_with_two_temperatures() -> None:
    for pair, is_greedy in ((None, False), (TwoTemperatures(0, 0), True), (TwoTemperatures(0, 1), False)):
        assert SamplingSettings(two_temperatures=pair).is_greedy == is_greedy
    assert SamplingSettings(temperature=0.0).is_greedy
