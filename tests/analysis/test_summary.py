"""The summary of a folder of tokens, compared with literal restatements; the parts of a text; tables and figures."""

from __future__ import annotations

import csv
import json
import math
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from entropy_fork.analysis import plots, results
from entropy_fork.analysis.mark_top import find_top, select_top, top_masks
from entropy_fork.analysis.order_statistics import PERCENTILES, order_statistics, percentile_ranks
from entropy_fork.analysis.parts_of_text import KINDS, kinds_of_tokens, sections_of_tokens
from entropy_fork.analysis.summary import BELOW, summarise
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.core.rule import Selector
from entropy_fork.core.selection import select_tokens
from entropy_fork.tokens.store import AnswerTokens, read_answers, write_manifest, write_part

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
#: few different values, so that many are equal, like entropies in 16 bits
COARSE = st.sampled_from([0.0, -0.0, -1e-7, 0.25, 0.5, 1.0, 3.0])


@given(st.lists(st.lists(FLOATS | COARSE, max_size=30), min_size=1, max_size=4), st.data())
def test_order_statistics_are_those_of_a_sort(parts: list[list[float]], data: st.DataObject) -> None:
    arrays = [np.array(part, dtype=np.float32) for part in parts]
    values = np.sort(np.concatenate(arrays))
    if not len(values):
        return
    ranks = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=6))
    np.testing.assert_array_equal(order_statistics(lambda: arrays, ranks), values[ranks])
    for rank in (-1, len(values)):
        with pytest.raises(ValueError, match="ranks must be in 0"):
            order_statistics(lambda: arrays, [rank])
    for q in (0, 1, 33.3, 50, 99, 100):
        (place,) = percentile_ranks(len(values), [q])
        assert values[place] == np.quantile(values, q / 100, method="inverted_cdf")


ROWS = st.lists(st.lists(COARSE, max_size=12), min_size=1, max_size=12)


def written(folder: Path, rows: list[list[float]], part_size: int) -> None:
    write_manifest(folder, {"source": "model", "temperature": 1.0})
    for start in range(0, len(rows), part_size):
        part = [
            AnswerTokens("p", "t", np.arange(len(row)) % 5, ["x"] * len(row), np.array(row), np.array(row), answer=n)
            for n, row in enumerate(rows[start : start + part_size], start=start)
        ]
        write_part(folder, start // part_size, part)


@settings(max_examples=40)
@given(ROWS, st.sampled_from([0.05, 0.2, 0.5, 0.77, 1.0]), st.integers(1, 5))
def test_the_top_of_a_folder_is_that_of_one_pool(rows: list[list[float]], top_ratio: float, part_size: int) -> None:
    entropy = torch.tensor([value for row in rows for value in row], dtype=torch.float32)
    lengths = torch.tensor([len(row) for row in rows])
    pool = select_tokens(entropy, torch.ones_like(entropy, dtype=torch.bool), lengths, Selector(top_ratio))
    with TemporaryDirectory() as name:
        folder = Path(name)
        written(folder, rows, part_size)
        top = select_top(folder, top_ratio)
        found = np.concatenate([answer.selected for answer in read_answers(folder)])
        assert found.tolist() == pool.kept.tolist()
        assert (top.num_tokens, top.num_selected) == (pool.num_tokens, pool.num_kept)
        assert top.threshold == pool.threshold or math.isnan(top.threshold)
        assert find_top(folder, top_ratio) == top or math.isnan(top.threshold)
        assert sum(len(mask) for _, mask in top_masks(folder, top)) == len(entropy)


# ---- summary


PIECES = ["<think>", "</think>", "$", "x", " wait", "\\boxed{", "}", "`", "\n", "\n\n", "```", " ", "[/b]", "7"]


@settings(max_examples=25)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, len(PIECES) - 1), st.floats(0, 4, width=32)), max_size=25),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_a_summary_is_what_its_definitions_say(
    rows: list[list[tuple[int, float]]], part_size: int, min_count: int
) -> None:
    answers = []
    for number, row in enumerate(rows):
        ids, entropy = np.array([i for i, _ in row], np.int32), np.array([value for _, value in row], np.float32)
        pieces = [PIECES[i] for i in ids]
        selected = entropy > 1
        answers.append(
            AnswerTokens("p", "t", ids, pieces, entropy, -entropy, selected=selected, answer=number, step=number % 2)
        )
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_manifest(folder, {"source": "model", "temperature": 1.0})
        for start in range(0, len(answers), part_size):
            write_part(folder, start // part_size, answers[start : start + part_size])
        summary = summarise(folder, min_count, num_tokens=3, position_bins=4)

    entropy = np.concatenate([answer.entropy for answer in answers])
    assert (summary["answers"], summary["tokens"]) == (len(answers), len(entropy))
    if not len(entropy):
        assert summary["mean_entropy"] is None
        assert summary["percentiles"] == {}
        return
    assert summary["mean_entropy"] == pytest.approx(entropy.mean(dtype=np.float64))
    assert summary["max_entropy"] == entropy.max()
    assert summary["share_below"] == {str(edge): pytest.approx((entropy < edge).mean()) for edge in BELOW}
    assert list(summary["percentiles"].values()) == [
        np.quantile(entropy, q / 100, method="inverted_cdf") for q in PERCENTILES
    ]
    edges, counts = summary["histogram"]["edges"], summary["histogram"]["tokens"]
    assert sum(counts) == len(entropy)
    for value in entropy:
        assert any(low - 1e-6 <= value <= high + 1e-6 for low, high in pairwise(edges))

    groups: dict[tuple[str, Any], list[tuple[float, bool]]] = defaultdict(list)
    for answer in answers:
        kinds, sections = kinds_of_tokens(answer.pieces), sections_of_tokens(answer.pieces, answer.prompt)
        for place, (token, value) in enumerate(zip(answer.token_ids, answer.entropy, strict=True)):
            one = (float(value), bool(value > 1))
            groups["token", int(token)].append(one)
            groups["position", 4 * place // len(answer.token_ids)].append(one)
            groups["kind", KINDS[kinds[place]]].append(one)
            groups["section", ("answer", "thinking")[sections[place]]].append(one)
            groups["cell", (("answer", "thinking")[sections[place]], KINDS[kinds[place]])].append(one)
            groups["step", answer.step].append(one)

    def check(row: dict[str, Any], group: list[tuple[float, bool]]) -> None:
        assert row["tokens"] == len(group)
        assert row["mean_entropy"] == pytest.approx(sum(value for value, _ in group) / len(group))
        assert row["fork_share"] == pytest.approx(sum(fork for _, fork in group) / len(group))

    names = {"kinds": ("kind",), "sections": ("section",), "cells": ("section", "kind"), "steps": ("step",)}
    for table, keys in names.items():
        group_name = {"kinds": "kind", "sections": "section", "cells": "cell", "steps": "step"}[table]
        expected = {key: group for (kind, key), group in groups.items() if kind == group_name}
        assert len(summary[table]) == len(expected)
        for row in summary[table]:
            check(row, expected[row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys)])
    for place, row in enumerate(summary["positions"]):
        if ("position", place) in groups:
            check(row, groups["position", place])
        else:
            assert (row["tokens"], row["mean_entropy"]) == (0, None)
    often = {key: group for (kind, key), group in groups.items() if kind == "token" and len(group) >= min_count}
    means = {token: sum(value for value, _ in group) / len(group) for token, group in often.items()}
    assert summary["seen_often"] == len(often)
    assert {row["token_id"] for row in summary["highest"]}.isdisjoint(row["token_id"] for row in summary["lowest"])
    for end, sign, half in (("highest", -1, math.ceil(len(often) / 2)), ("lowest", 1, len(often) // 2)):
        expected_means = sorted(means.values(), key=lambda mean: sign * mean)[: min(3, half)]
        assert [row["mean_entropy"] for row in summary[end]] == pytest.approx(expected_means)
        for row in summary[end]:
            assert row["piece"] == PIECES[row["token_id"]]
            check(row, often[row["token_id"]])


# ---- parts of a text


def kinds_by_character(text: str) -> str:
    """o, f, c or a for each character: other, formula, code, final answer."""
    return "".join("ofca"[kind] for kind in kinds_of_tokens(list(text)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so $x+1$ is", "ooofffffooo"),
        ("it costs $5 and $6", "oooooooooooooooooo"),
        ("$5 and $x$.", "ooooooofffo"),
        (r"a \(x\) b", "oofffffoo"),
        (r"a \(b \(x\)", "oooooofffff"),
        ("$$a\nb$$c", "fffffffo"),
        ("$$a\n\nb$$c", "o" * 9),
        ("$a\nb$", "ooooo"),
        ("$a$$b$", "ffffff"),
        (r"\$5 and $x$", "oooooooofff"),
        ("use `x$` and $y$", "ooooccccooooofff"),
        ("`a\nb`", "ooooo"),
        ("```py\n$x$\n``` b", "cccccccccccccoo"),
        ("a ```\nb `c", "oocccccccc"),
        (r"$\boxed{4}$ or $\boxed{ab}$", "fffffffffffoooo" + "ffffffffaaff"),
        (r"\boxed{1", "oooooooo"),
        ("", ""),
        ("$", "o"),
    ],
)
def test_kinds_of_text(text: str, expected: str) -> None:
    assert kinds_by_character(text) == expected


def test_a_token_is_of_the_highest_kind_that_it_touches() -> None:
    pieces = ["so ", "", " $", "x", "$.", "", " is \\boxed{", "4", "2}", "!", "`a", "`", ""]
    assert [KINDS[kind] for kind in kinds_of_tokens(pieces)] == [
        "other text", "other text", "formula", "formula", "formula", "other text", "other text", "final answer",
        "final answer", "other text", "code", "code", "other text",
    ]  # fmt: skip
    assert kinds_of_tokens([]).tolist() == kinds_of_tokens(["", ""]).tolist()[:0]


def test_thinking_ends_where_the_text_says() -> None:
    for pieces, prompt, expected in (
        (["<think>", "a", "</think>", "b"], "", [1, 1, 1, 0]),
        (["a", "</think>b", "c </think>"], "", [1, 1, 0]),
        (["<thi", "nk>", "a"], "", [1, 1, 1]),
        (["a", "b"], "user\n<think>\n", [1, 1]),
        (["a", "b"], "", [0, 0]),
        ([], "<think>", []),
    ):
        assert sections_of_tokens(pieces, prompt).tolist() == expected


@given(st.lists(st.sampled_from([*PIECES, "\\(", "\\)", "\\[", "\\]", "$$", "\\", "{"]), max_size=30))
def test_any_text_has_kinds_and_cutting_it_finer_changes_none(pieces: list[str]) -> None:
    whole = kinds_of_tokens(pieces)
    characters = kinds_of_tokens(list("".join(pieces)))
    ends = np.cumsum([len(piece) for piece in pieces], dtype=int)
    for kind, end, piece in zip(whole, ends, pieces, strict=True):
        assert kind == characters[end - len(piece) : end].max(initial=0)


def test_hostile_texts_take_no_longer_than_others() -> None:
    began = time.monotonic()
    for unit in ("\\(", "\\[", "$", "$a ", "`", "```", "\\boxed{", "{", "\n ", "$$"):
        kinds_of_tokens([unit] * 100_000)
    assert time.monotonic() - began < 30, "100,000 delimiters that are never closed, in linear time"


# ---- tables and figures


def hostile_folder(folder: Path) -> Path:
    pieces = ["[/b]", "<script>", "\x1b[31m", "\u202eabc", "$x$", 'a,"b', " ", "\n", "<0xE2>", "x" * 3000, "漢", ""]
    row = np.arange(len(pieces))
    answer = AnswerTokens("p$", "t", row, pieces, row.astype(np.float32), -row, selected=row > 5, step=1)
    write_manifest(folder, {"source": "model", "temperature": 1.0, "top_ratio": 0.5, "threshold": 5.0})
    write_part(folder, 0, [answer, AnswerTokens("", "", row[:0], [], row[:0], row[:0], answer=1)])
    return folder


def test_what_a_model_wrote_is_shown_as_text(tmp_path: Path) -> None:
    folder = hostile_folder(tmp_path)
    summary = summarise(folder, min_count=1)
    results.write_summary(summary, folder)
    with (folder / "tokens_lowest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["piece"] for row in rows] == list(next(iter(read_answers(folder))).pieces)[:6]
    with (folder / "tokens_highest.csv").open(newline="") as file:
        assert [row["piece"] for row in csv.DictReader(file)] == list(next(iter(read_answers(folder))).pieces)[:5:-1]
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    console = Console(width=400, record=True, quiet=False, file=(tmp_path / "printed").open("w"))
    for _, table in results.summary_tables(summary):
        console.print(table.rich())
    printed = console.export_text(styles=True)
    assert "[/b]" in printed
    assert "\x1b[31m" not in printed
    assert "\\x1b[31m" in printed
    assert "\u202e" not in printed
    assert plots.shown("  a b\n") == "␣␣a b⏎"
    assert plots.shown("   ") == "␣␣␣"


def test_a_word_with_and_without_a_space_is_told_apart_in_the_clouds(monkeypatch: pytest.MonkeyPatch) -> None:
    import wordcloud

    drawn: list[dict[str, float]] = []

    def note(self: Any, sizes: dict[str, float]) -> Any:
        drawn.append(sizes)
        return self

    monkeypatch.setattr(wordcloud.WordCloud, "generate_from_frequencies", note)
    monkeypatch.setattr(wordcloud.WordCloud, "to_array", lambda _: np.zeros((4, 7, 4), np.uint8))
    highest, lowest = ([{"piece": piece} for piece in pieces] for pieces in ((" First", " So", " "), ("First", "+1")))
    plots.word_cloud(highest, lowest)
    plots.word_cloud(lowest, highest)
    assert [list(sizes) for sizes in drawn] == [["␣First", "So", "␣"], ["First", "+1"]]


def test_the_texts_of_the_bars_are_inside_the_figure_and_apart() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    row = {"tokens": 123_456_789, "fork_share": 0.213}
    summary = {
        "sections": [{"section": name, **row, "mean_entropy": 0.2} for name in ("thinking", "answer")],
        "kinds": [{"kind": kind, **row, "mean_entropy": mean} for mean, kind in enumerate(KINDS)],
    }
    figure = plots.entropy_by_kind(summary)
    figure.set_size_inches(5.2, 3.2)  # as in the report
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    inside, whole = axes.get_window_extent(), figure.bbox
    assert len(axes.texts) == 2 + len(KINDS)
    for text in axes.texts:
        box = text.get_window_extent()
        assert inside.x0 < box.x0 < box.x1 < inside.x1, text
    names = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(whole.x0 <= box.x0 and box.x1 <= inside.x0 for box in names)
    assert all(low.y1 <= high.y0 for low, high in pairwise(sorted(names, key=lambda box: box.y0)))
    assert axes.get_yticklabels()[1].get_text() == "answer\n123,456,789 tokens, 21.3% forks"


def test_figures_are_the_same_files_every_time_and_have_no_background(tmp_path: Path) -> None:
    from matplotlib import image

    summary = summarise(hostile_folder(tmp_path), min_count=1)
    for name in ("one", "two"):
        files = plots.save(plots.of_summary(summary), tmp_path / name)
    assert [(tmp_path / "one" / file.name).read_bytes() for file in files] == [file.read_bytes() for file in files]
    for file in files:
        if file.suffix == ".png":
            pixels = image.imread(file)
            assert pixels[0, 0, 3] == 0, "transparent"
            inks = pixels[pixels[..., 3] > 0.99][:, :3]
            assert len(inks)
            assert inks.max(axis=1).min() > 0.3, "nothing on it is black"
            assert inks.min(axis=1).max() < 0.9, "nothing on it is white"
    assert len(files) == 10


def test_a_folder_without_a_token_has_no_figures_and_no_tables(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"source": "model"})
    none = np.zeros(0)
    write_part(tmp_path, 0, [AnswerTokens("p", "", none, [], none, none)])
    summary = summarise(tmp_path)
    results.write_summary(summary, tmp_path)
    assert results.summary_tables(summary) == []
    assert json.loads((tmp_path / "summary.json").read_text())["tokens"] == 0
    assert not list((tmp_path / "figures").iterdir())
    assert select_top(tmp_path, 0.2).num_selected == 0


def test_an_entropy_that_is_no_number_is_named(tmp_path: Path) -> None:
    """A training that has diverged writes such entropies with dump_every."""
    written(tmp_path, [[0.5, 1.0], [0.5, float("nan")]], part_size=1)
    with pytest.raises(EntropyForkError, match=r"answer 1 in .* not finite"):
        summarise(tmp_path)
