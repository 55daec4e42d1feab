"""The ladder's example: its estimate of the gradient's variance, the softmax's gradient, and its table."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from examples.cpu_demo.run import Run
from examples.research.policy_gradient_ladder import ladder, softmax_gradient


@pytest.fixture(scope="module", autouse=True)
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """``gradient_variance`` reads this variable at import, so each test imports it by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENTROPY_FORK_GRADIENTS", str(tmp_path_factory.mktemp("spread") / "gradients.jsonl"))
        yield


def test_the_spread_of_the_terms_is_the_variance_of_their_sum() -> None:
    """For sums of 8 independent terms with known mean and variance, the estimates are right on average."""
    from examples.research.policy_gradient_ladder.gradient_variance import Spread

    random = torch.Generator().manual_seed(0)
    mean = torch.tensor([0.5, -0.25, 0.0], dtype=torch.float64)
    lines = []
    for _ in range(4000):
        spread, total = Spread(), torch.zeros(3, dtype=torch.float64)
        terms = mean + torch.tensor([1.0, 2.0, 0.5]) * torch.randn(8, 3, generator=random, dtype=torch.float64)
        for term in terms:
            total = total + term  # added up, as gradients are accumulated
            spread.note(total)
        lines.append(spread.line())
        assert lines[-1]["variance"] == pytest.approx(8 * float(terms.var(dim=0).sum()))
    estimates = {key: sum(line[key] for line in lines) / len(lines) for key in ("variance", "signal")}
    assert estimates["variance"] == pytest.approx(8 * (1 + 4 + 0.25), rel=0.02)
    assert estimates["signal"] == pytest.approx(float((8 * mean).square().sum()), rel=0.05)


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=30))
def test_a_softmax_without_uncertainty_has_no_gradient(logits: list[float]) -> None:
    """By autograd over every outcome, the expected squared gradient is 1 - Σp², and at most the entropy."""
    z = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    log_p = z.log_softmax(dim=0)
    gradients = torch.stack([torch.autograd.grad(log_p[a], z, retain_graph=True)[0] for a in range(len(logits))])
    p = log_p.detach().exp()
    expected = float((p * gradients.square().sum(dim=1)).sum())
    assert float(softmax_gradient.expected_square(z.detach())) == pytest.approx(expected, abs=1e-12)
    assert expected <= float(-(p * log_p.detach()).sum()) + 1e-12


def test_a_run_finds_what_is_on_its_callers_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ladder adds the folder of ``gradient_variance`` to PYTHONPATH, and keeps the folders that are there."""
    given: dict[str, str] = {}

    def train(arguments: list[str], output: Path, environment: dict[str, str]) -> Run:
        given.update(environment)
        Path(environment["ENTROPY_FORK_GRADIENTS"]).write_text("")
        return Run()

    monkeypatch.setattr(ladder, "train", train)
    monkeypatch.setenv("PYTHONPATH", "/opt/verl")
    ladder.climb(ladder.RUNGS[0], tmp_path, tmp_path, 2, 1, [])
    folder, *others = given["PYTHONPATH"].split(":")
    assert (Path(folder) / f"{given['VERL_USE_EXTERNAL_MODULES']}.py").is_file()
    assert others == ["/opt/verl"]


def test_table_and_plot_of_finished_runs(tmp_path: Path) -> None:
    """Two finished runs are shown, not run again."""
    for number, variance in ((1, 4.0), (7, 1.0)):
        output = tmp_path / str(number)
        output.mkdir()
        metrics = {
            0: {"val-core/cpu_demo/acc/mean@1": 0.25},
            1: {"actor/entropy": 0.5},
            2: {"val-core/cpu_demo/acc/mean@1": 0.5},
        }
        if number == 7:
            metrics[1]["entropy_fork/kept_ratio"] = 0.2
        Run(metrics, 60.0).save(output / "metrics.json")
        lines = [{"terms": 16, "square": 3.0, "variance": variance, "signal": 3.0 - variance}] * 2
        (output / "gradients.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    console = Console(width=200)
    rungs = [rung for rung in ladder.RUNGS if rung.number in (1, 7)]
    climbed = [ladder.climb(rung, tmp_path, tmp_path, 2, 1, []) for rung in rungs]
    with console.capture() as captured:
        console.print(ladder.table(climbed))
    rows = [line for line in captured.get().splitlines() if "50.0%" in line]
    assert len(rows) == 2
    assert "100%" in rows[0]
    assert "0.25" in rows[1]
    assert "20.0%" in rows[1]
    ladder.write_csv(climbed, tmp_path / "ladder.csv")
    with (tmp_path / "ladder.csv").open() as handle:
        table = list(csv.DictReader(handle))
    assert [(row["form"], row["step"], row["accuracy"], row["variance"]) for row in table] == [
        ("1", "0", "0.25", ""), ("1", "1", "", "4.0"), ("1", "2", "0.5", "4.0"),
        ("7", "0", "0.25", ""), ("7", "1", "", "1.0"), ("7", "2", "0.5", "1.0"),
    ]  # fmt: skip
    ladder.draw(climbed, tmp_path)
    assert (tmp_path / "ladder.png").stat().st_size > 10_000
    assert (tmp_path / "ladder.svg").exists()
