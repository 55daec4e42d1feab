"""What an analysis says about the scores of a folder, compared with restatements in plain Python."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import own_scores
from helpers.scored_answers import answers_of_analysis, answers_of_run, restated
from rich.console import Console

from entropy_fork.analysis import results
from entropy_fork.analysis.order_statistics import PERCENTILES
from entropy_fork.analysis.summary import summarise
from entropy_fork.analysis.token_scores import ALWAYS, TOP, UNITS, named_scores, unit_of
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.core.randomness import drawn, seed_of
from entropy_fork.core.scores import SCORES, score_of
from entropy_fork.core.selection import kept_count
from entropy_fork.tokens.store import AnswerTokens, write_manifest, write_part

OF_ANALYSIS = ["entropy", "surprisal", "rsi", "position", "random"]
OF_RUN = [name for name in SCORES if name != "gradient_norm"]


def written(folder: Path, answers: Sequence[AnswerTokens], source: str = "model", part_size: int = 2) -> Path:
    write_manifest(folder, {"source": source})
    for start in range(0, len(answers), part_size):
        write_part(folder, start // part_size, answers[start : start + part_size])
    return folder


def values_of(name: str, answers: Sequence[AnswerTokens]) -> list[float]:
    """The values of a score; the tokens of each step are seen together."""
    if name == "random":
        seeds = [seed_of(0, answer.step, answer.answer) for answer in answers]
        return drawn(np.array([len(answer.entropy) for answer in answers]), torch.tensor(seeds)).tolist()
    steps = list(dict.fromkeys(answer.step for answer in answers))
    return [v for step in steps for v in restated(name, [answer for answer in answers if answer.step == step])]


def top_of(values: Sequence[float], answers: Sequence[AnswerTokens], ratio: float) -> set[int]:
    """The places of the ⌈ρN⌉ highest values; of equal ones those that come first in their answers."""
    positions = [place for answer in answers for place in range(len(answer.entropy))]
    order = sorted(range(len(values)), key=lambda n: (-values[n], positions[n], n))
    return set(order[: kept_count(len(values), ratio)])


def middle_ranks(values: Sequence[float]) -> list[float]:
    return [sum(v < w for v in values) + (sum(v == w for v in values) - 1) / 2 for w in values]


def float32(values: Sequence[float]) -> list[float]:
    return np.array(values, dtype=np.float32).tolist()


@pytest.mark.parametrize("ratio", [TOP, 0.45])
@pytest.mark.parametrize("kind", ["analysis", "run"])
def test_each_score_is_summarised_as_its_definitions_say(kind: str, ratio: float, tmp_path: Path) -> None:
    answers = answers_of_analysis(5) if kind == "analysis" else answers_of_run([3, 5])
    nothing, no_ids = np.zeros(0, np.float32), np.zeros(0, np.int32)
    answers.append(AnswerTokens("", "", no_ids, [], nothing, nothing, answer=150 if kind == "run" else 77))
    answers.sort(key=lambda answer: answer.answer)
    summary = summarise(written(tmp_path, answers, part_size=1), min_count=3, scores_top_ratio=ratio)
    assert [row["score"] for row in summary["scores"]] == (OF_ANALYSIS if kind == "analysis" else OF_RUN)
    assert summary["scores_top_ratio"] == ratio
    words = [(int(i), piece) for answer in answers for i, piece in zip(answer.token_ids, answer.pieces, strict=True)]
    of_entropy = float32(values_of("entropy", answers))
    for row in summary["scores"]:
        name = row["score"]
        values = values_of(name, answers)
        assert row["mean"] == pytest.approx(sum(values) / len(values), rel=1e-5, abs=1e-6), name
        expected = np.quantile(values, [q / 100 for q in PERCENTILES], method="inverted_cdf")
        np.testing.assert_allclose(list(row["percentiles"].values()), expected, rtol=1e-5, atol=1e-6, err_msg=name)
        ranked = [round(value, 5) for value in values]  # equal values stay equal, whatever their last bits
        top, other = top_of(ranked, answers, ratio), top_of(of_entropy, answers, ratio)
        assert row["threshold"] == pytest.approx(min(values[n] for n in top), rel=1e-5, abs=1e-6), name
        assert row["overlap_with_entropy"] == pytest.approx(len(top & other) / len(top)), name
        correlation = np.corrcoef(middle_ranks(ranked), middle_ranks(of_entropy))[0, 1]
        assert row["rank_correlation_with_entropy"] == pytest.approx(correlation, abs=1e-6), name
        of_word = defaultdict(list)
        for word, value in zip(words, values, strict=True):
            of_word[word].append(value)
        means = {word: sum(some) / len(some) for word, some in of_word.items() if len(some) >= 3}
        found = {(word["token_id"], word["piece"]): word["mean"] for word in row["words"]}
        assert found == pytest.approx(means, rel=1e-5, abs=1e-6), name
        assert list(found.values()) == sorted(found.values(), reverse=True), name
        assert row["sentence"] == SCORES[name].sentence


def test_ten_words_and_no_rare_one(tmp_path: Path) -> None:
    ids = np.repeat(np.arange(15, dtype=np.int32), 4)[:-1]
    entropy = ids.astype(np.float32)
    answer = AnswerTokens("", "", ids, [f"w{i}" for i in ids], entropy, -entropy)
    (row, *_) = summarise(written(tmp_path, [answer]), min_count=4)["scores"]
    assert [word["piece"] for word in row["words"]] == [f"w{i}" for i in range(13, 3, -1)]


def test_every_built_in_score_has_a_unit_or_says_that_it_has_none() -> None:
    assert set(UNITS) == set(SCORES)
    assert unit_of(score_of("helpers.own_scores:confident_and_wrong")) == ""


def test_what_the_tokens_do_not_allow_is_left_out_with_the_reason(tmp_path: Path) -> None:
    summary = summarise(written(tmp_path / "analysis", answers_of_analysis(3)))
    assert set(summary["scores_left_out"]) == set(SCORES) - set(OF_ANALYSIS)
    assert summary["scores_left_out"]["omega"].startswith("reads advantage, which these tokens do not have. A training")
    # a part that an older version wrote
    answers = answers_of_run([1, 2])
    answers[-1] = replace(answers[-1], rollout_log_prob=None)
    summary = summarise(written(tmp_path / "run", answers))
    assert "reads rollout_log_prob, which" in summary["scores_left_out"]["mismatch"]
    assert "covariance" in [row["score"] for row in summary["scores"]]
    # a token that the model holds for impossible, as with logits of -inf
    answers = answers_of_analysis(2)
    answers[1].log_prob[3] = -np.inf
    summary = summarise(written(tmp_path / "impossible", answers))
    assert [row["score"] for row in summary["scores"]] == ["entropy", "position", "random"]
    assert "score=surprisal: it gave inf for a token" in summary["scores_left_out"]["surprisal"]


def test_a_score_of_the_users_own(tmp_path: Path) -> None:
    answers = answers_of_analysis(4)
    own_scores.CALLS.clear()
    named = named_scores(["helpers.own_scores:confident_and_wrong", "surprisal"], ALWAYS)
    assert own_scores.CALLS, "it was not tried out before the work"
    summary = summarise(written(tmp_path, answers), 1, scores=named)
    assert [row["score"] for row in summary["scores"]] == [*OF_ANALYSIS, "helpers.own_scores:confident_and_wrong"]
    row = summary["scores"][-1]
    expected = np.concatenate([-answer.log_prob - answer.entropy for answer in answers]).mean(dtype=np.float64)
    assert row["mean"] == pytest.approx(expected)
    assert row["sentence"] == "The user's own score: The surprisal <b>beyond</b> the entropy."
    with pytest.raises(EntropyForkError, match=r"^--score cannot .* score=helpers.*long: it raised RuntimeError: too"):
        summarise(tmp_path, 1, scores=named_scores(["helpers.own_scores:fails_on_long"]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("entropi", r"^--score entropi cannot be used: score must be one of entropy, surprisal, "),
        ("helpers.own_scores:nothing", r"the module helpers.own_scores has no function nothing"),
        ("no_such_module:mine", r"the module no_such_module cannot be imported"),
        ("helpers.own_scores:no_number", r"it gave (nan|inf) for a token"),
        ("helpers.own_scores:of_advantage", r"^--score helpers.*age cannot be used: it reads advantage, which these"),
        ("gradient", r"^--score gradient cannot be used: it reads advantage, which these tokens do not have"),
    ],
)
def test_a_score_that_cannot_be_used_is_one_clear_line(name: str, message: str) -> None:
    with pytest.raises(EntropyForkError, match=message):
        named_scores([name], ALWAYS)


def test_a_users_module_is_found_in_the_folder_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scores_beside_me.py").write_text("def mine(entropy):\n    return entropy * 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert named_scores(["scores_beside_me:mine"])[0].fields == ("entropy",)


def test_files_and_tables_have_the_scores(tmp_path: Path) -> None:
    folder = written(tmp_path, answers_of_run([1]))
    summary = summarise(folder, min_count=1)
    results.write_summary(summary, folder)
    with (folder / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["score"] for row in rows] == OF_RUN
    for row, found in zip(rows, summary["scores"], strict=True):
        assert float(row["percentile_95"]) == found["percentiles"]["95"]
        assert float(row["overlap_with_entropy"]) == found["overlap_with_entropy"]
        assert row["unit"] == UNITS[row["score"]]
    with (folder / "scores_words.csv").open(newline="") as file:
        words = list(csv.DictReader(file))
    assert [row["piece"] for row in words if row["score"] == "rsi"] == [
        word["piece"] for row in summary["scores"] if row["score"] == "rsi" for word in row["words"]
    ]
    assert json.loads((folder / "summary.json").read_text())["scores"] == json.loads(json.dumps(summary["scores"]))
    (title, table), *_ = [pair for pair in results.summary_tables(summary) if pair[0].startswith("scores")]
    assert title == "scores, and how far they agree with the entropy in their top 0.2"
    assert table.rows[0][:1] + table.rows[0][5:7] == ["entropy", "100.0%", "1.00"]
    console = Console(width=160, record=True, file=(tmp_path / "printed").open("w"))
    console.print(table.rich())
    assert "covariance" in console.export_text()


def test_equal_values_have_no_rank_correlation(tmp_path: Path) -> None:
    answers = [replace(answer, advantage=np.zeros_like(answer.entropy)) for answer in answers_of_run([1])]
    rows = {row["score"]: row for row in summarise(written(tmp_path, answers), 1)["scores"]}
    assert rows["gradient"]["rank_correlation_with_entropy"] is None
    assert rows["gradient"]["mean"] == 0
    assert math.isfinite(rows["gradient"]["threshold"])
