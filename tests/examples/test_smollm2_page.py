"""The page of SmolLM2's forks and run is what the files beside it say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.cpu_demo.run import PHASES, Run
from examples.research import smollm2_page as page
from examples.research.experiment.page import PLACE, filled


def test_no_table_is_typed_by_hand() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    made = page.parts(page.FILES)
    assert filled(text, made) == text, "run: python -m examples.research.smollm2_page"
    assert {place[1] for place in PLACE.findall(text)} == set(made)


def test_new_results_are_copied_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, before = tmp_path / "smollm2", page.FILES
    files.mkdir()
    for name in ("summary.json", "temperatures.csv", "overlap.csv"):
        (files / name).write_text((before / name).read_text())
    monkeypatch.setattr(page, "FILES", files)
    monkeypatch.setattr(page, "PAGE", tmp_path / "smollm2.md")
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
    run = Run(metrics, seconds=1325.0)
    (demo / "some-run").mkdir()
    run.save(demo / "some-run/metrics.json")
    page.main(demo=demo, run="some-run", made_at="abc")
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
