"""The experiment's bookkeeping: which runs it makes, and what it computes from finished runs."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import pytest
import typer
from rich.console import Console

from examples.research import experiment

STEPS = 4


def run_of(accuracy: float, masked: bool) -> experiment.Run:
    steps = {
        step: {
            "critic/score/mean": 0.1 * step,
            "actor/entropy": 0.5 / step,
            "response_length/mean": 20.0 + step,
            **({"entropy_fork/kept_ratio": 0.2} if masked else {}),
        }
        for step in range(1, STEPS + 1)
    }
    accuracies = {0: 0.25, 2: 0.3, STEPS: accuracy}
    for step, value in accuracies.items():
        steps.setdefault(step, {})["val-core/cpu_demo/acc/mean@2"] = value
    return experiment.Run(steps, 60.0)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Run ``main`` with a training that ends at once. The list gets the command line of each run."""
    commands: list[str] = []

    def train(arguments: list[str], output: Path) -> experiment.Run:
        commands.append(" ".join(arguments))
        return run_of(0.4 + 0.1 * len(commands), "entropy_fork=off" not in arguments)

    monkeypatch.setattr(experiment, "train", train)
    monkeypatch.setattr(experiment, "build_world", lambda *_: None)
    return commands


def main(tmp_path: Path, **options: object) -> None:
    given = {"steps": STEPS, "seeds": 2, "arm": None, "at_most": None, "directory": tmp_path, "override": None}
    given["question"] = "ratios"
    experiment.main(**(given | options))  # type: ignore[arg-type]


def test_what_is_there_is_not_run_again(runs: list[str], tmp_path: Path) -> None:
    main(tmp_path, at_most=5)
    assert len(runs) == 5
    assert all("data.seed=1 " in command for command in runs), "a seed of every arm before the next seed"
    main(tmp_path)
    assert len(runs) == 12
    assert len(set(runs)) == 12
    main(tmp_path)
    assert len(runs) == 12
    folder = tmp_path / f"experiment-{STEPS}steps"
    assert (folder / "ratios.svg").stat().st_size > 10_000
    with (folder / "ratios-curves.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 12 * (STEPS + 1)
    assert {row["kept_ratio"] for row in rows if row["arm"] == "all" and row["step"] != "0"} == {"1.0"}
    assert {row["accuracy"] for row in rows if row["step"] == "1"} == {""}


def test_every_run_differs_from_another_in_its_tokens_and_its_seed_alone(runs: list[str], tmp_path: Path) -> None:
    main(tmp_path, seeds=1)
    settings = [
        {word for word in command.split() if not word.startswith(("entropy_fork", "trainer.default", "hydra.run"))}
        for command in runs
    ]
    assert all(one == settings[0] for one in settings)
    assert [next(word for word in command.split() if word.startswith("entropy_fork=")) for command in runs] == [
        "entropy_fork=off", *["entropy_fork=global"] * 3, "entropy_fork=bottom80", "entropy_fork=random20",
    ]  # fmt: skip


def test_half_a_run_is_not_taken_for_a_whole_one(
    runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = run_of(0.5, True)
    del broken.metrics[3]
    monkeypatch.setattr(experiment, "train", lambda *arguments: broken)
    with pytest.raises(SystemExit, match=r"verl.log lacks the metrics of the steps \[3\]"):
        main(tmp_path)
    assert not list(tmp_path.rglob("metrics.json"))


def test_other_settings_do_not_lie_beside_these(runs: list[str], tmp_path: Path) -> None:
    main(tmp_path, at_most=1, override=["actor_rollout_ref.actor.optim.lr=1e-3"])
    with pytest.raises(typer.BadParameter, match="holds runs with"):
        main(tmp_path)
    with pytest.raises(typer.BadParameter, match="top30: the arms are all, top50"):
        main(tmp_path, arm=["top30"])


def test_means_spreads_and_differences_by_seed() -> None:
    all_, top = experiment.QUESTIONS["ratios"][0], experiment.QUESTIONS["ratios"][2]
    final = {(all_.name, 1): 0.5, (all_.name, 2): 0.7, (top.name, 1): 0.6, (top.name, 2): 0.9}
    trained = [
        experiment.Trained(arm, seed, run_of(final[arm.name, seed], arm is top))
        for arm in (all_, top)
        for seed in (1, 2)
    ]
    rows = {row["arm"]: row for row in experiment.summary(trained)}
    assert rows["top20"]["accuracy"] == pytest.approx(0.75)
    assert rows["top20"]["accuracy_sd"] == pytest.approx(statistics.stdev([0.6, 0.9]))
    assert rows["top20"]["minus_all"] == pytest.approx(0.15)
    assert rows["top20"]["minus_all_sd"] == pytest.approx(statistics.stdev([0.1, 0.2]))
    assert rows["all"]["kept_ratio"] == 1.0
    assert rows["all"]["entropy"] == pytest.approx(0.125), "of the last quarter of steps"
    console = Console(width=160)
    with console.capture() as captured:
        console.print(experiment.table(list(rows.values()), STEPS))
    assert "75.0 ± 21.2" in captured.get()
    assert "+15.0 ± 7.1" in captured.get()
    (alone,) = experiment.summary(trained[:1])
    assert "nan" not in str(experiment.with_spread(alone["accuracy"], alone["accuracy_sd"], 1))


def test_scores_are_compared_at_the_same_share(runs: list[str], tmp_path: Path) -> None:
    """Every arm but ``all`` keeps a fifth, and runs that two questions share are made once."""
    main(tmp_path, seeds=1)
    main(tmp_path, seeds=1, question="scores")
    assert len(runs) == 6 + 6, "all and top20 are there already"
    asked = [[word for word in command.split() if word.startswith("entropy_fork")] for command in runs[6:]]
    scores = [next((w.split("=")[1] for w in words if w.startswith("entropy_fork.score=")), "") for words in asked]
    assert scores == ["surprisal", "covariance", "gradient", "rsi", "omega", ""]
    assert asked[-1][0] == "entropy_fork=matched_random"
    assert not any("top_ratio" in word for words in asked for word in words)
