"""The report: what is packed, what is drawn, and the page itself in a real headless browser."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.browser import browser, choose, kept_tokens, open_page, set_ratio, shown_tokens
from playwright.sync_api import expect
from typer.testing import CliRunner

from entropy_fork.analysis.token_scores import each_score
from entropy_fork.cli import app
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.core.rule import Selector
from entropy_fork.core.selection import kept_count, select_tokens
from entropy_fork.report import curves, page, steps
from entropy_fork.report.packed_answers import RATIOS, chosen_answers, pools_of, tokens_shown
from entropy_fork.tokens.store import AnswerTokens, read_answers, write_manifest, write_part

#: what the tokens of an analysis can be ranked by
SCORES_OF_ANALYSIS = ["entropy", "surprisal", "rsi", "position", "random"]

#: what a model may write; each becomes a token
HOSTILE = [
    "<script>window.hacked = 1; alert(1)</script>",
    "</script><script>window.hacked = 2</script>",
    "<img src=x onerror='window.hacked = 3'>",
    "<!--<script>",
    "]]>&lt;b&gt;\\u003c{{ 7 * 7 }}",
    "x" * 20_000,
    "\u202eright to left override",
    "مرحبا بالعالم",
    "\x00\x07\x1b[31m\x7f\x85",
    "<0xE2>",
    "<0x80><0x99>",
    "zero\u200bwidth\ufeff",
    "two\nlines\n",
    "\t",
    " ",
    "",
    "🍴",
]

#: how the page shows those that cannot be shown as they are (a line's end also has a mark, which is not text)
SHOWN = {
    "\u202eright to left override": "‹U+202E›right to left override",
    "\x00\x07\x1b[31m\x7f\x85": "␀␇␛[31m␡‹U+0085›",
    "zero\u200bwidth\ufeff": "zero‹U+200B›width‹U+FEFF›",
}


def make_answer(number: int, pieces: list[str], seed: int, step: int | None = None) -> AnswerTokens:
    """Entropies with many ties, so that which of equal tokens are kept is seen."""
    random = np.random.default_rng(seed)
    entropy = (random.integers(0, 12, len(pieces)) / 4).astype(np.float32)
    return AnswerTokens(
        prompt=f"<|user|>\nquestion {number} <script>window.hacked = 4</script>\u202e",
        text="".join(pieces),
        token_ids=np.array([abs(hash(piece)) % 50_000 for piece in pieces], dtype=np.int32),
        pieces=pieces,
        entropy=entropy,
        log_prob=(-entropy - random.random(len(pieces)) / 3).astype(np.float32),
        rank=None if number % 2 else random.integers(0, 9, len(pieces)).astype(np.int32),
        selected=None if step is None else entropy > 1.5,
        answer=number,
        step=step,
        data_source="</title><script>window.hacked = 5</script>",
        ground_truth="\x00<b>42</b>",
        score=float(number % 3),
        truncated=number == 1,
    )


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports") / "model <b>$x$"
    write_manifest(folder, {"source": "model", "model": "tiny"})
    words = [f" word{number}" for number in range(40)]
    answers = [make_answer(0, HOSTILE, 0)] + [make_answer(n, words[n : n + 30], n) for n in range(1, 6)]
    write_part(folder, 0, answers[:4])
    write_part(folder, 1, answers[4:])
    return folder


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of three answers, in whose later half `` moved`` is a fork and in whose earlier half it is not."""
    folder = tmp_path_factory.mktemp("dump") / "tokens"
    write_manifest(folder, {"source": "training", "model": "tiny"})
    for step in (2, 4, 6, 8):
        answers = []
        for place in range(3):
            pieces = [" moved", " stays"] * 10
            answer = make_answer(step * 100 + place, pieces, step * 10 + place, step)
            is_moved = np.array([piece == " moved" for piece in pieces])
            answers.append(replace(answer, selected=is_moved & (step > 4)))
        write_part(folder, step, answers)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs' tensorboard files; the first was interrupted after step 5 and took steps 4 and 5 once more."""
    from torch.utils.tensorboard import SummaryWriter

    folders = []
    for name, metrics in (("masked", list(curves.METRICS)), ("baseline", ["actor/entropy", "response_length/mean"])):
        folder = tmp_path_factory.mktemp(name)
        for part, steps_taken in enumerate([range(1, 6), range(4, 9)] if name == "masked" else [range(1, 9)]):
            with SummaryWriter(str(folder), filename_suffix=f".{part}") as writer:
                for step in steps_taken:
                    for number, metric in enumerate(metrics):
                        writer.add_scalar(metric, number + step + 100 * part, step)
                    if step % 4 == 0:
                        writer.add_scalar("val-core/math/acc/mean@8", step / 10, step)
                        writer.add_scalar("val-core/math/acc/best@8/mean", 1.0, step)
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def later(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same texts, measured with a later checkpoint: what had 2 nats and more has half a nat less."""
    folder = tmp_path_factory.mktemp("checkpoint") / "later"
    write_manifest(folder, {"source": "model", "model": "tiny"})
    answers = [replace(one, entropy=np.where(one.entropy >= 2, one.entropy - 0.5, one.entropy).astype(np.float32))
               for one in read_answers(tokens)]  # fmt: skip
    write_part(folder, 0, answers)
    return folder


@pytest.fixture(scope="module")
def report(tokens: Path, dump: Path, later: Path, runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All there is in one file, made by the command."""
    file = tmp_path_factory.mktemp("out") / "report.html"
    arguments = ["report", str(file), "--tokens", str(tokens), "--tokens", str(dump), "--title", "<b>Mine</b> & yours"]
    arguments += ["--compare", str(tokens), "--compare", str(later), "--min-count", "5"]
    arguments += ["--run", f"masked <i>={runs[0]}", "--run", f"_baseline_$={runs[1]}"]
    result = CliRunner().invoke(app, [*arguments, "--figures", str(file.parent / "figures")])
    assert result.exit_code == 0, result.output
    assert "written: " in result.output
    return file


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


def test_hostile_text_is_text(report: Path, chromium: Any) -> None:
    """And nothing of it runs, leaves the page, or is said on the console."""
    opened, heard = open_page(chromium, report, viewport={"width": 1200, "height": 900})
    assert shown_tokens(opened) == [SHOWN.get(piece, piece) for piece in HOSTILE]
    assert opened.locator("#view *").evaluate_all("all => all.every(one => one.tagName === 'SPAN')")
    opened.locator("summary").click()
    prompt = opened.locator("#prompt").inner_text()
    assert prompt.startswith("<|user|>")
    assert "question 0 <script>window.hacked = 4</script>‹U+202E›" in prompt
    assert "</title><script>window.hacked = 5</script>" in opened.locator("#answer-title").inner_text()
    assert "expected: ␀<b>42</b>" in opened.locator("#answer-title").inner_text()
    assert opened.title() == opened.locator("h1").inner_text() == "<b>Mine</b> & yours"
    assert opened.locator("#folder option").first.inner_text() == "model <b>$x$"

    opened.locator("#search").fill("window.hacked = 2")
    expect(opened.locator("#list li")).to_have_count(1)
    opened.locator("#search").fill("")
    expect(opened.locator("#list li")).to_have_count(6)
    for place in range(6):
        choose(opened, place)
        for span in opened.locator("#view .token").all()[:20]:
            span.hover(position={"x": 1, "y": 1}, force=True)
    opened.evaluate(
        "Promise.all([...document.images].map(image => { image.loading = 'eager'; return image.decode() }))"
    )
    assert opened.evaluate("[...document.images].every(image => image.naturalWidth > 100)")
    assert opened.evaluate("window.hacked") is None
    assert opened.evaluate("document.scripts.length") == 2  # the data and the page's own
    assert heard.console == []
    assert [url for url in heard.requests if not url.startswith(("data:", "blob:"))] == [report.as_uri()]
    opened.context.close()


def test_the_slider_marks_what_the_core_would_keep(report: Path, tokens: Path, chromium: Any) -> None:
    opened, _ = open_page(chromium, report)
    answers = list(read_answers(tokens))
    entropy = torch.from_numpy(np.concatenate([answer.entropy for answer in answers]))
    lengths = torch.tensor([len(answer.entropy) for answer in answers])
    colours = set()
    for percent in (20, 7, 53, 100):
        set_ratio(opened, percent)
        selection = select_tokens(entropy, torch.ones_like(entropy), lengths, Selector(percent / 100))
        expected = list(selection.kept.split(lengths.tolist()))
        for place in (0, 3, 5):
            choose(opened, place)
            assert kept_tokens(opened) == expected[place].tolist(), (percent, place)
            said = opened.locator("#counts").inner_text()
            assert f"all shown: {selection.num_kept} of {len(entropy)} tokens" in said
            assert f"τ = {selection.threshold:.4f} nats" in said
            assert f"this answer: {int(expected[place].sum())} of {len(expected[place])}" in said
        colours.add(tuple(styles(opened, "boxShadow")))
    assert len(colours) == 4, "the slider should have recoloured"

    # with the keys, as without a mouse; and in the other colouring, in which dropped tokens have none
    set_ratio(opened, 20)
    before = sum(kept_tokens(opened))
    opened.locator("#ratio").focus()
    for _ in range(30):
        opened.keyboard.press("ArrowRight")
    assert opened.locator("#ratio-value").inner_text() == "50%"
    assert sum(kept_tokens(opened)) > before
    opened.locator("#colour").select_option("kept")
    for kept, ground in zip(kept_tokens(opened), styles(opened, "backgroundColor"), strict=True):
        assert kept or ground == "rgba(0, 0, 0, 0)"
    opened.context.close()


def styles(opened: Any, name: str) -> list[str]:
    return opened.locator("#view .token").evaluate_all("(all, name) => all.map(s => getComputedStyle(s)[name])", name)


def test_pointing_at_a_token_shows_its_numbers(report: Path, tokens: Path, chromium: Any) -> None:
    opened, _ = open_page(chromium, report, viewport={"width": 1200, "height": 900})
    answers = list(read_answers(tokens))
    for place, token in ((2, 4), (2, 5), (3, 29)):
        choose(opened, place)
        opened.locator("#view .token").nth(token).hover()
        answer = answers[place]
        terms, values = opened.locator("#info dt").all_inner_texts(), opened.locator("#info dd").all_inner_texts()
        said = dict(zip(terms, values, strict=True))
        assert said["token"] == f'"{answer.pieces[token]}" (id {answer.token_ids[token]})'
        assert said["entropy"] == f"{answer.entropy[token]:.4f} nats"
        log_prob = float(answer.log_prob[token])
        assert float(said["probability"].split("%")[0]) == pytest.approx(100 * np.exp(log_prob), rel=6e-4)
        assert said["probability"].endswith(f"(log-prob −{-log_prob:.4f})")
        rank = "not computed" if answer.rank is None else f"{answer.rank[token]}"
        assert said["rank"].split(" (")[0] == rank
        assert said["position"] == f"{token + 1} of {len(answer.pieces)}"
        assert said["top 20%"] == ("kept" if kept_tokens(opened)[token] else "dropped")
        assert said["when written"] == "not known"
    box, window = opened.locator("#info").bounding_box(), opened.viewport_size
    assert 0 <= box["x"] <= window["width"] - box["width"]
    assert 0 <= box["y"] <= window["height"] - box["height"]
    # with the keys; and away again
    opened.locator("#view").focus()
    opened.keyboard.press("ArrowLeft")
    assert "29 of 30" in opened.locator("#info").inner_text()
    opened.keyboard.press("Escape")
    assert opened.locator("#info").is_hidden()
    opened.context.close()


def test_a_dump_of_a_training_run_is_pooled_by_step(report: Path, dump: Path, chromium: Any) -> None:
    opened, _ = open_page(chromium, report)
    opened.locator("#folder").select_option("1")
    expect(opened.locator("#list li")).to_have_count(12)
    opened.locator("#step").select_option("6")
    expect(opened.locator("#list li")).to_have_count(3)
    answers = [answer for answer in read_answers(dump) if answer.step == 6]
    entropy = torch.from_numpy(np.concatenate([answer.entropy for answer in answers]))
    selection = select_tokens(entropy, torch.ones_like(entropy), torch.tensor([20] * 3), Selector(0.2))
    choose(opened, 1)
    assert kept_tokens(opened) == selection.kept[20:40].tolist()
    said = opened.locator("#counts").inner_text()
    assert f"step 6: {kept_count(60, 0.2)} of 60 tokens" in said
    assert "selected when written: 10 (50.0%)" in said
    opened.locator("#colour").select_option("trained")
    shown = opened.locator("#view .token").evaluate_all("all => all.map(s => s.classList.contains('shown'))")
    assert shown == [True, False] * 10
    opened.locator("#next").click()
    expect(opened.locator("#list button").nth(2)).to_have_attribute("aria-current", "true")
    assert opened.locator("#next").is_disabled()
    opened.locator("#sort").select_option("score")
    expect(opened.locator("#list button").first).to_contain_text("score 2")
    # what moved, and the curves
    assert re.search(r"␣moved\s+60\s+60\s+0.0%\s+100.0%", opened.locator("#steps-tokens").inner_text())
    row = opened.locator("#curves tr", has_text="response length").inner_text()
    assert re.search(r"8 → 115 \(step 8\)\s+2 → 9 \(step 8\)", row)
    assert opened.locator("#curves img").count() == len(curves.METRICS) + 1
    opened.context.close()


def test_what_the_analyses_found_is_there(report: Path, tokens: Path, chromium: Any) -> None:
    opened, _ = open_page(chromium, report)
    titles = ["Tokens", "Entropy: model <b>$x$", "Entropy: tokens", "Forks over training: tokens", "Checkpoints"]
    assert opened.locator("h2").all_inner_texts() == [*titles, "Training curves"]
    entropy = np.concatenate([answer.entropy for answer in read_answers(tokens)])
    table = opened.locator("section:has(h2:text('Entropy: model')) table").first.inner_text()
    assert re.search(rf"tokens\s+{entropy.size}\s", table)
    assert re.search(rf"mean entropy\s+{entropy.mean():.4f}", table)
    assert re.search(r"tokens below 0.01 nats\s+[\d.]+%\s+50.64%", table)
    assert opened.locator("section:has(h2:text('Entropy: tokens')) figure").count() == 5
    assert opened.locator("#checkpoints figure").count() == 3
    assert re.search(
        rf"later\s+{entropy.mean() - 0.5 * (entropy >= 2).mean():.4f}", opened.locator("#checkpoints").inner_text()
    )
    for link in opened.locator("nav a").all():
        assert opened.locator(link.get_attribute("href")).count() == 1
    opened.context.close()


def test_a_phone_in_the_dark(report: Path, chromium: Any) -> None:
    phone = {"viewport": {"width": 360, "height": 700}, "color_scheme": "dark", "has_touch": True, "is_mobile": True}
    opened, heard = open_page(chromium, report, **phone)
    opened.locator("summary").tap()
    for folder in ("0", "1"):
        opened.locator("#folder").select_option(folder)
        opened.wait_for_timeout(100)
        assert opened.evaluate("document.documentElement.scrollWidth") == 360
    opened.locator("#view .token").nth(3).tap()
    box = opened.locator("#info").bounding_box()
    assert box["x"] == 0
    assert box["y"] + box["height"] == pytest.approx(700, abs=1)
    assert "entropy" in opened.locator("#info").inner_text()

    light = opened.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is False
    assert not light
    for selector in ("body", "#view", "#counts", "td", "#info dd", "select"):
        ink, ground = (brightness(opened, selector, name) for name in ("color", "backgroundColor"))
        assert ink > 0.55, selector
        assert ground < 0.3, selector
    # a curve of one style has a picture for either; a figure of the analyses serves both
    curve = opened.locator("#curves img").first
    curve.scroll_into_view_if_needed()
    dark = curve.evaluate("image => image.currentSrc")
    opened.emulate_media(color_scheme="light")
    assert brightness(opened, "body", "color") < 0.3 < 0.9 < brightness(opened, "body", "backgroundColor")
    opened.wait_for_timeout(100)
    assert curve.evaluate("image => image.currentSrc") not in ("", dark)
    assert heard.console == []
    opened.context.close()


def brightness(opened: Any, selector: str, name: str) -> float:
    """Of an element's ink or of the first ground behind it, 0 to 1."""
    script = """([selector, name]) => {
        let one = document.querySelector(selector);
        const value = () => getComputedStyle(one)[name];
        while (name === "backgroundColor" && value() === "rgba(0, 0, 0, 0)") one = one.parentElement;
        return value();
    }"""
    red, green, blue = map(float, re.findall(r"[\d.]+", opened.evaluate(script, [selector, name]))[:3])
    return (0.3 * red + 0.59 * green + 0.11 * blue) / 255


def test_the_page_may_load_nothing_and_run_nothing_else(report: Path, chromium: Any) -> None:
    """The policy itself: what would be injected is stopped by the browser, not by our escaping alone."""
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href|srcset)=["']?(?:https?:)?//""", text)
    assert text.count("<script") == 2
    opened, heard = open_page(chromium, report)
    opened.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked = 6'}))"
    )
    opened.evaluate("fetch('https://example.org').catch(() => {})")
    assert opened.evaluate("window.hacked") is None
    assert any("script-src" in line for line in heard.console)
    assert any("connect-src" in line for line in heard.console)
    assert not any("example.org" in url for url in heard.requests)
    opened.context.close()


def test_figures_are_written_as_files(report: Path) -> None:
    files = sorted(file.name for file in (report.parent / "figures").iterdir())
    assert "curve-actor-entropy.svg" in files
    assert "steps-percentiles-tokens.png" in files
    assert {file.rsplit(".")[0] for file in files if file.endswith(".svg")} == {
        file.rsplit(".")[0] for file in files if file.endswith(".png")
    }
    assert (report.parent / "figures" / "curve-actor-entropy.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (report.parent / "figures" / "curve-actor-entropy.svg").read_bytes()


def test_what_is_packed_can_be_read_again(report: Path, tokens: Path) -> None:
    block = re.search(r'id="data">(.*?)</script>', report.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    data = json.loads(block[1])
    assert len(data["answers"]) == 6 + 12
    for packed, answer in zip(data["answers"], read_answers(tokens), strict=False):
        raw, count = zlib.decompress(base64.b64decode(packed["data"])), len(answer.pieces)
        folder = data["folders"][data["pools"][packed["pool"]]["folder"]]
        assert [data["scores"][number]["name"] for number in folder["scores"]] == SCORES_OF_ANALYSIS
        assert len(raw) == (4 * 4 + 1 + len(SCORES_OF_ANALYSIS)) * count
        number, entropy, surprise, _ = np.frombuffer(raw[: 16 * count], dtype="<u4").reshape(4, count)
        assert [data["vocabulary"]["pieces"][place] for place in number] == list(answer.pieces)
        np.testing.assert_allclose(entropy * data["unit"], answer.entropy, atol=5.1e-5)
        np.testing.assert_allclose(surprise * -data["unit"], answer.log_prob, atol=5.1e-5)


def test_every_stop_of_the_slider_keeps_exactly_its_share() -> None:
    answers = [make_answer(number, ["a"] * (17 + number), number) for number in range(5)]
    tokens = tokens_shown(answers)
    values = [scored.numpy() for _, scored in each_score(tokens, [])]
    ((pool, members, firsts),) = pools_of(answers, values)
    first = np.concatenate(firsts, axis=1)
    assert members == [0, 1, 2, 3, 4]
    num_tokens = sum(17 + number for number in range(5))
    assert first.shape == (len(SCORES_OF_ANALYSIS), num_tokens)
    assert pool.num_kept == [kept_count(num_tokens, ratio) for ratio in RATIOS]
    for place, ratio in enumerate(RATIOS):
        assert ((first <= place).sum(axis=1) == kept_count(num_tokens, ratio)).all()


def test_answers_are_taken_evenly_and_one_that_is_broken_is_named(tokens: Path, tmp_path: Path) -> None:
    assert [answer.answer for answer in chosen_answers(tokens, 3)] == [0, 2, 5]
    assert [answer.answer for answer in chosen_answers(tokens, 100)] == [0, 1, 2, 3, 4, 5]
    write_manifest(tmp_path / "broken", {"source": "model"})
    with pytest.raises(EntropyForkError, match="has no answers yet"):
        chosen_answers(tmp_path / "broken", 3)
    answer = make_answer(7, ["a", "b"], 0)
    answer.entropy[1] = np.nan
    write_part(tmp_path / "broken", 0, [answer])
    with pytest.raises(EntropyForkError, match=r"answers 7 cannot be shown: .*not finite"):
        page.write(page.ReportSettings(tmp_path / "out.html", tokens=[tmp_path / "broken"]))
    assert not list(tmp_path.glob("*out.html*"))


def test_a_resumed_run_counts_each_step_once_the_last_time(runs: list[Path]) -> None:
    run = curves.read_run(runs[0])
    assert run["actor/entropy"].steps.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    number = list(curves.METRICS).index("actor/entropy")
    assert run["actor/entropy"].values.tolist() == [number + s + (100 if s > 3 else 0) for s in range(1, 9)]
    assert run["val-core/math/acc/mean@8"].steps.tolist() == [4, 8]
    assert curves.tags({"a": run})[0] == "val-core/math/acc/mean@8"
    assert not curves.title("val-core/math/acc/best@8/mean")


def test_whether_a_mask_changes_the_update_can_be_seen_in_the_curves_of_two_runs(tmp_path: Path) -> None:
    """docs/guide/is_it_working.md sends readers to these figures; a run without a mask has all but the clip's."""
    from torch.utils.tensorboard import SummaryWriter

    shared = ["actor/grad_norm", "actor/entropy", "response_length/mean"]
    found = {}
    for name, metrics in (("masked", [*shared, "entropy_fork/pg_clipfrac"]), ("baseline", shared)):
        with SummaryWriter(str(tmp_path / name)) as writer:
            for metric in metrics:
                writer.add_scalar(metric, 1.0, 1)
        found[name] = curves.read_run(tmp_path / name)
    assert set(curves.tags(found)) == {*shared, "entropy_fork/pg_clipfrac"}
    assert set(curves.tags({"baseline": found["baseline"]})) == set(shared)


def test_a_folder_without_steps_has_no_section_of_them(tokens: Path, dump: Path) -> None:
    assert steps.read_steps(tokens) is None
    found = steps.read_steps(dump)
    assert found is not None
    assert found.steps.tolist() == [2, 4, 6, 8]
    assert [row[0] for row in found.moved] == [" moved"]
    entropy = np.concatenate([answer.entropy for answer in read_answers(dump) if answer.step == 8])
    np.testing.assert_allclose(found.percentiles[3], np.percentile(entropy, steps.PERCENTILES))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "nothing to report: write --tokens FOLDER"),
        (["--tokens", "nowhere"], "no folder nowhere: name a folder that 'entropy-fork analyze'"),
        (["--run", "nowhere"], "--run: there is no folder nowhere"),
        (["--run", "x=EMPTY"], "must have the tensorboard files of one run, and has no such files"),
        (["--run", "RUNS"], "has the files of 2 runs"),
    ],
)
def test_bad_input_is_one_clear_sentence(
    arguments: list[str], match: str, tmp_path: Path, runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "RUNS").mkdir()
    for place, run in enumerate(runs):
        (tmp_path / "RUNS" / str(place)).mkdir()
        (tmp_path / "RUNS" / str(place) / "events.out.tfevents.1").write_bytes(next(run.iterdir()).read_bytes())
    result = CliRunner().invoke(app, ["report", "out.html", *arguments])
    assert result.exit_code == 1
    assert match in result.output
    assert not (tmp_path / "out.html").exists()


def test_names_that_are_the_same_are_told_apart() -> None:
    assert page._distinct(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]
    assert curves.parse_run("mine=/tmp/x") == ("mine", Path("/tmp/x"))
    assert curves.parse_run("/tmp/a=b") == ("a=b", Path("/tmp/a=b"))


def test_right_and_wrong_answers_have_a_sign_and_a_colour(report: Path, chromium: Any) -> None:
    opened, _ = open_page(chromium, report)
    buttons = opened.locator("#list button")
    for place, score in enumerate([0, 1, 2]):
        mark = buttons.nth(place).locator("span")
        assert mark.inner_text() == f"{'✓' if score else '✗'} score {score}"
        choose(opened, place)
        assert opened.locator("#answer-title span").inner_text() == mark.inner_text()
    colours = buttons.locator("span").evaluate_all("all => all.map(one => getComputedStyle(one).color)")
    assert colours[0] == colours[3] != colours[1] == colours[2]
    assert "✓ score above 0" in opened.locator("#signs").inner_text()
    opened.context.close()


def test_a_search_without_hits_says_so_and_shows_no_answer(report: Path, chromium: Any) -> None:
    opened, heard = open_page(chromium, report)
    choose(opened, 2)
    opened.locator("#search").fill("\u202enowhere <b>")
    expect(opened.locator("#found")).to_have_text("no hits: no prompt and no answer here has “‹U+202E›nowhere <b>”")
    assert opened.locator("#list").is_hidden()
    assert opened.locator("#reader").is_hidden()
    assert shown_tokens(opened) == []
    assert opened.locator("#answer-title").text_content() == ""
    opened.locator("#ratio").evaluate("one => one.dispatchEvent(new Event('input'))")
    opened.locator("#search").fill("question 2")
    expect(opened.locator("#list li")).to_have_count(1)
    expect(opened.locator("#answer-title")).to_contain_text("#3")
    assert shown_tokens(opened)
    assert heard.console == []
    opened.context.close()


def test_paper_gets_whole_tables_and_answers_and_no_controls(report: Path, chromium: Any) -> None:
    opened, _ = open_page(chromium, report, viewport={"width": 700, "height": 900}, color_scheme="dark")
    choose(opened, 0)
    hidden = "one => [...document.querySelectorAll(one)].filter(box => box.scrollHeight > box.clientHeight + 1 || box.scrollWidth > box.clientWidth + 1).length"  # noqa: E501
    assert opened.evaluate(hidden, ".table") > 0
    assert opened.evaluate(hidden, "#view") == 1
    opened.emulate_media(media="print")
    for box in (".table", "#view"):
        assert opened.evaluate(hidden, box) == 0, box
    for control in ("nav", "#picker", "#list", "#ratio", "#colour", "#next"):
        assert opened.locator(control).is_hidden(), control
    assert opened.locator("#counts").is_visible()
    assert brightness(opened, "body", "color") < 0.3 < 0.9 < brightness(opened, "body", "backgroundColor")
    assert opened.locator("thead th").first.evaluate("one => getComputedStyle(one).position") == "static"
    opened.context.close()


def test_tables_of_few_tokens_do_not_overlap(report: Path, chromium: Any) -> None:
    opened, _ = open_page(chromium, report)
    first = opened.locator("section:has(h2:text('Entropy: model')) table")
    highest, lowest = (
        first.filter(has_text=f"{end} mean entropy, of the").locator("tbody td:first-child").all_inner_texts()
        for end in ("highest", "lowest")
    )
    assert len(highest) >= len(lowest) > 10
    assert not set(highest) & set(lowest)
    opened.context.close()


def drawn(tag: str, values: list[float], first_step: int = 1) -> Any:
    """The plot of one metric of one run."""
    run = {tag: curves.Curve(np.arange(first_step, first_step + len(values)), np.array(values))}
    return curves._draw({"run": run}, tag).axes[0]


@pytest.mark.parametrize(
    ("tag", "values", "least", "most"),
    [
        ("entropy_fork/kept_ratio", [0.2, 0.2004, 0.2001], 0.1, 0.12),
        ("entropy_fork/kept_ratio", [0.1, 0.9], 0.8, 1),
        ("entropy_fork/kept_ratio", [1.0, 1.0], 0.1, 0.12),
        ("entropy_fork/kept_ratio", [0.001, 0.001], 0.1, 0.12),
        ("val-core/math/acc/mean@8", [0.5, 0.51], 0.1, 0.12),
        ("response_length/mean", [2000, 2001], 200, 240),
        ("actor/entropy", [0.0301, 0.0302], 0.003, 0.004),
        ("critic/score/mean", [-1, 1], 2, 2.4),
    ],
)
def test_an_axis_does_not_zoom_into_noise(tag: str, values: list[float], least: float, most: float) -> None:
    low, high = drawn(tag, values).get_ylim()
    assert low < min(values)
    assert max(values) < high
    assert least <= high - low <= most
    if tag.endswith("ratio"):
        assert low > -0.06
        assert high < 1.06


def test_a_step_axis_has_whole_steps_only() -> None:
    for first, count in ((1, 1), (1, 2), (1, 5), (10, 3), (1, 30), (0, 1000)):
        plot = drawn("actor/entropy", [float(place) for place in range(count)], first)
        found = steps.Steps(np.arange(first, first + count), np.ones((count, 5)), np.ones(count), np.zeros(count), [])
        others = [steps._percentiles(found).axes[0], steps._sides(found).axes[0]]
        for axes in (plot, *others):
            low, high = axes.get_xlim()
            ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
            assert ticks
            assert all(tick == round(tick) for tick in ticks), ticks
