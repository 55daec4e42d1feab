"""The menu of scores of the report, in a real headless browser: marks, thresholds and statistics of each score."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.browser import browser, choose, kept_tokens, open_page, set_ratio
from helpers.scored_answers import answers_of_analysis, answers_of_run, restated
from playwright.sync_api import expect
from typer.testing import CliRunner

from entropy_fork.analysis.token_scores import UNITS
from entropy_fork.cli import app
from entropy_fork.core.observed import rank_correlation
from entropy_fork.core.rule import Selector
from entropy_fork.core.scores import SCORES
from entropy_fork.core.selection import kept_count, select_tokens
from entropy_fork.report.packed_answers import RATIOS
from entropy_fork.tokens.store import AnswerTokens, write_manifest, write_part

STEPS = (2, 4)
OF_ANALYSIS = ["entropy", "surprisal", "rsi", "position", "random"]
OF_RUN = [name for name in SCORES if name != "gradient_norm"]
#: of a run, as ``verl/token_dump.py`` writes it
MANIFEST = {"source": "training", "model": "tiny", "select": "top", "where": "", "use": "mask", "control": "none"}
OWN = "helpers.own_scores:confident_and_wrong"


def written(folder: Path, answers: Sequence[AnswerTokens], manifest: dict[str, Any]) -> Path:
    write_manifest(folder, manifest)
    for number, step in enumerate(dict.fromkeys(answer.step for answer in answers)):
        write_part(folder, number, [answer for answer in answers if answer.step == step])
    return folder


def report(file: Path, *arguments: str) -> Path:
    result = CliRunner().invoke(app, ["report", str(file), "--min-count", "5", *arguments])
    assert result.exit_code == 0, result.output
    return file


def data_of(file: Path) -> dict[str, Any]:
    block = re.search(r'id="data">(.*?)</script>', file.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    return json.loads(block[1])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ranked its tokens by omega, and an analysis, in one report."""
    place = tmp_path_factory.mktemp("scores")
    run = written(place / "run", answers_of_run(STEPS), MANIFEST | {"score": "omega", "where": "advantage > 0"})
    analysis = written(place / "analysis", answers_of_analysis(4), {"source": "model"})
    return report(place / "report.html", "--tokens", str(run), "--tokens", str(analysis))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


def by(opened: Any, name: str) -> None:
    """Choose a score."""
    value = opened.locator("#by option").filter(has_text=re.compile(f"^{re.escape(name)}( |$)")).get_attribute("value")
    opened.locator("#by").select_option(value)


def colours_of_tokens(opened: Any) -> list[float]:
    """0 without colour, 1 with the full one."""
    script = "tokens => tokens.map(token => Number(token.style.getPropertyValue('--h')))"
    return opened.locator("#view .token").evaluate_all(script)


def names_in_menu(opened: Any) -> list[str]:
    return opened.locator("#by option").all_inner_texts()


def shown(value: float, unit: str) -> str:
    """A value as the page writes it."""
    digits = float(f"{value:.4g}")
    is_fixed = unit == "nats" and not 0 < abs(value) < 0.001
    text = f"{value:.4f}" if is_fixed else str(int(digits) if digits.is_integer() else digits)
    return text.replace("-", "−") + (f" {unit}" if unit else "")


def of_run(name: str, answers: Sequence[AnswerTokens]) -> torch.Tensor:
    return torch.tensor(restated(name, answers), dtype=torch.float64).float()


@pytest.mark.process
@pytest.mark.parametrize("name", [name for name in OF_RUN if name != "random"])
def test_a_score_marks_what_the_core_would_keep(name: str, page: Path, chromium: Any) -> None:
    """By a restated score. Each step is a pool, and the means of the covariance are over its answers."""
    opened, heard = open_page(chromium, page)
    by(opened, name)
    opened.locator("#step").select_option("4")
    answers = [answer for answer in answers_of_run(STEPS) if answer.step == 4]
    lengths = torch.tensor([len(answer.entropy) for answer in answers])
    values, entropy = of_run(name, answers), of_run("entropy", answers)
    everything = torch.ones(len(values), dtype=torch.bool)
    for percent in (20, 3, 55):
        set_ratio(opened, percent)
        selection, other = (select_tokens(v, everything, lengths, Selector(percent / 100)) for v in (values, entropy))
        for place, expected in enumerate(selection.kept.split(lengths.tolist())):
            choose(opened, place)
            assert kept_tokens(opened) == expected.tolist(), (percent, place)
        said = opened.locator("#counts").inner_text()
        assert f"step 4: {selection.num_kept} of {len(values)} tokens, τ = " in said
        if name != "covariance":  # the last bits of its means are not those of the restatement
            assert f"τ = {shown(selection.threshold, UNITS[name])} · " in said
        agreement = opened.locator("#agreement")
        assert agreement.is_visible() == (name != "entropy")
        if name != "entropy":
            shared = int((selection.kept & other.kept).count_nonzero()) / selection.num_kept
            assert agreement.inner_text() == (
                f"{100 * shared:.1f}% of the top {percent}% by {name} are in the top {percent}% by entropy · rank "
                f"correlation with the entropy: {rank_correlation(values, entropy):.2f}".replace("-", "−")
            )
    assert SCORES[name].sentence in opened.locator("#about").inner_text()
    assert opened.locator("#legend-end").inner_text().endswith(UNITS[name])
    assert heard.console == []
    opened.context.close()


@pytest.mark.process
def test_choosing_a_score_colours_the_tokens_by_it(page: Path, chromium: Any) -> None:
    opened, _ = open_page(chromium, page)
    opened.locator("#folder").select_option("1")
    expect(opened.locator("#list li")).to_have_count(4)
    choose(opened, 3)
    colours = {}
    for name in OF_ANALYSIS:
        by(opened, name)
        set_ratio(opened, 20)
        colours[name] = colours_of_tokens(opened)
        set_ratio(opened, 70)
        assert colours[name] == colours_of_tokens(opened), "the slider changes no colour"
    answer = answers_of_analysis(4)[3]
    assert colours["entropy"] == pytest.approx((answer.entropy / 1.5).tolist(), abs=1e-3)
    # of another score the page has the stop of the slider: the colour is that of the lowest value there
    surprisal = -answer.log_prob
    assert np.all(np.diff(np.array(colours["surprisal"])[np.argsort(surprisal, kind="stable")]) >= 0)
    assert max(colours["surprisal"]) == pytest.approx(1)
    assert colours["position"] == sorted(colours["position"])
    assert len({tuple(some) for some in colours.values()}) == len(OF_ANALYSIS)
    opened.context.close()


@pytest.mark.process
def test_a_token_says_between_which_values_its_score_is(page: Path, chromium: Any) -> None:
    opened, _ = open_page(chromium, page, viewport={"width": 1200, "height": 900})
    answers = [answer for answer in answers_of_run(STEPS) if answer.step == 2]
    for name in ("omega", "gradient", "covariance"):
        by(opened, name)
        values = iter(restated(name, answers))
        for place, answer in enumerate(answers):
            choose(opened, place)
            for token in range(len(answer.entropy)):
                value = next(values)
                opened.locator("#view .token").nth(token).dispatch_event("click")
                terms, texts = (
                    opened.locator("#info dt").all_inner_texts(),
                    opened.locator("#info dd").all_inner_texts(),
                )
                said = dict(zip(terms, texts, strict=True))
                assert answer.advantage is not None
                assert said["advantage"] == f"{answer.advantage[token]:.4f}".replace("-", "−")
                ends = [float(end.replace("−", "-")) for end in said[name].removesuffix(" nats").split(" to ")]
                assert ends[0] - 1e-3 <= value <= ends[-1] + 1e-3, (name, place, token)
                assert ends[-1] - ends[0] < 1.5
    opened.context.close()


@pytest.mark.process
def test_a_run_is_shown_by_its_own_score_and_each_folder_has_its_menu(page: Path, chromium: Any) -> None:
    opened, _ = open_page(chromium, page)
    assert names_in_menu(opened) == [name if name != "omega" else "omega (this run’s)" for name in OF_RUN]
    assert opened.locator("#by").evaluate("one => one.selectedOptions[0].textContent") == "omega (this run’s)"
    assert opened.locator("#about").inner_text() == (
        f"{SCORES['omega'].sentence} The run's rule: score=omega, select=top, where=advantage > 0, use=mask."
    )
    opened.locator("#folder").select_option("1")
    expect(opened.locator("#list li")).to_have_count(4)
    assert names_in_menu(opened) == OF_ANALYSIS
    expect(opened.locator("#about")).to_have_text(SCORES["entropy"].sentence)
    assert opened.locator("#agreement").is_hidden()
    by(opened, "surprisal")
    assert "by surprisal" in opened.locator("#agreement").inner_text()
    # what the reader chose stays chosen where there is the same score
    opened.locator("#folder").select_option("0")
    expect(opened.locator("#list li")).to_have_count(6)
    expect(opened.locator("#about")).to_contain_text(SCORES["surprisal"].sentence)
    # and the table of the analysis is there
    table = (
        opened.locator("section:has(h2:text('Entropy: run')) table").filter(has_text="scores, and how far").inner_text()
    )
    assert re.search(r"omega\s+[\d.]+", table)
    opened.context.close()


@pytest.mark.process
def test_a_score_of_the_users_own_is_in_the_menu_and_chosen(tmp_path: Path, chromium: Any) -> None:
    run = written(tmp_path / "run", answers_of_run(STEPS), MANIFEST | {"score": OWN})
    file = report(tmp_path / "report.html", "--tokens", str(run), "--score", OWN)
    opened, heard = open_page(chromium, file)
    assert opened.locator("#by").evaluate("one => one.selectedOptions[0].textContent") == f"{OWN} (this run’s)"
    assert "The surprisal <b>beyond</b> the entropy." in opened.locator("#about").inner_text()
    answers = [answer for answer in answers_of_run(STEPS) if answer.step == 2]
    values = torch.from_numpy(np.concatenate([-answer.log_prob - answer.entropy for answer in answers]))
    lengths = torch.tensor([len(answer.entropy) for answer in answers])
    selection = select_tokens(values, torch.ones_like(values), lengths, Selector(0.2))
    for place, expected in enumerate(selection.kept.split(lengths.tolist())):
        choose(opened, place)
        assert kept_tokens(opened) == expected.tolist()
    assert f"τ = {shown(selection.threshold, '')} · " in opened.locator("#counts").inner_text()
    assert heard.console == []
    opened.context.close()


def test_no_code_runs_that_only_a_folder_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of tokens may come from anywhere: what its manifest names is text."""
    (tmp_path / "from_elsewhere.py").write_text("raise SystemExit('imported')\ndef mine(entropy): return entropy\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = written(tmp_path / "run", answers_of_run(STEPS), MANIFEST | {"score": "from_elsewhere:mine"})
    (folder,) = data_of(report(tmp_path / "report.html", "--tokens", str(run)))["folders"]
    assert "from_elsewhere" not in sys.modules
    assert folder["own"] is None
    assert "score=from_elsewhere:mine" in folder["run"]
    assert "Its score is not shown: it needs --score from_elsewhere:mine" in folder["run"]


@pytest.mark.parametrize(
    ("manifest", "chosen", "run"),
    [
        ({"source": "training", "select": "top"}, "entropy", ""),  # of an older version
        (MANIFEST | {"score": None, "select": "all", "use": None}, "entropy", ""),  # trained on every token
        (MANIFEST | {"score": "rsi", "select": "random"}, "entropy",
         "The run's rule: score=rsi, select=random, use=mask."),
        (MANIFEST | {"score": "surprisal", "use": "weight", "control": "matched_random"}, "surprisal",
         "The run's rule: score=surprisal, select=top, use=weight, control=matched_random."),
        (MANIFEST | {"score": "gradient_norm"}, "entropy",
         "The run's rule: score=gradient_norm, select=top, use=mask. Its score is not shown: it reads sum_pi_squared, "
         "which these tokens do not have. A training run with entropy_fork.dump_every writes what its batches have."),
        ({"source": "model", "score": "rsi"}, "entropy", ""),
        (MANIFEST | {"score": ["rsi"]}, "entropy", ""),
    ],
)  # fmt: skip
def test_what_a_manifest_says_of_its_run(manifest: dict[str, Any], chosen: str, run: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "run", answers_of_run([2]), manifest)
    data = data_of(report(tmp_path / "report.html", "--tokens", str(folder)))
    assert data["scores"][data["folders"][0]["chosen"]]["name"] == chosen
    assert data["folders"][0]["run"] == run


def test_draws_are_the_same_in_every_report_and_keep_their_share(tmp_path: Path) -> None:
    folder = written(tmp_path / "analysis", answers_of_analysis(4), {"source": "model"})
    packed = [data_of(report(tmp_path / f"{n}.html", "--tokens", str(folder)))["answers"] for n in range(2)]
    assert packed[0] == packed[1]
    data = data_of(tmp_path / "0.html")
    assert data["pools"][0]["num_kept"] == [kept_count(data["pools"][0]["num_tokens"], ratio) for ratio in RATIOS]


@pytest.mark.process
def test_a_tiny_threshold_is_not_shown_as_zero(tmp_path: Path, chromium: Any) -> None:
    """The log-probabilities of engine and trainer often differ by a millionth."""
    answers = [
        replace(answer, rollout_log_prob=answer.log_prob - np.float32(2**-19) * (np.arange(len(answer.entropy)) % 2))
        for answer in answers_of_run([1])
    ]
    folder = written(tmp_path / "run", answers, MANIFEST | {"score": "mismatch"})
    opened, _ = open_page(chromium, report(tmp_path / "report.html", "--tokens", str(folder)))
    assert "τ = 0.000001907 nats · " in opened.locator("#counts").inner_text()
    opened.context.close()


def test_fields_that_only_some_answers_have_are_not_used(tmp_path: Path) -> None:
    answers = answers_of_run(STEPS)
    answers[1] = replace(answers[1], advantage=None)
    folder = written(tmp_path / "run", answers, MANIFEST | {"score": "gradient"})
    data = data_of(report(tmp_path / "report.html", "--tokens", str(folder)))
    assert [data["scores"][place]["name"] for place in data["folders"][0]["scores"]] == [
        "entropy", "surprisal", "rsi", "mismatch", "position", "random",
    ]  # fmt: skip
    assert data["folders"][0]["advantage"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--score", "entropi"], "--score entropi cannot be used: score must be one of entropy, surprisal"),
        (
            ["--score", "gradient"],
            "--score gradient cannot be used: it reads advantage, which these tokens do not have",
        ),
        (["--score", "helpers.own_scores:fails_on_long"], "it raised RuntimeError: too long for me"),
    ],
)
def test_a_score_that_cannot_be_shown_is_one_clear_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "analysis", answers_of_analysis(4), {"source": "model"})
    result = CliRunner().invoke(app, ["report", str(tmp_path / "out.html"), "--tokens", str(folder), *arguments])
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "out.html").exists()
    result = CliRunner().invoke(app, ["report", str(tmp_path / "out.html"), "--run", "x=y", "--score", "rsi"])
    assert "--score chooses what the tokens are ranked by: write --tokens FOLDER" in result.output
