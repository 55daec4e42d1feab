"""``entropy-fork analyze`` and ``compare`` on models with known forks, and on random models with plain formulas."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.fork_model import LETTERS, fork_model, random_model, tokenizer
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from entropy_fork.analysis import analyze, results
from entropy_fork.analysis.compare import compare
from entropy_fork.analysis.measure import Measurer, TokenIds
from entropy_fork.analysis.summary import summarise
from entropy_fork.analysis.texts import Rollouts
from entropy_fork.cli import app
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.installing import install_command
from entropy_fork.evaluation.engines import SamplingSettings
from entropy_fork.evaluation.evaluate import EvaluationSettings
from entropy_fork.tokens import store
from entropy_fork.verl.sparse_head import log_probs_and_entropy

QUIET = Console(quiet=True)

#: after each of these characters the distribution is uniform over this number of successors
SUCCESSORS = {
    "=": "ab",
    "a": "c",
    "b": "c",
    "c": "abef",
    "e": "g",
    "f": "g",
    "g": "01234567",
    **dict.fromkeys("01234567", "c"),
}
FINAL = SUCCESSORS | {"g": "0123"}


def entropies_after(text: str, successors: dict[str, str]) -> list[float]:
    """The entropies of the distributions after each character of ``text``."""
    return [math.log(len(successors.get(letter, "x"))) for letter in text]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fork_model(tmp_path_factory.mktemp("models") / "base", SUCCESSORS)


@pytest.fixture(scope="module")
def final(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fork_model(tmp_path_factory.mktemp("models") / "final", FINAL)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {
            "data_source": "aime24",
            "prompt": [{"role": "user", "content": "+" * number}],
            "reward_model": {"style": "rule", "ground_truth": "1"},
        }
        for number in range(1, 23)
    ]
    file = tmp_path_factory.mktemp("data") / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


@pytest.fixture
def settings(base: Path, data: Path, tmp_path: Path) -> Callable[..., analyze.AnalysisSettings]:
    """3 answers each to 22 questions, up to 40 tokens, in parts of 8 answers."""

    def make(**changes: Any) -> analyze.AnalysisSettings:
        sampling = changes.pop("sampling", SamplingSettings(max_tokens=40, seed=3))
        model = changes.get("model", base)
        drawing = EvaluationSettings(model, [data], tmp_path, 3, sampling, "transformers", batch_size=16)
        if "rollouts" in changes or "like" in changes:
            drawing = None
        return analyze.AnalysisSettings(**{"model": base, "output": tmp_path / "out", "prompts": drawing, **changes})

    return make


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: for tensors this small, threads that wait for each other take many times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyze, "PART_ANSWERS", 8)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---- a known answer


def test_the_forks_of_a_model_by_construction_are_found(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LINES", "50")
    folder = tmp_path / "out"
    arguments = ["analyze", str(base), "--prompts", str(data), "--output", str(folder), "--answers", "3"]
    arguments += ["--max-tokens", "40", "--engine", "transformers", "--min-count", "20", "--temperature", "0.7"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output

    answers = list(store.read_answers(folder))
    assert len(answers) == 22 * 3
    is_fork = []
    for answer in answers:
        before = ("=" + "".join(answer.pieces))[:-1]
        expected = entropies_after(before, SUCCESSORS)
        np.testing.assert_allclose(answer.entropy, expected, atol=1e-5)
        np.testing.assert_allclose(answer.log_prob, -np.array(expected), atol=1e-5)
        assert answer.rank is not None
        assert not answer.rank.any(), "all that can follow are equally likely"
        assert answer.text == "".join(answer.pieces)
        is_fork.append(np.array(expected) > 0)
    forks, tokens = int(np.concatenate(is_fork).sum()), sum(map(len, is_fork))
    assert 0.2 < forks / tokens < 0.8

    # The share that is forks, and the same command with it marks these positions and no other.
    ratio = (forks - 0.5) / tokens
    result = CliRunner().invoke(app, [*arguments, "--top-ratio", repr(ratio)])
    assert result.exit_code == 0, result.output
    for answer, expected_forks in zip(store.read_answers(folder), is_fork, strict=True):
        assert answer.selected is not None
        assert answer.selected.tolist() == expected_forks.tolist()
    manifest = store.read_manifest(folder)
    assert (manifest["tokens"], manifest["selected"]) == (tokens, forks)
    assert manifest["threshold"] == pytest.approx(math.log(2), abs=1e-5)

    summary = json.loads((folder / "summary.json").read_text())
    means = {row["piece"]: row["mean_entropy"] for row in summary["highest"] + summary["lowest"]}
    digits = [mean for piece, mean in means.items() if piece.isdecimal()]
    assert digits == pytest.approx([math.log(8)] * len(digits), abs=1e-5)
    assert digits
    assert (means["c"], means["g"]) == pytest.approx((0, 0), abs=1e-5)
    # an a or b stands at the beginning (one of 2) or after a c (one of 4)
    texts = ["".join(answer.pieces) for answer in answers]
    at_start = sum(text[0] == "a" for text in texts)
    in_all = sum(text.count("a") for text in texts)
    assert means["a"] == pytest.approx((at_start * math.log(2) + (in_all - at_start) * math.log(4)) / in_all, abs=1e-5)
    assert summary["share_below"]["0.01"] == pytest.approx(1 - forks / tokens)
    assert summary["percentiles"]["99"] == pytest.approx(math.log(8), abs=1e-5)
    assert "50.64%" in result.output
    assert "│ a " in result.output
    for name in ("entropy_histogram", "entropy_by_position", "entropy_by_kind", "words_highest", "words_lowest"):
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (folder / "figures" / f"{name}.svg").read_bytes()
    assert not (folder / "drawn").exists()
    assert not (folder / "merged").exists()


def test_scores_are_compared_with_the_entropy(base: Path, data: Path, tmp_path: Path) -> None:
    """All that can follow are equally likely, so each token's surprisal is the entropy, and its quotient is 1 or 0."""
    folder = tmp_path / "out"
    arguments = ["analyze", str(base), "--prompts", str(data), "--output", str(folder), "--limit", "6", "--top-ratio"]
    arguments += ["0.1", "--max-tokens", "40", "--engine", "transformers", "--min-count", "2"]
    for name, message in (("gradient", "it reads advantage, which these"), ("no.module:here", "cannot be imported")):
        result = CliRunner().invoke(app, [*arguments, "--score", name])
        assert result.exit_code == 1
        assert f"--score {name} cannot be used: " in result.output
        assert message in result.output.replace("\n", " ")
        assert not folder.exists(), "it should be refused before anything is measured"
    own = "helpers.own_scores:confident_and_wrong"
    result = CliRunner().invoke(app, [*arguments, "--score", own])
    assert result.exit_code == 0, result.output
    rows = {row["score"]: row for row in json.loads((folder / "summary.json").read_text())["scores"]}
    assert list(rows) == ["entropy", "surprisal", "rsi", "position", "random", own]
    assert rows["surprisal"]["mean"] == pytest.approx(rows["entropy"]["mean"], abs=1e-5)
    assert rows["surprisal"]["rank_correlation_with_entropy"] > 0.9
    assert rows["rsi"]["percentiles"]["99"] == pytest.approx(1, abs=1e-4)
    assert rows[own]["mean"] == pytest.approx(0, abs=1e-5)
    manifest = store.read_manifest(folder)
    assert rows["entropy"]["threshold"] == manifest["threshold"]
    assert "overlap" in result.output
    assert {"scores.csv", "scores_words.csv"} <= {file.name for file in folder.iterdir()}


def test_checkpoints_on_the_same_tokens(
    base: Path,
    final: Path,
    settings: Callable[..., analyze.AnalysisSettings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the final model g has four successors instead of eight. The answers are the final model's, as in the paper."""
    analyze.analyze(settings(model=final, output=tmp_path / "late"), QUIET)
    analyze.analyze(settings(like=tmp_path / "late", output=tmp_path / "early"), QUIET)
    late, early = (list(store.read_answers(tmp_path / name)) for name in ("late", "early"))
    for one, other in zip(late, early, strict=True):
        assert (one.pieces, one.answer, one.score) == (other.pieces, other.answer, other.score)
        before = ("=" + "".join(one.pieces))[:-1]
        np.testing.assert_allclose(one.entropy, entropies_after(before, FINAL), atol=1e-5)
        np.testing.assert_allclose(other.entropy, entropies_after(before, SUCCESSORS), atol=1e-5)

    entropies = [np.concatenate([answer.entropy for answer in answers]) for answers in (early, late)]
    ratio = (int((entropies[0] > 2).sum()) - 0.5) / len(entropies[0])  # what follows g
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LINES", "50")
    folders = [str(tmp_path / name) for name in ("early", "late")]
    arguments = ["compare", *folders, "--top-ratio", repr(ratio), "--output", str(tmp_path / "both")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "both" / "comparison.json").read_text())
    first, last = found["checkpoints"]
    assert (first["overlap_base"], last["overlap_final"]) == (1, 1)
    assert first["overlap_final"] == last["overlap_base"] < 1
    highest = [row for row in found["change"] if row["tokens"]][-1]  # what equals the edge of a bin is below it
    assert highest["change"] == [0, pytest.approx(math.log(4) - math.log(8), abs=1e-5)]
    assert sum(row["tokens"] for row in found["change"]) == found["tokens"] == len(entropies[0])
    assert first["mean_entropy"] == pytest.approx(float(entropies[0].mean()))
    assert (tmp_path / "both" / "overlap.csv").read_text().startswith("name,model,mean_entropy,threshold,overlap_base")
    assert {file.name for file in (tmp_path / "both" / "figures").iterdir()} == {
        f"{name}.{kind}" for name in ("overlap", "entropy_change", "percentile_evolution") for kind in ("png", "svg")
    }
    assert "100.00%" in result.output
    assert f"written: {tmp_path / 'both' / 'comparison.json'}, *.csv, figures/" in result.output.replace("\n", "")


def test_a_comparison_is_what_its_definitions_say(tmp_path: Path) -> None:
    """On random entropies, some of them equal, in three folders that are cut into different parts."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(0, 40, 30)
    ids = [draw.integers(0, 9, length) for length in lengths]
    entropies = [[np.round(draw.gamma(1, 1, n), 1).astype(np.float32) for n in lengths] for _ in range(3)]
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, size, rows in zip(folders, (30, 7, 11), entropies, strict=True):
        store.write_manifest(folder, {"source": "model", "temperature": 1.0, "model": "m"})
        for start in range(0, 30, size):
            part = [
                store.AnswerTokens("p", "t", ids[n], ["x"] * len(ids[n]), rows[n], -rows[n], answer=n)
                for n in range(start, min(30, start + size))
            ]
            store.write_part(folder, start // size, part)
    found = compare(folders, top_ratio=0.3)

    positions = np.concatenate([np.arange(n) for n in lengths])
    rows_of = np.repeat(np.arange(30), lengths)
    flat = [np.concatenate(rows) for rows in entropies]
    count = math.ceil(0.3 * len(flat[0]))
    tops = [set(np.lexsort((rows_of, positions, -values))[:count].tolist()) for values in flat]
    for place, one in enumerate(found["checkpoints"]):
        assert one["overlap_base"] == len(tops[place] & tops[0]) / count
        assert one["overlap_final"] == len(tops[place] & tops[2]) / count
        for q, value in one["percentiles"].items():
            assert value == np.quantile(flat[place], int(q) / 100, method="inverted_cdf")
    edges = [np.quantile(flat[0], q / 100, method="inverted_cdf") for q in range(5, 100, 5)]
    for low, high, row in zip([-np.inf, *edges], [*edges, np.inf], found["change"], strict=True):
        inside = (flat[0] > low) & (flat[0] <= high)
        assert row["tokens"] == inside.sum()
        for place in range(3):
            expected = pytest.approx((flat[place] - flat[0])[inside].mean(), abs=1e-6) if inside.any() else None
            assert row["change"][place] == expected


# ---- entropies against other ways to compute them


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
def test_entropies_are_those_of_a_plain_softmax_and_of_the_training_step(tmp_path: Path, temperature: float) -> None:
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    folder = random_model(tmp_path / "model")
    draw = np.random.default_rng(1)
    texts = [
        TokenIds(*(draw.integers(0, len(LETTERS), n).astype(np.int32) for n in lengths))
        for lengths in ((3, 9), (1, 40), (30, 1), (7, 0), (2, 17))
    ]
    found = Measurer(folder, temperature=temperature, batch_tokens=90).measure(texts)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for text, measured in zip(texts, found, strict=True):
        if not len(text.response):
            assert len(measured.entropy) == len(measured.log_prob) == len(measured.rank) == 0
            continue
        ids = torch.from_numpy(np.concatenate([text.prompt, text.response]).astype(np.int64))
        before = slice(len(text.prompt) - 1, len(ids) - 1)
        with torch.no_grad():
            output = model(input_ids=ids[None], output_hidden_states=True)
        logits = output.logits[0, before] / temperature
        labels = ids[len(text.prompt) :]
        plain = torch.softmax(logits.double(), -1)
        np.testing.assert_allclose(measured.entropy, -(plain * plain.log()).sum(-1), atol=2e-5)
        np.testing.assert_allclose(measured.entropy, entropy_from_logits(logits), atol=2e-5)
        np.testing.assert_allclose(measured.log_prob, logprobs_from_logits(logits, labels), atol=2e-5)
        theirs, entropy = log_probs_and_entropy(
            output.hidden_states[-1][0, before], model.lm_head.weight, labels, temperature
        )
        np.testing.assert_allclose(measured.entropy, entropy, atol=2e-5)
        np.testing.assert_allclose(measured.log_prob, theirs, atol=2e-5)
        rank = [int((row > row[label]).sum()) for row, label in zip(logits, labels, strict=True)]
        assert measured.rank.tolist() == rank


def test_what_a_model_cannot_read_or_say_is_one_clear_error(tmp_path: Path) -> None:
    measurer = Measurer(random_model(tmp_path / "model"))
    for prompt, response, message in (
        ([], [1], "empty prompt"),
        ([1], [1] * 128, "129 tokens with its prompt, and the model 128 positions"),
        ([1], [len(LETTERS)], f"the token id {len(LETTERS)}, and the model knows {len(LETTERS)}"),
    ):
        with pytest.raises(EntropyForkError, match=message):
            measurer.measure([TokenIds(np.array(prompt, np.int32), np.array(response, np.int32))])

    from transformers import Gemma2Config, Gemma2ForCausalLM

    capped = Gemma2Config(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=32, final_logit_softcapping=2.0,
    )  # fmt: skip
    Gemma2ForCausalLM(capped).save_pretrained(tmp_path / "capped")
    with pytest.raises(EntropyForkError, match="changes its logits after the LM head"):
        Measurer(tmp_path / "capped")


# ---- stopping and going on


def test_a_stopped_analysis_goes_on_and_gives_the_same_files(
    settings: Callable[..., analyze.AnalysisSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings()
    analyze.analyze(asked, QUIET)
    expected = contents(tmp_path / "out")
    assert len(store.parts(tmp_path / "out")) == 9

    def stops(after: int, function: Callable[..., Any]) -> Callable[..., Any]:
        calls = iter(range(after))

        def stopping(*arguments: Any, **named: Any) -> Any:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return function(*arguments, **named)

        return stopping

    from entropy_fork.analysis import draw_answers, mark_top
    from entropy_fork.evaluation.answer_store import AnswerStore

    again = replace(asked, output=tmp_path / "again")
    for module, name, after in (
        (AnswerStore, "append", 3),  # while answers are drawn
        (draw_answers, "compute_score", 20),  # while a part is made
        (analyze.store, "write_part", 2),
        (analyze.store, "write_part", 1),
        (mark_top, "write_selected", 4),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stops(after, getattr(module, name)))
            with pytest.raises(KeyboardInterrupt):
                analyze.analyze(again, QUIET)
        with pytest.raises(EntropyForkError, match="is not finished: repeat"):
            summarise(again.output)
    (again.output / "tokens" / ".part-00003.parquet.1234").write_text("a process that was killed")
    analyze.analyze(again, QUIET)
    (again.output / "tokens" / ".part-00003.parquet.1234").unlink()
    assert contents(again.output) == expected

    # A part that is lost is made again, and nothing else is.
    measured: list[int] = []
    monkeypatch.setattr(
        Measurer, "measure", lambda self, texts, real=Measurer.measure: measured.append(len(texts)) or real(self, texts)
    )
    (again.output / "answers" / "part-00008.parquet").unlink()
    analyze.analyze(again, QUIET)
    assert measured == [2]
    assert contents(again.output) == expected
    analyze.analyze(again, QUIET)
    assert measured == [2], "what is finished is not measured again"


def test_texts_are_read_as_they_are_measured(
    settings: Callable[..., analyze.AnalysisSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one part is in memory: no text of the next part is made before this part is written."""
    made: list[int] = []
    real = Rollouts.texts

    def counted(self: Rollouts, *arguments: Any) -> Iterator[Any]:
        for text in real(self, *arguments):
            made.append(text.answer)
            yield text

    written: list[tuple[int, int]] = []
    real_write = store.write_part

    def write(folder: Path, number: int, answers: Any) -> None:
        written.append((len(answers), len(made)))
        real_write(folder, number, answers)

    monkeypatch.setattr(Rollouts, "texts", counted)
    monkeypatch.setattr(analyze.store, "write_part", write)
    dump = dumped(tmp_path / "dump", {1: [("1=", "ac")] * 20})
    analyze.analyze(settings(rollouts=dump), QUIET)
    assert written == [(8, 8), (8, 16), (4, 20)]


@pytest.mark.process
def test_what_vllms_process_refuses_is_said_here(
    settings: Callable[..., analyze.AnalysisSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM is not needed: the model is checked first, and then the import of vLLM fails."""
    from entropy_fork.analysis import draw_answers

    monkeypatch.setattr(draw_answers, "choose_engine", lambda _: "vllm")
    monkeypatch.setitem(os.environ, "PYTHONWARNINGS", "ignore")
    with pytest.raises(EntropyForkError, match=r"^the longest prompt has 23 tokens .* write --max-tokens 105 or less$"):
        analyze.analyze(settings(sampling=SamplingSettings(max_tokens=400)), QUIET)
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(EntropyForkError, match=r"vLLM's process ended with exit status 1\. Its output is above"):
            analyze.analyze(settings(), QUIET)


def test_nothing_is_mixed(settings: Callable[..., analyze.AnalysisSettings], final: Path, tmp_path: Path) -> None:
    with pytest.raises(EntropyForkError, match="the model has 128 positions: write --max-tokens"):
        analyze.analyze(settings(sampling=SamplingSettings(max_tokens=400)), QUIET)
    asked = settings()
    analyze.analyze(asked, QUIET)  # a mistake before the first answer can be corrected
    before = contents(tmp_path / "out")
    for changes, message in (
        ({"model": final}, r"\n  texts.model: '.*' there, '.*' now"),
        ({"sampling": SamplingSettings(max_tokens=41, seed=3)}, r"texts.sampling.max_tokens: 40 there, 41 now\nRepeat"),
        ({"batch_tokens": 100}, "measured.batch_tokens: 32768 there, 100 now"),
        ({"rollouts": dumped(tmp_path / "dump", {1: [("1=", "a")]})}, "texts.rollouts: None there"),
    ):
        with pytest.raises(EntropyForkError, match=message):
            analyze.analyze(settings(**changes), QUIET)
    with pytest.raises(EntropyForkError, match="are the same folder"):
        analyze.analyze(settings(like=tmp_path / "out"), QUIET)
    assert contents(tmp_path / "out") == before

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(EntropyForkError, match="has files of something else"):
        analyze.analyze(replace(asked, output=tmp_path / "other"), QUIET)
    with pytest.raises(EntropyForkError, match="is a file"):
        analyze.analyze(replace(asked, output=tmp_path / "other" / "thesis.txt"), QUIET)
    store.write_manifest(tmp_path / "run", {"source": "training"})
    with pytest.raises(EntropyForkError, match="holds the tokens of a training run"):
        analyze.analyze(replace(asked, output=tmp_path / "run"), QUIET)


def test_bad_settings_are_one_clear_error(
    settings: Callable[..., analyze.AnalysisSettings], base: Path, tmp_path: Path
) -> None:
    for changes, message in (
        ({"prompts": None}, "with one of --prompts, --rollouts and --like, not with none of them"),
        ({"prompts": settings().prompts, "like": base}, "not with --prompts and --like"),
        ({"steps": (1,)}, "--steps chooses steps of --rollouts"),
        ({"like": base, "temperature": 0.0}, "temperature is 0.0, and must be above 0"),
        ({"top_ratio": 0.0}, r"top_ratio must be in \(0, 1\]"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"limit": 0}, "limit is 0, and must be at least 1"),
    ):
        with pytest.raises(EntropyForkError, match=message):
            settings(**changes)
    result = CliRunner().invoke(app, ["analyze", str(base), "--output", str(tmp_path / "o"), "--like", str(base)])
    assert result.exit_code == 1
    assert "has no tokens (no manifest.json)" in result.output
    assert not (tmp_path / "o").exists()


# ---- rollouts


def dumped(folder: Path, steps: dict[int, list[tuple[str, str]]]) -> Path:
    """Files in the form of verl's own writer."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    for step, rows in steps.items():
        inputs, outputs = zip(*rows, strict=True)
        scores, truths = [float(n) for n in range(len(rows))], [None, *["7"] * (len(rows) - 1)]
        keys = {"uid": [f"k_{n}_0" for n in range(len(rows))]}
        PPOTrainer._write_generations(inputs, outputs, truths, scores, keys, str(folder), step)
    return folder


def test_the_dumps_of_a_run_are_measured_by_step(
    settings: Callable[..., analyze.AnalysisSettings], tmp_path: Path
) -> None:
    rows = {2: [("1=", "acac\u2028" + "<"), ("=", ""), ("2=", "bce")], 10: [("1=", "ac"), ("3=", "bcf")]}
    dump = dumped(tmp_path / "dump", rows)
    analyze.analyze(settings(rollouts=dump), QUIET)
    found = list(store.read_answers(tmp_path / "out"))
    assert [(one.step, one.prompt, one.text) for one in found] == [(s, *row) for s in (2, 10) for row in rows[s]]
    assert [one.score for one in found] == [0, 1, 2, 0, 1]
    assert [one.ground_truth for one in found] == [None, "7", "7", None, "7"]
    np.testing.assert_allclose(found[4].entropy, entropies_after("=bc", SUCCESSORS), atol=1e-5)
    assert len(found[1].token_ids) == 0
    summary = summarise(tmp_path / "out")
    assert [(row["step"], row["tokens"]) for row in summary["steps"]] == [(2, 9), (10, 5)]

    analyze.analyze(settings(rollouts=dump, steps=(10,), limit=1, output=tmp_path / "one"), QUIET)
    assert [one.text for one in store.read_answers(tmp_path / "one")] == ["ac"]
    analyze.analyze(settings(like=tmp_path / "out", limit=3, output=tmp_path / "three"), QUIET)
    assert [one.step for one in store.read_answers(tmp_path / "three")] == [2, 2, 2]


def test_files_that_are_no_dumps_are_named(settings: Callable[..., analyze.AnalysisSettings], tmp_path: Path) -> None:
    dump = dumped(tmp_path / "dump", {1: [("1=", "a")]})
    with pytest.raises(EntropyForkError, match=r"has no answers of step 4, 7: name steps"):
        analyze.analyze(settings(rollouts=dump, steps=(7, 1, 4)), QUIET)
    file = dump / "1.jsonl"
    for line, message in (
        ('{"input": "a"', r"line 2 of .*1\.jsonl is not JSON .*Is a run still writing it"),
        ('{"input": "a"}', r"line 2 of .*: output is None"),
        ("[]", "not from a dump of verl's answers"),
        ('{"input": "a", "output": "b", "score": "high"}', "score is 'high'"),
    ):
        file.write_text(file.read_text().splitlines()[0] + "\n" + line)
        with pytest.raises(EntropyForkError, match=message):
            analyze.analyze(settings(rollouts=dump), QUIET)
    file.write_text("")
    with pytest.raises(EntropyForkError, match="its files are empty"):
        analyze.analyze(settings(rollouts=dump), QUIET)
    file.unlink()
    for path, message in ((dump, "has no \\*.jsonl"), (tmp_path / "none", "no folder .*none")):
        with pytest.raises(EntropyForkError, match=message):
            analyze.analyze(settings(rollouts=path), QUIET)
    assert not (tmp_path / "out").exists()


# ---- comparisons that are refused


def test_folders_that_do_not_compare_are_named(
    settings: Callable[..., analyze.AnalysisSettings], base: Path, tmp_path: Path
) -> None:
    dump = dumped(tmp_path / "dump", {1: [("1=", "acac"), ("1=", "bc")]})
    one = run_to(settings(rollouts=dump, output=tmp_path / "one"))
    other = run_to(settings(rollouts=dump, limit=1, output=tmp_path / "other"))
    hot = run_to(settings(rollouts=dump, temperature=2.0, output=tmp_path / "hot"))
    for folders, message in (
        ([one], "needs two folders or more"),
        ([one, other], "does not hold the same prompts and token ids as .*--like"),
        ([one, hot], "was measured at T = 2.0 and .*one at 1.0"),
        ([one, tmp_path], "has no tokens"),
    ):
        with pytest.raises(EntropyForkError, match=message):
            compare(folders)
    like = run_to(settings(like=hot, output=tmp_path / "like"))
    assert store.read_manifest(like)["temperature"] == 2.0
    assert compare([hot, like])["checkpoints"][1]["overlap_base"] == 1

    foreign = tmp_path / "foreign"
    shutil.copytree(base, foreign)
    names = tokenizer()
    backend = json.loads(names.backend_tokenizer.to_str())
    backend["model"]["vocab"] |= {"a": backend["model"]["vocab"]["b"], "b": backend["model"]["vocab"]["a"]}
    (foreign / "tokenizer.json").write_text(json.dumps(backend))
    with pytest.raises(EntropyForkError, match="not those of this model's tokenizer"):
        analyze.analyze(settings(model=foreign, like=one, output=tmp_path / "new"), QUIET)


def run_to(settings: analyze.AnalysisSettings) -> Path:
    analyze.analyze(settings, QUIET)
    return settings.output


def test_a_missing_extra_is_named_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(results, "find_spec", lambda name: None if name == "wordcloud" else object())
    result = CliRunner().invoke(app, ["analyze", str(tmp_path), "--output", str(tmp_path / "o")])
    assert result.exit_code == 1
    assert f"wordcloud is not installed. Install the extra: {install_command('analysis')}" in result.output
