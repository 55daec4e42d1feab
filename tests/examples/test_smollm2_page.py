"""The page of SmolLM2's forks and run is what the files beside it say."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.cpu_demo.run import PHASES, Run
from examples.research import smollm2_page as page
from examples.research.experiment.page import PLACE, filled


def test_no_table_is_typed_by_hand() -> None:
    made, places = page.parts(page.FILES), []
    for file in (page.PAGE, page.GUIDE):
        text = file.read_text(encoding="utf-8")
        assert filled(text, made) == text, "run: python -m examples.research.smollm2_page"
        places += [place[1] for place in PLACE.findall(text)]
    assert sorted(places) == sorted(made)


def test_new_results_are_copied_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, before = tmp_path / "smollm2", page.FILES
    files.mkdir()
    for name in ("summary.json", "temperatures.csv", "overlap.csv", page.TASKS):
        (files / name).write_text((before / name).read_text())
    monkeypatch.setattr(page, "FILES", files)
    monkeypatch.setattr(page, "PAGE", tmp_path / "smollm2.md")
    monkeypatch.setattr(page, "GUIDE", tmp_path / "real_model.md")
    page.GUIDE.write_text("no place\n")
    page.PAGE.write_text("before\n<!-- made: run -->\nstale\n<!-- end: run -->\nafter\n")
    demo = tmp_path / "demo"
    (demo / "world").mkdir(parents=True)
    (demo / "world/manifest.json").write_text(json.dumps({"report": {"warmup_seconds": 301.0}}))
    training = {
        "response_length/mean": 20.0, "entropy_fork/kept_ratio": 0.2, "entropy_fork/threshold": 0.007,
        "entropy_fork/entropy_kept": 0.2, "entropy_fork/entropy_dropped": 0.001, "timing_s/step": 60.0,
        "perf/other": 1.0,
        **dict.fromkeys(PHASES.values(), 12.0),
    }  # fmt: skip
    accuracy = "val-core/reasoning_gym/chain_sum/acc/mean@1"
    metrics = {0: {accuracy: 0.25}, 1: training, 2: training | {accuracy: 0.5, "response_length/mean": 30.0}}
    run = Run(metrics, seconds=1325.0, commit="abc")
    (demo / "some-run").mkdir()
    run.save(demo / "some-run/metrics.json")
    page.main(demo=demo, run="some-run")
    text = " ".join(page.PAGE.read_text().split())
    assert text.startswith("before <!-- made: run --> | | before | after step 2 |")
    assert "| right | 25.0% | 50.0% |" in text
    for said in (
        "made at `abc`",
        "20 tokens in step 1 and 30 in step 2",
        "With the fetch of the model it took 22 min 5 s",
        "the warm-up 5 min 1 s",
    ):
        assert said in text
    assert "stale" not in text
    assert "perf/other" not in (files / page.RUN).read_text()


def test_the_files_of_each_script_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, measured, compared = tmp_path / "smollm2", tmp_path / "measured", tmp_path / "compared"
    for folder, names in {measured / "forks": page.OF_FORKS, compared / "comparison": page.OF_COMPARISON}.items():
        (folder / "figures").mkdir(parents=True)
        for name in names:
            (folder / name).write_text(f"new {name}")
    (measured / "forks/summary.json").write_text((page.FILES / "summary.json").read_text())
    for name, row in {"temperatures": "0.6,1", "temperatures-cool": "0.6,0.6"}.items():
        (measured / name).mkdir()
        (measured / name / "temperatures.csv").write_text(f"high,low\n{row}\n")
    files.mkdir()
    for name, value in {"FILES": files, "PAGE": tmp_path / "smollm2.md", "GUIDE": tmp_path / "guide.md"}.items():
        monkeypatch.setattr(page, name, value)
    monkeypatch.setattr(page, "parts", lambda folder: {})
    page.PAGE.write_text("a page\n")
    page.GUIDE.write_text("a guide\n")
    page.main(measured=measured, compared=compared)
    copied = {file.name: file.read_text() for file in files.iterdir()}
    assert copied.pop("temperatures.csv") == "high,low\n0.6,1\n0.6,0.6\n", "one head, the pairs of both"
    assert json.loads(copied.pop("summary.json"))["tokens"] > 100_000
    assert copied == {Path(name).name: f"new {name}" for name in (*page.OF_FORKS, *page.OF_COMPARISON)}


def test_the_answers_to_several_tasks_are_counted(tmp_path: Path) -> None:
    """Right is a score of 1, partly right one between 0 and 1; the commonest truth is what one answer to all gets."""
    rows = [
        {"data_source": f"reasoning_gym/{task}", "prompt": [{"role": "user", "content": f"{task} {number}?"}],
         "reward_model": {"style": "rule", "ground_truth": truth}}
        for task, truths in {"gcd": ["1", "2", "1"], "chain_sum": ["3", "4", "5"]}.items()
        for number, truth in enumerate(truths)
    ]  # fmt: skip
    data, evaluation, file = tmp_path / "test.parquet", tmp_path / "tasks", tmp_path / "tasks.csv"
    pq.write_table(pa.Table.from_pylist(rows), data)
    scores = {"gcd": [0.0, 0.01, 0.0], "chain_sum": [1.0, 0.5, 1.0]}
    evaluation.mkdir()
    answers = [
        {"data_source": f"reasoning_gym/{task}", "score": score} for task, some in scores.items() for score in some
    ]
    (evaluation / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    summary = {"questions": 3, "interval": [0.1, 0.75], "boxed": 2 / 3, "mean_tokens": 20.5}
    results = {"benchmarks": {f"reasoning_gym/{task}": summary for task in scores}}
    (evaluation / "results.json").write_text(json.dumps(results))
    page.keep_tasks(evaluation, data, file)
    gcd, sums = page.rows_of(file)
    assert gcd == {
        "task": "gcd", "questions": "3", "right": "0", "low": "0.1000", "high": "0.7500", "commonest": "2",
        "partly": "1", "boxed": "2", "tokens": "20.50",
    }  # fmt: skip
    assert (sums["right"], sums["partly"], sums["commonest"]) == ("2", "1", "1")
    best, worst = page.tasks(file).splitlines()[2:]
    assert best.startswith("| `chain_sum` |")
    assert "| 10 to 75 |" in best
    assert worst.startswith("| `gcd` |")
