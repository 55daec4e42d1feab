"""A sweep of the real main_ppo."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.sweeps import read

pytestmark = pytest.mark.e2e


def test_a_sweep_over_a_recipe_of_the_paper(main_ppo, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A sweep over a recipe, shrunk for two cores ('make smoke' runs all): two jobs train, the one between them fails.

    The answers of this world are never right, so dynamic sampling filters groups by the reward after shaping, not by
    ``acc``.
    """
    run = main_ppo(
        "entropy_fork.top_ratio=0.2,7,1.0",
        f"hydra.sweep.dir={tmp_path}/sweep",
        "data.max_response_length=48",
        "reward.reward_kwargs.overlong_buffer_cfg.len=24",
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.metric=reward",
        "trainer.test_freq=1",
        f"trainer.rollout_data_dir={tmp_path}/answers",
        recipe=("+recipe=qwen3_14b_20k", "+cluster=cpu_smoke"),
        flags=["-m"],
        expect=1,
    )
    printed = [file.read_text(errors="replace") for file in sorted((tmp_path / "sweep").glob("*/output.log"))]
    run = replace(run, output=run.output + "".join(printed))
    assert "step    1  accuracy" in run.output, "the sweep shows a line per step"
    # 1. The sweep: each job in its own Ray session and from the same start, the failed one named.
    rows = read(tmp_path / "sweep")
    assert [row["status"] for row in rows] == ["finished", "failed", "finished"], run.output[-6000:]
    assert "top_ratio must be in (0, 1], got 7.0" in rows[1]["error"]
    assert [float(row["kept_ratio"]) for row in rows[::2]] == [pytest.approx(0.2, abs=0.01), 1.0]
    assert all(0 <= float(row["accuracy"]) <= 1 and row["step"] == "1" for row in rows[::2])
    assert run.metric("entropy_fork/kept_ratio") == [float(row["kept_ratio"]) for row in rows[::2]]
    assert "setting global step to" not in run.output, "job 2 took up the checkpoint of job 0"
    for ratio in ("0.2", "1.0"):
        folder = run.folder / "checkpoints" / f"top_ratio={ratio}"
        assert (folder / "latest_checkpointed_iteration.txt").read_text() == "1"

    # 2. The recipe: its preset, template, learning rate, dynamic sampling and overlong shaping.
    assert 0.5 < run.metric("entropy_fork/overlap_with_old")[0] <= 1.0
    assert -1 <= run.metric("critic/score/min")[0] < 0, "no answer was shaped"
    assert run.metric("critic/score/max")[0] > run.metric("critic/score/min")[0]
    assert run.metric("actor/lr") == [1e-4, 1e-4], "a warm-up would train the first batch at a rate of 0"
    answers = [json.loads(line) for line in (tmp_path / "answers/top_ratio=0.2/1.jsonl").read_text().splitlines()]
    assert len(answers) == 32
    assert all(row["input"].startswith("User:\n") and row["input"].endswith("\n\nAssistant:\n") for row in answers)
