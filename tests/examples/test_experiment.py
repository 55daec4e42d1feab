"""Which runs the experiment makes, with which command lines, and what it says before it makes them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import typer

from examples.cpu_demo import run as cpu_demo
from examples.cpu_demo.run import Run
from examples.research.experiment import __main__ as experiment
from examples.research.experiment import runs as making
from examples.research.experiment import tasks
from examples.research.experiment.arms import QUESTIONS
from examples.research.experiment.results import read_csv
from examples.research.experiment.tasks import TASKS, Task

STEPS = 4


def run_of(accuracy: float, masked: bool, answers: int = 2, steps: int = STEPS) -> Run:
    metrics = {
        step: {
            "critic/score/mean": 0.1 * step,
            "actor/entropy": 0.5 / step,
            "response_length/mean": 20.0 + step,
            "prompt_length/mean": 20.0,
            "perf/total_num_tokens": 128 * (40.0 + step),
            "timing_s/step": 4.0,
            **({"entropy_fork/kept_ratio": 0.2, "entropy_fork/kept_tokens": 512.0} if masked else {}),
        }
        for step in range(1, steps + 1)
    }
    for step, value in {0: 0.25, 2: 0.3, steps: accuracy}.items():
        metrics.setdefault(step, {})[f"val-core/cpu_demo/acc/mean@{answers}"] = value
    return Run(metrics, 60.0, "abc-dirty")


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Draw nothing. The list gets the plots asked for."""
    plots: list[Path] = []
    monkeypatch.setattr(experiment.pages, "draw", lambda results, file: plots.append(file))
    return plots


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let a training end at once. The list gets the command line of each run."""
    commands: list[str] = []

    def train(arguments: list[str], output: Path) -> Run:
        commands.append(" ".join(arguments))
        return run_of(0.4 + 0.01 * len(commands), "entropy_fork=off" not in arguments)

    monkeypatch.setattr(making, "train", train)
    monkeypatch.setattr(tasks, "build_world", lambda *_: None)
    return commands


def run(tmp_path: Path, **options: object) -> None:
    given = {"question": "ratios", "steps": STEPS, "seeds": 2, "directory": tmp_path}
    none = dict.fromkeys(("arm", "seed", "seeds", "steps", "test_every", "at_most", "override"))
    experiment.run(**(none | given | options))  # type: ignore[arg-type]


def test_what_is_there_is_not_run_again(runs: list[str], drawn: list[Path], tmp_path: Path) -> None:
    run(tmp_path, at_most=5)
    assert len(runs) == 5
    assert all("data.seed=1 " in command for command in runs), "a seed of every arm before the next seed"
    run(tmp_path)
    assert len(runs) == 12
    assert len(set(runs)) == 12
    run(tmp_path)
    assert len(runs) == 12
    folder = tmp_path / f"experiment-{STEPS}steps"
    assert set(drawn) == {folder / "ratios"}
    assert len(read_csv(folder / "ratios.csv")) == 12


#: what the first real runs of the controls were started with, at the commit db9da15
RECORDED = (
    "-m verl.trainer.main_ppo +recipe=demo_cpu entropy_fork=matched_random demo.dir={0}/world-512 data.seed=4 "
    "actor_rollout_ref.rollout.seed=4 actor_rollout_ref.rollout.val_kwargs.n=1 entropy_fork.seed=4 "
    "trainer.total_training_steps=30 trainer.test_freq=6 trainer.save_freq=-1 trainer.resume_mode=disable "
    "trainer.default_local_dir={0}/controls-30steps/matched-seed4/checkpoints "
    "hydra.run.dir={0}/controls-30steps/matched-seed4/hydra"
)


def test_one_arm_and_one_seed_may_be_asked_for_and_the_command_line_is_the_recorded_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, worlds = [], []
    monkeypatch.setattr(tasks, "build_world", lambda world, console, *settings: worlds.append((world, *settings)))

    def train(arguments: list[str], output: Path) -> Run:
        asked.append(" ".join(arguments[1:]))
        return run_of(0.5, True, answers=1, steps=30)

    monkeypatch.setattr(making, "train", train)
    run(tmp_path, question="controls", arm=["matched"], seed=[4], steps=None, seeds=None)
    assert asked == [RECORDED.format(tmp_path)]
    assert worlds == [(tmp_path / "world-512", "--test-problems=512")]


def test_every_run_differs_from_another_in_its_tokens_and_its_seed_alone(runs: list[str], tmp_path: Path) -> None:
    run(tmp_path, question="controls", seeds=1)
    settings = [
        {word for word in command.split() if not word.startswith(("entropy_fork", "trainer.default", "hydra.run"))}
        for command in runs
    ]
    assert all(one == settings[0] for one in settings)
    assert [next(word for word in command.split() if word.startswith("entropy_fork=")) for command in runs] == [
        "entropy_fork=off", "entropy_fork=global", "entropy_fork=matched_random", "entropy_fork=random20",
        "entropy_fork=bottom80", "entropy_fork=global", "entropy_fork=global",
    ]  # fmt: skip
    assert ["entropy_fork.score=surprisal" in runs[5], "entropy_fork.score=gradient" in runs[6]] == [True, True]


def test_scores_are_compared_at_the_same_share(runs: list[str], tmp_path: Path) -> None:
    """Every arm but ``all`` keeps a fifth, and runs that two questions share are made once."""
    run(tmp_path, seeds=1)
    run(tmp_path, seeds=1, question="scores")
    assert len(runs) == 6 + 6, "all and top20 are there already"
    asked = [[word for word in command.split() if word.startswith("entropy_fork")] for command in runs[6:]]
    scores = [next((w.split("=")[1] for w in words if w.startswith("entropy_fork.score=")), "") for words in asked]
    assert scores == ["surprisal", "covariance", "gradient", "rsi", "omega", ""]
    assert asked[-1][0] == "entropy_fork=matched_random"
    assert not any("top_ratio" in word for words in asked for word in words)


def test_the_hours_come_first_and_from_the_runs_that_are_there(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = TASKS["demo"].run_seconds * STEPS / 30
    run(tmp_path, at_most=2)
    first = capsys.readouterr().out.splitlines()[0]
    why = "(a default for two cores, because none is there yet)"
    assert first == f"12 of 12 runs are missing, about {12 * seconds / 3600:.1f} h: {seconds:.0f} s each {why}"
    folder = tmp_path / f"experiment-{STEPS}steps"
    for number, file in enumerate(sorted(folder.glob("*/metrics.json")), 1):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": 1200.0 * number}))
    run(tmp_path)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "10 of 12 runs are missing, about 5.0 h: 1800 s each (mean of the 2 that are there)"


def test_half_a_run_is_not_taken_for_a_whole_one(
    runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = run_of(0.5, True)
    del broken.metrics[3]
    monkeypatch.setattr(making, "train", lambda *arguments: broken)
    with pytest.raises(SystemExit, match=r"verl.log lacks the metrics of the steps \[3\]"):
        run(tmp_path)
    assert not list(tmp_path.rglob("metrics.json"))


def test_other_settings_do_not_lie_beside_these(runs: list[str], tmp_path: Path) -> None:
    run(tmp_path, at_most=1, override=["actor_rollout_ref.actor.optim.lr=1e-3"])
    assert runs[0].endswith(" actor_rollout_ref.actor.optim.lr=1e-3")
    with pytest.raises(typer.BadParameter, match="holds runs with"):
        run(tmp_path)
    with pytest.raises(typer.BadParameter, match="top30: the arms are all, top50"):
        run(tmp_path, arm=["top30"])
    for option in ("task", "question"):
        with pytest.raises(typer.BadParameter, match="chess: write "):
            run(tmp_path, **{option: "chess"})


def test_a_row_adds_a_task(runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    other = Task(
        "other", "another task", tmp_path, lambda *world: built.append(world[0]), "ladder_cpu", ("data.seed=7",),
        "val-core/cpu_demo/acc/mean@", 100.0,
    )  # fmt: skip
    monkeypatch.setitem(TASKS, "other", other)
    run(tmp_path, task="other", directory=None, at_most=1)
    assert built == [tmp_path / "world"]
    assert "+recipe=ladder_cpu data.seed=7 entropy_fork=off demo.dir=" in runs[0]
    assert read_csv(tmp_path / f"experiment-{STEPS}steps/ratios.csv")[0].task == "other"


@pytest.mark.process
def test_a_run_names_its_commit_and_whether_its_files_had_changes(tmp_path: Path) -> None:
    assert cpu_demo.commit(tmp_path) == "unknown"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    file = tmp_path / "file"
    file.write_text("one")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"], ["tag", "-m", "v1", "v1"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert cpu_demo.commit(tmp_path) == head[:12]
    file.write_text("two")
    assert cpu_demo.commit(tmp_path) == f"{head[:12]}-dirty"


def test_each_run_writes_the_commit_into_its_metrics(runs: list[str], tmp_path: Path) -> None:
    run(tmp_path, at_most=1)
    (result,) = read_csv(tmp_path / f"experiment-{STEPS}steps/ratios.csv")
    assert result.commit == "abc-dirty"


def test_the_validations_of_each_question_are_where_they_were() -> None:
    assert {name: one.test_every(one.steps) for name, one in QUESTIONS.items()} == {
        "ratios": 4, "scores": 4, "controls": 6,
    }  # fmt: skip
