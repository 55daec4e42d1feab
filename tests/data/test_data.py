"""Data: small files in each source's schema, through the real loading code and verl's real data set."""

from __future__ import annotations

import csv
import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from entropy_fork.cli import app
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.data.prepare import (
    SCHEMA,
    CheckedRow,
    Form,
    Prepared,
    agree,
    answer_in,
    clean_answer,
    distinct_rows,
    normalised,
    write,
)
from entropy_fork.data.read import COLUMNS, sha256
from entropy_fork.data.sources import SOURCES, TEST, own_source
from entropy_fork.data.template import INSTRUCTION, chat_template
from entropy_fork.reward import compute_score

DAPO = SOURCES["dapo_math_17k"]


def dapo_row(question: str | None, answer: str | None, index: str = "uuid", instructed: bool = True) -> dict[str, Any]:
    content = DAPO.prefix + question + DAPO.suffix if instructed and question is not None else question
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": content, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def guru_row(question: str, answer: str, instructed: bool = True) -> dict[str, Any]:
    content = question + (" Please output the final answer within \\boxed{}." if instructed else "")
    return {
        "data_source": "math__merged_deduped_dapo_or1_dataset",
        "prompt": [{"content": content, "role": "user"}],
        "ability": "math",
        "apply_chat_template": True,
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": 7, "original_question": question, "reward_metric": "default", "split": "train"},
        "qwen2.5_7b_pass_rate": 0.5,
        "qwen3_30b_pass_rate": None,
    }


def olympiad_row(question: str, final_answer: list[str] | None, **other: Any) -> dict[str, Any]:
    row = {
        "id": 1606,
        "question": question,
        "solution": ["Because."],
        "final_answer": final_answer,
        "context": None,
        "image_1": None,
        "modality": "Text-only",
        "difficulty": "Competition",
        "is_multiple_answer": "," in "".join(final_answer or []),
        "unit": None,
        "answer_type": "Numerical",
        "error": None,
        "question_type": "Open-ended",
        "subfield": "Algebra",
        "subject": "Math",
        "language": "English",
    }
    return {**row, **other}


#: a row of each source's schema, its question, its ground truth afterwards, its id
EXAMPLES: dict[str, tuple[dict[str, Any], str, str, str | None]] = {
    "dapo_math_17k": (dapo_row("What is $1+1$?", "2"), "What is $1+1$?", "2", "uuid"),
    "guru_math_54k": (guru_row("Find $x$.", "\\frac{1}{2}"), "Find $x$.", "\\frac{1}{2}", "7"),
    "aime24": (
        {"id": 60, "problem": "Every morning", "solution": "...", "answer": "204", "url": "u", "year": "2024"},
        "Every morning",
        "204",
        "60",
    ),
    "aime25": ({"problem": "Find the sum", "answer": "70", "id": "0"}, "Find the sum", "70", "0"),
    "amc23": ({"id": 0, "question": "Cities $A$", "answer": 27.0, "url": "u"}, "Cities $A$", "27", "0"),
    "math500": (
        {
            "problem": "Convert",
            "solution": "...",
            "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        },
        "Convert",
        "\\left( 3, \\frac{\\pi}{2} \\right)",
        "test/precalculus/807.json",
    ),
    "minerva": ({"question": "Luminosity?", "answer": "4.5e33"}, "Luminosity?", "4.5 \\times 10^{33}", None),
    "olympiadbench": (olympiad_row("Solve.", ["$2,-3$"]), "Solve.", "2,-3", "1606"),
    "gsm8k": (
        {"question": "How many clips?", "answer": "She sold 48/2 = <<48/2=24>>24 in May.\n#### 70,024"},
        "How many clips?",
        "70024",
        None,
    ),
    "math": (
        {
            "problem": "Evaluate.",
            "level": "Level 5",
            "solution": "First $\\boxed{3}$, so $\\boxed{\\frac{1}{2}}$.",
            "type": "Algebra",
        },
        "Evaluate.",
        "\\frac{1}{2}",
        None,
    ),
}


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str | Path) -> str:
    """The error: one message, no traceback."""
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    return result.output


class Output:
    """What 'data prepare' wrote for one source."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.rows = pq.read_table(folder / self.manifest["file"]).to_pylist()
        self.rejected = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
        # what is promised of every output
        assert self.manifest["sha256"] == sha256(folder / self.manifest["file"])
        assert self.manifest["rows_out"] == len(self.rows)
        assert self.manifest["rows_in"] == len(self.rows) + sum(self.manifest["dropped"].values())
        counted = {k: v for k, v in self.manifest["dropped"].items() if k not in ("duplicate", "beyond_limit")}
        listed: dict[str, int] = {}
        for line in self.rejected:
            listed[line["reason"]] = listed.get(line["reason"], 0) + line["copies"]
        assert listed == counted


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., Output]:
    def call(name: str, rows: list[dict[str, Any]], *options: str) -> Output:
        source = write_parquet(tmp_path / "in" / f"{name}.parquet", rows)
        run("prepare", name, "--from", source, "--output", tmp_path / "out", *options)
        return Output(tmp_path / "out" / name)

    return call


@pytest.mark.process
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("write", [write_parquet, write_lines])
def test_each_source(name: str, write: Callable[..., Path], tmp_path: Path) -> None:
    row, question, answer, identifier = EXAMPLES[name]
    file = write(tmp_path / ("rows" + (".parquet" if write is write_parquet else ".jsonl")), [row])
    run("prepare", name, "--from", file, "--output", tmp_path)
    output = Output(tmp_path / name)
    use = SOURCES[name].use
    assert output.rows == [
        {
            "data_source": name,
            "prompt": [{"role": "user", "content": f"{question}\n{INSTRUCTION}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"index": 0, "split": use, "id": identifier},
        }
    ]
    assert (tmp_path / name / f"{use}.parquet").is_file()
    assert compute_score(name, f"So \\boxed{{{answer}}}.", answer)["acc"] == 1.0
    assert output.manifest["files"] == [{"name": file.name, "sha256": sha256(file)}]


def test_every_example_is_of_a_source_and_the_other_way_round() -> None:
    assert set(EXAMPLES) == set(SOURCES)
    assert sum(source.use == TEST for source in SOURCES.values()) == 6


def test_copies_become_one_row_and_keep_their_order(prepare: Callable[..., Output]) -> None:
    rows = [dapo_row(f"Question {i % 3}?", str(i % 3), f"id {i}") for i in range(300)]
    rows[3]["prompt"][0]["content"] = DAPO.prefix + " Question  0?\n" + DAPO.suffix  # another spelling of the first
    output = prepare("dapo_math_17k", rows)
    assert [row["prompt"][0]["content"].split("\n")[0] for row in output.rows] == [f"Question {i}?" for i in range(3)]
    assert [row["extra_info"] for row in output.rows] == [
        {"index": i, "split": "train", "id": f"id {i}"} for i in range(3)
    ]
    assert output.manifest["dropped"] == {"duplicate": 297}
    assert output.rejected == []


def test_conflicting_answers_are_left_out_and_listed_and_equal_ones_are_not(prepare: Callable[..., Output]) -> None:
    rows = [dapo_row("A?", "1"), dapo_row("A?", "2"), dapo_row("A?", "1"), dapo_row("B?", "0.5")]
    output = prepare("dapo_math_17k", [*rows, dapo_row("B?", "\\frac{1}{2}")])
    assert [row["reward_model"]["ground_truth"] for row in output.rows] == ["0.5"]
    assert output.manifest["dropped"] == {"conflicting_answers": 3, "duplicate": 1}
    assert [(line["answer"], line["row"], line["copies"]) for line in output.rejected] == [("1", 0, 2), ("2", 1, 1)]


def test_unusable_rows_are_counted_by_reason_and_listed(prepare: Callable[..., Output]) -> None:
    two_messages = dapo_row("Two?", "3")
    two_messages["prompt"].append({"content": "And now?", "role": "user"})
    none = dapo_row("None?", "3")
    none["prompt"] = []
    rows = [
        dapo_row("Good?", "3"),
        dapo_row("", "3"),
        dapo_row(None, "3"),
        dapo_row("No answer?", None),
        dapo_row("Blank answer?", "  "),
        dapo_row("Long?", "1+" * 600 + "1"),
        dapo_row("Other words?", "3", instructed=False),
        two_messages,
        none,
    ]
    output = prepare("dapo_math_17k", rows)
    assert len(output.rows) == 1
    assert output.manifest["dropped"] == {
        "answer_not_scorable": 1,
        "no_answer": 2,
        "no_question": 2,
        "not_one_message": 2,
        "other_instruction": 1,
    }
    assert [line["row"] for line in output.rejected] == list(range(1, 9))
    assert {"reason": "other_instruction", "question": "Other words?", "answer": "3"}.items() <= output.rejected[
        5
    ].items()


def test_a_copy_with_bare_questions(prepare: Callable[..., Output]) -> None:
    row = {"prompt": "How many?", "solution": "3", "reward_model": {"ground_truth": "3"}, "extra_info": {"index": "u"}}
    assert prepare("dapo_math_17k", [row]).rows[0]["prompt"][0]["content"] == f"How many?\n{INSTRUCTION}"


def test_guru_without_its_instruction_is_used(prepare: Callable[..., Output]) -> None:
    output = prepare("guru_math_54k", [guru_row("A?", "1"), guru_row("B?", "2", instructed=False)])
    assert [row["prompt"][0]["content"] for row in output.rows] == [f"{q}\n{INSTRUCTION}" for q in ("A?", "B?")]


@pytest.mark.process
def test_olympiadbench(prepare: Callable[..., Output]) -> None:
    rows = [
        olympiad_row("One?", ["$\\frac{1}{2}$"]),
        olympiad_row("Several, in one text?", ["$1,2$"]),
        olympiad_row("Several?", ["3", "-3"]),
        olympiad_row("A proof?", None, question_type="Theorem proof"),
        olympiad_row("A picture?", ["4"], modality="Multimodal"),
        olympiad_row("No answer?", []),
        olympiad_row("And then?", ["5"], context="Let $n$ be five."),
    ]
    output = prepare("olympiadbench", rows)
    assert [row["reward_model"]["ground_truth"] for row in output.rows] == ["\\frac{1}{2}", "1,2", "3, -3", "5"]
    assert output.rows[-1]["prompt"][0]["content"] == f"Let $n$ be five.\nAnd then?\n{INSTRUCTION}"
    assert output.manifest["dropped"] == {"needs_an_image": 1, "no_answer": 1, "theorem_proof": 1}
    # several answers are a set, in whatever order
    for answer in ("-3, 3", "3,-3"):
        assert compute_score("", f"\\boxed{{{answer}}}", "3, -3")["acc"] == 1.0
    assert compute_score("", "\\boxed{3}", "3, -3")["acc"] == 0.0


# --- ground truths ---


#: a ground truth of which no answer can be right, and the reason in the list of left-out rows
NO_TRUTHS: list[tuple[Any, str]] = [
    (None, "no_answer"),
    ("", "no_answer"),
    ("None", "no_answer"),
    ("null", "no_answer"),
    ("N/A", "no_answer"),
    ([], "no_answer"),
    ("[]", "no_answer"),
    (["1", None], "no_answer"),
    (float("nan"), "answer_not_finite"),
    ("nan", "answer_not_finite"),
    (float("-inf"), "answer_not_finite"),
    ("inf", "answer_not_finite"),
    ("$nan$", "answer_not_finite"),
    ({"target": 1}, "answer_is_a_mapping"),
    ('{"target": 1}', "answer_is_a_mapping"),
    ("{'target': 1}", "answer_is_a_mapping"),
    (True, "answer_of_another_kind"),
    ([["1"]], "answer_of_another_kind"),
    ("['1', '2']", "answer_of_another_kind"),
]


def test_ground_truths_that_no_answer_equals_are_left_out_with_the_reason(tmp_path: Path) -> None:
    rows = [{"problem": f"Question {i}?", "answer": truth} for i, (truth, _) in enumerate(NO_TRUTHS)]
    file = write_lines(tmp_path / "rows.jsonl", [*rows, {"problem": "Good?", "answer": 3}])
    run("prepare", "aime25", "--from", file, "--output", tmp_path)
    output = Output(tmp_path / "aime25")
    assert [(line["row"], line["reason"]) for line in output.rejected] == [
        (i, reason) for i, (_, reason) in enumerate(NO_TRUTHS)
    ]
    assert [row["reward_model"]["ground_truth"] for row in output.rows] == ["3"]


@pytest.mark.parametrize("question", [None, "", " \n", "nan", "None"])
def test_empty_questions_are_left_out(tmp_path: Path, question: str | None) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"problem": question, "answer": 1}, {"problem": "Good?", "answer": 3}])
    run("prepare", "aime25", "--from", file, "--output", tmp_path)
    assert Output(tmp_path / "aime25").manifest["dropped"] == {"no_question": 1}


#: columns of answers in parquet: the type, the values, and what is written
COLUMNS_OF_ANSWERS: dict[str, tuple[pa.DataType, list[Any], list[str]]] = {
    "large_string": (pa.large_string(), ["1", "2"], ["1", "2"]),
    "string_view": (pa.string_view(), ["1", "2"], ["1", "2"]),
    "dictionary": (pa.dictionary(pa.int32(), pa.string()), ["1", "2"], ["1", "2"]),
    "int32": (pa.int32(), [1, 2], ["1", "2"]),
    "double": (pa.float64(), [1.0, 2.5], ["1", "2.5"]),
    "decimal": (pa.decimal128(5, 2), [1, 2], ["1.00", "2.00"]),
    "list<large_string>": (pa.list_(pa.large_string()), [["1", "2"], ["3"]], ['["1", "2"]', "3"]),
    "list<string_view>": (pa.list_(pa.string_view()), [["1"], ["$3$"]], ["1", "3"]),
    "large_list<string>": (pa.large_list(pa.string()), [["1", "2"], ["3", "3"]], ['["1", "2"]', "3"]),
    "list<int64>": (pa.list_(pa.int64()), [[1, 2], [3]], ['["1", "2"]', "3"]),
    "large_list<double>": (pa.large_list(pa.float64()), [[1.0, 2.5], [3.0]], ['["1", "2.5"]', "3"]),
}


@pytest.mark.parametrize("name", COLUMNS_OF_ANSWERS)
def test_answers_of_every_type_are_read(tmp_path: Path, name: str) -> None:
    kind, values, written = COLUMNS_OF_ANSWERS[name]
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"problem": pa.array(["A?", "B?"]), "answer": pa.array(values, kind)}), file)
    assert pq.read_schema(file).field("answer").type == kind
    run("prepare", "aime25", "--from", file, "--output", tmp_path)
    assert [row["reward_model"]["ground_truth"] for row in Output(tmp_path / "aime25").rows] == written


@pytest.mark.parametrize("text", [pa.large_string(), pa.string_view()])
@pytest.mark.parametrize("many", [None, pa.list_, pa.large_list])
def test_questions_of_every_type_are_read(tmp_path: Path, text: pa.DataType, many: Callable[..., Any] | None) -> None:
    kind = text if many is None else many(pa.struct([("role", text), ("content", text)]))
    question = "A?" if many is None else [{"role": "user", "content": "A?"}]
    reward = pa.StructArray.from_arrays([pa.array(["1"], text)], ["ground_truth"])
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": pa.array([question], kind), "reward_model": reward}), file)
    run("prepare", "guru_math_54k", "--from", file, "--output", tmp_path)
    (row,) = Output(tmp_path / "guru_math_54k").rows
    assert row["prompt"][0]["content"] == f"A?\n{INSTRUCTION}"


def test_mixed_columns_in_json_lines_are_read(tmp_path: Path) -> None:
    rows = [
        {"problem": "A?", "answer": 1, "id": 7},
        {"problem": "B?", "answer": "2", "other": {"x": 1}},
        {"answer": [3, "4"], "problem": [{"role": "user", "content": "C?"}], "id": "c"},
        {"problem": "D?", "answer": 5.0},
        {"problem": "half \ud800", "answer": 6},
        {"problem": 8, "answer": 9},
    ]
    run("prepare", "aime25", "--from", write_lines(tmp_path / "a.jsonl", rows), "--output", tmp_path)
    output = Output(tmp_path / "aime25")
    truths = [row["reward_model"]["ground_truth"] for row in output.rows]
    assert truths == ["1", "2", '["3", "4"]', "5", "6"]
    assert [row["extra_info"]["id"] for row in output.rows] == ["7", None, "c", None, None]
    assert output.manifest["dropped"] == {"no_question": 1}
    # the same as one JSON list
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    run("prepare", "aime25", "--from", tmp_path / "a.json", "--output", tmp_path, "--overwrite")
    assert Output(tmp_path / "aime25").rows == output.rows


@pytest.mark.process
def test_a_list_means_any_of_its_answers(tmp_path: Path) -> None:
    """From the file to the reward, as docs/reference/reward.md says; a list as text means the same."""
    rows = [{"problem": "A?", "answer": ["1", "\\sqrt{2}"]}, {"problem": "B?", "answer": '["1", "\\\\sqrt{2}"]'}]
    run("prepare", "aime25", "--from", write_lines(tmp_path / "a.jsonl", rows), "--output", tmp_path)
    first, second = [row["reward_model"]["ground_truth"] for row in Output(tmp_path / "aime25").rows]
    assert first == second
    for truth in (first, ["1", "\\sqrt{2}"]):
        for answer, right in {"1": 1.0, "2/\\sqrt{2}": 1.0, "2": 0.0, "1, \\sqrt{2}": 0.0}.items():
            assert compute_score("", f"\\boxed{{{answer}}}", truth)["acc"] == right, (truth, answer)


def test_lists_agree_if_they_accept_the_same() -> None:
    assert agree('["1", "2"]', '["2", "1.0"]')
    assert not agree('["1", "2"]', "1")
    assert not agree("1", '["1", "2"]')


# --- instructions of the source ---


@pytest.mark.parametrize("change", [lambda text: text, str.strip, lambda text: f"  {text}\n"])
def test_a_row_flattened_to_text_loses_the_sources_instruction(
    prepare: Callable[..., Output], change: Callable[[str], str]
) -> None:
    text = change(DAPO.prefix + "How many?" + DAPO.suffix)
    output = prepare("dapo_math_17k", [{"prompt": text, "reward_model": {"ground_truth": "3"}}])
    assert output.rows[0]["prompt"][0]["content"] == f"How many?\n{INSTRUCTION}"


@pytest.mark.parametrize(
    "text",
    [
        "user: " + DAPO.prefix + "How many?" + DAPO.suffix,
        "<|im_start|>user\n" + DAPO.prefix + "How many?" + DAPO.suffix + "<|im_end|>",
        "How many? Write your final answer on its own line after 'Answer:'",
        "How many? Put the number after ####.",
    ],
)
@pytest.mark.parametrize("name", ["dapo_math_17k", "guru_math_54k", "own"])
def test_a_question_that_asks_for_another_form_is_left_out(tmp_path: Path, name: str, text: str) -> None:
    rows = [
        {"prompt": text, "reward_model": {"ground_truth": "3"}},
        {"prompt": "B?", "reward_model": {"ground_truth": "3"}},
    ]
    file = write_parquet(tmp_path / "in.parquet", rows)
    own = ("--question", "prompt", "--answer", "reward_model.ground_truth", "--name", "own", file)
    run("prepare", *(own if name == "own" else (name, "--from", file)), "--output", tmp_path)
    assert Output(tmp_path / name).manifest["dropped"] == {"other_instruction": 1}
    assert Output(tmp_path / name).rejected[0]["question"] in text


# --- own files ---


OWN = ("--question", "q", "--answer", "a", "--name", "mine")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "parquet"])
def test_own_files_by_their_columns(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"q": 'What is "6 * 7", in words or not?', "a": "42", "z": ""},
        {"q": "Which?\nThis.", "a": "\\frac{1}{2}", "z": "x"},
    ]
    file = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        with file.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, ["q", "a", "z"])
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == "json":
        file.write_text(json.dumps(rows))
    else:
        (write_lines if suffix == "jsonl" else write_parquet)(file, rows)
    assert str(tmp_path / "mine" / "train.parquet") in run("prepare", *OWN, file, "--output", tmp_path)
    output = Output(tmp_path / "mine")
    assert output.rows == [
        {
            "data_source": "mine",
            "prompt": [{"role": "user", "content": f"{row['q']}\n{INSTRUCTION}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": row["a"]},
            "extra_info": {"index": index, "split": "train", "id": None},
        }
        for index, row in enumerate(rows)
    ]
    assert output.manifest["columns"] == {"question": "q", "answer": "a"}
    assert output.manifest["files"] == [{"name": file.name, "sha256": sha256(file)}]


def test_own_files_of_several_kinds_fields_and_the_split(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", [{"x": {"question": "A?", "deep": {"answer": 1}}}])
    second = write_parquet(tmp_path / "b.parquet", [{"x": {"question": "B?", "deep": {"answer": 2}}}])
    columns = ("--question", "x.question", "--answer", "x.deep.answer", "--name", "mine")
    run("prepare", *columns, first, second, "--split", "test", "--output", tmp_path)
    rows = Output(tmp_path / "mine").rows
    assert [(r["reward_model"]["ground_truth"], r["extra_info"]["split"]) for r in rows] == [
        ("1", "test"),
        ("2", "test"),
    ]
    assert (tmp_path / "mine" / "test.parquet").is_file()


def test_the_default_folder_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("prepare", *OWN, write_lines(tmp_path / "a.jsonl", [{"q": "A?", "a": 1}]))
    assert (tmp_path / "data" / "mine" / "train.parquet").is_file()


@pytest.mark.parametrize(
    ("template", "content"),
    [
        ("In a \\boxed{}, please.", "A {x}?\nIn a \\boxed{}, please."),
        ("Q: {question}\nA in \\boxed{}.", "Q: A {x}?\nA in \\boxed{}."),
        ("", "A {x}?"),
    ],
)
def test_a_template_of_ones_own(tmp_path: Path, template: str, content: str) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"q": "A {x}?", "a": 1}])
    result = CliRunner().invoke(
        app, ["data", "prepare", *OWN, str(file), "--output", str(tmp_path), "--template", template]
    )
    assert result.exit_code == 0
    output = Output(tmp_path / "mine")
    assert output.rows[0]["prompt"][0]["content"] == content
    assert output.manifest["instruction"] == template
    # a reward that looks for a box would give every answer 0
    assert ("does not ask for \\boxed{}" in result.stderr) == (template == "")


def test_without_a_box_other_instructions_and_answers_are_the_users_own(tmp_path: Path) -> None:
    rows = [{"q": "A? Answer: $Answer", "a": "1+" * 600 + "1"}]
    file = write_lines(tmp_path / "a.jsonl", rows)
    run("prepare", *OWN, file, "--output", tmp_path, "--template", "")
    assert len(Output(tmp_path / "mine").rows) == 1


@given(st.integers(2, 30), st.integers(1, 29), st.integers(0, 3))
def test_the_holdout_is_drawn_once_and_apart(total: int, holdout: int, seed: int) -> None:
    kept = [CheckedRow(f"Question {i}?", str(i), None, i, 1, None) for i in range(total)]
    prepared, form = Prepared(kept, [], Counter(), total), Form(holdout=min(holdout, total - 1), seed=seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = write(own_source("mine", "q", "a"), prepared, {}, folder, form)
        parts = {use: pq.read_table(folder / f"{use}.parquet").to_pylist() for use in ("train", "test")}
        again = write(own_source("mine", "q", "a"), prepared, {}, folder, form)
    assert manifest == again
    truths = {use: [int(row["reward_model"]["ground_truth"]) for row in rows] for use, rows in parts.items()}
    assert len(truths["test"]) == form.holdout == manifest["holdout"]["rows"]
    assert sorted(truths["train"] + truths["test"]) == list(range(total))
    for use, rows in parts.items():
        assert truths[use] == sorted(truths[use])
        assert [row["extra_info"]["index"] for row in rows] == list(range(len(rows)))
        assert {row["extra_info"]["split"] for row in rows} == {use}


def test_the_holdout_on_the_command_line(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"q": f"Question {i}?", "a": i} for i in range(40)])
    said = run("prepare", *OWN, file, "--output", tmp_path, "--holdout", "10", "--seed", "1")
    assert "train.parquet: 30 of 40 rows" in said
    assert "test.parquet: 10 rows held out (seed 1)" in said
    drawn = {}
    for seed in ("1", "2"):
        run("prepare", *OWN, file, "--output", tmp_path, "--holdout", "10", "--seed", seed, "--overwrite")
        manifest = json.loads((tmp_path / "mine" / "manifest.json").read_text())
        drawn[seed] = manifest["holdout"]["sha256"]
        assert manifest["holdout"] == {"rows": 10, "seed": int(seed), "file": "test.parquet", "sha256": drawn[seed]}
        assert sha256(tmp_path / "mine" / "test.parquet") == drawn[seed]
        assert manifest["rows_in"] == manifest["rows_out"] == 40
    assert drawn["1"] != drawn["2"]
    message = refused("prepare", *OWN, file, "--output", tmp_path, "--holdout", "40", "--overwrite")
    assert "--holdout 40 leaves no row to train on: mine has 40 rows that can be used" in message
    assert "aime25 is for evaluation" in refused("prepare", "aime25", "--holdout", "1", "--output", tmp_path)


# --- solutions ---


@pytest.mark.parametrize(
    ("solution", "where", "answer"),
    [
        ("So 24.\n#### 72", "hashes", "72"),
        ("#### 1\n#### -1,234,567", "hashes", "-1234567"),
        ("#### 1,2", "hashes", "1,2"),
        ("no mark", "hashes", ""),
        ("$\\boxed{1}$ then $\\boxed{\\frac{1}{2}}$", "box", "\\frac{1}{2}"),
        ("so $\\boxed 2$.", "box", "2"),
        ("so $\\fbox{3}$.", "box", "3"),
        ("so 3.", "box", ""),
    ],
)
def test_the_answer_at_the_end_of_a_solution(solution: str, where: str, answer: str) -> None:
    assert answer_in(solution, where) == answer


def test_a_solution_without_its_answer_is_left_out(tmp_path: Path) -> None:
    rows = [{"question": "A?", "answer": "It is 3."}, {"question": "B?", "answer": "It is 3.\n#### 3"}]
    run("prepare", "gsm8k", "--from", write_lines(tmp_path / "a.jsonl", rows), "--output", tmp_path)
    assert Output(tmp_path / "gsm8k").manifest["dropped"] == {"no_answer": 1}


def test_both_splits_of_a_download(tmp_path: Path) -> None:
    for split in ("train", "test"):
        row = {"question": f"{split}?", "answer": "#### 3"}
        write_parquet(tmp_path / "gsm8k" / "main" / f"{split}-00000-of-00001.parquet", [row])
        write_parquet(tmp_path / "gsm8k" / "socratic" / f"{split}-00000-of-00001.parquet", [row, row])
        run("prepare", "gsm8k", "--from", tmp_path / "gsm8k", "--split", split, "--output", tmp_path / split)
        output = Output(tmp_path / split / "gsm8k")
        assert output.manifest["file"] == f"{split}.parquet"
        assert [row["prompt"][0]["content"] for row in output.rows] == [f"{split}?\n{INSTRUCTION}"]
        assert output.manifest["rows_in"] == 1
    message = refused("prepare", "dapo_math_17k", "--split", "test", "--output", tmp_path)
    assert "dapo_math_17k has no test split; --split test is for gsm8k, math, and files of your own" in message


def test_what_is_wrong_with_own_files_is_said_in_one_line(tmp_path: Path) -> None:
    output = ("--output", tmp_path / "out")
    good = write_lines(tmp_path / "good.jsonl", [{"q": "A?", "a": 1, "x": {"answer": 1}}])

    def said_of(name: str, content: str | bytes, *columns: str) -> str:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        message = refused("prepare", *(columns or OWN), tmp_path / name, *output)
        assert message.count("\n") == 1, message
        return message

    assert "empty.jsonl has no rows" in said_of("empty.jsonl", "")
    assert "empty.json has no rows" in said_of("empty.json", "[]")
    assert "empty.csv has no rows" in said_of("empty.csv", "q,a\n")
    pq.write_table(pa.table({"q": pa.array([], pa.string()), "a": pa.array([], pa.string())}), tmp_path / "e.parquet")
    assert "e.parquet has no rows" in refused("prepare", *OWN, tmp_path / "e.parquet", *output)
    assert "broken.jsonl line 3 is not JSON (Expecting" in said_of("broken.jsonl", '{"q": "x", "a": 1}\n\n{"q": }\n')
    assert "deep.jsonl line 1 is not JSON (" in said_of("deep.jsonl", "[" * 100_000)
    assert "list.jsonl line 1 is not JSON" in (message := said_of("list.jsonl", '[\n{"q": "x", "a": 1}\n]'))
    assert "name it .json" in message
    assert "line 2 is no JSON object with columns but a list" in said_of("l.jsonl", '{"q": "x", "a": 1}\n[1]\n')
    assert "broken.json line 2 is not JSON" in said_of("broken.json", '[\n{"q" 1}]')
    assert "latin.jsonl line 1 is no UTF-8 text" in said_of("latin.jsonl", b'{"q": "\xe9", "a": 1}\n')
    assert "latin.csv is no UTF-8 text" in said_of("latin.csv", b"q,a\n\xe9,1\n")
    assert "wide.csv line 3 has 3 cells, and the first line names 2" in said_of("wide.csv", "q,a\nx,1\nx,y,1\n")
    assert "two columns of the name 'q'" in said_of("twice.csv", "q,q\nx,1\n")
    assert "open.csv line 2 is not CSV" in said_of("open.csv", 'q,a\n"x,1\n')
    assert "cut.parquet cannot be read (" in said_of("cut.parquet", b"PAR1")
    assert "none of the 1 rows can be used as mine: answer_not_finite (1)" in said_of("no.csv", "q,a\nx,nan\n")

    write_parquet(tmp_path / "good.parquet", [{"q": "A?", "a": 1, "x": {"answer": 1}}])
    for question, answer, message in (
        ("Q", "a", "has no column 'Q' (--question); did you mean q? It has the columns q, a, x."),
        ("q", "x.anser", "has no column 'x.anser' (--answer); did you mean x.answer?"),
        ("q", "zzzzzz", "has no column 'zzzzzz' (--answer). It has the columns q, a, x."),
    ):
        columns = ("--question", question, "--answer", answer, "--name", "mine")
        assert message in refused("prepare", *columns, good, *output)
        assert message in refused("prepare", *columns, tmp_path / "good.parquet", *output)

    assert "good.jsonl is a file or folder of your own: say which columns" in refused("prepare", good, *output)
    assert "add --answer COLUMN, --name NAME" in refused("prepare", "--question", "q", good, *output)
    assert "did you mean gsm8k?" in refused("prepare", "gsm8", *output)
    assert "--from is for the known sources" in refused("prepare", *OWN, good, "--from", good, *output)
    assert "--revision is for the hub" in refused("prepare", *OWN, good, "--revision", "v1", *output)
    for name in ("../mine", ".mine", "a/b", "a b"):
        message = refused("prepare", *OWN[:4], "--name", name, good, *output)
        assert "must begin with a letter or a digit" in message
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_limit(prepare: Callable[..., Output]) -> None:
    rows = [dapo_row(f"Question {i % 5}?", str(i % 5)) for i in range(10)]
    output = prepare("dapo_math_17k", rows, "--limit", "2")
    assert [row["reward_model"]["ground_truth"] for row in output.rows] == ["0", "1"]
    assert output.manifest["dropped"] == {"beyond_limit": 3, "duplicate": 5}


def test_the_same_rows_give_the_same_bytes_and_overwrite_is_asked_for(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "test.jsonl", [EXAMPLES["aime25"][0]])
    arguments = ("prepare", "aime25", "--from", file, "--output", tmp_path / "out")
    run(*arguments)
    first = Output(tmp_path / "out" / "aime25").manifest
    assert "--overwrite" in refused(*arguments)
    run(*arguments, "--overwrite")
    assert Output(tmp_path / "out" / "aime25").manifest == first
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["aime25"]


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "test.jsonl", [EXAMPLES["aime25"][0]])
    (tmp_path / "aime25").mkdir()
    (tmp_path / "aime25" / "thesis.tex").write_text("precious")
    assert "not ours" in refused("prepare", "aime25", "--from", file, "--output", tmp_path, "--overwrite")
    assert (tmp_path / "aime25" / "thesis.tex").read_text() == "precious"


def test_nothing_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_lines(tmp_path / "test.jsonl", [EXAMPLES["aime25"][0]])

    def full_disk(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("entropy_fork.data.prepare.sha256", full_disk)
    result = CliRunner().invoke(
        app, ["data", "prepare", "aime25", "--from", str(file), "--output", str(tmp_path / "out")]
    )
    assert isinstance(result.exception, OSError)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.process
def test_folders_like_a_download(tmp_path: Path) -> None:
    guru = tmp_path / "guru"
    write_parquet(guru / "train" / "math__combined_54.4k.parquet", [guru_row("A?", "1")])
    write_parquet(guru / "train" / "stem__web_3.6k.parquet", [guru_row("Not mathematics?", "1")])
    run("prepare", "guru_math_54k", "--from", guru, "--output", tmp_path / "out")
    assert len(Output(tmp_path / "out" / "guru_math_54k").rows) == 1

    olympiad = tmp_path / "olympiad" / "OlympiadBench"
    for config in ("OE_TO_maths_en_COMP", "OE_TO_maths_zh_COMP"):
        write_parquet(olympiad / config / f"{config}.parquet", [olympiad_row(config, ["1"])])
    run("prepare", "olympiadbench", "--from", tmp_path / "olympiad", "--output", tmp_path / "out")
    rows = Output(tmp_path / "out" / "olympiadbench").rows
    assert [row["prompt"][0]["content"].split("\n")[0] for row in rows] == ["OE_TO_maths_en_COMP"]

    write_lines(tmp_path / "math500" / "test.jsonl", [EXAMPLES["math500"][0]])
    write_lines(tmp_path / "math500" / ".cache" / "other.jsonl", [{"etag": "1"}])
    run("prepare", "math500", "--from", tmp_path / "math500", "--output", tmp_path / "out")


def test_bad_input(tmp_path: Path) -> None:
    output = ("--output", tmp_path / "out")
    good = write_lines(tmp_path / "good.jsonl", [EXAMPLES["aime25"][0]])

    message = refused("prepare", "aime2026", *output)
    assert "no source 'aime2026'" in message
    assert "aime25, amc23" in message
    assert "no file or folder" in refused("prepare", "aime25", "--from", tmp_path / "none.jsonl", *output)
    assert "one SOURCE" in refused("prepare", "benchmarks", "--from", good, *output)
    assert "--revision" in refused("prepare", "aime25", "--from", good, "--revision", "v1", *output)

    (tmp_path / "empty").mkdir()
    assert "no file that can be read" in refused("prepare", "aime25", "--from", tmp_path / "empty", *output)
    (tmp_path / "notes.txt").write_text("x")
    assert ".parquet, .jsonl, .json" in refused("prepare", "aime25", "--from", tmp_path / "notes.txt", *output)
    mixed = tmp_path / "mixed"
    write_lines(mixed / "a.jsonl", [EXAMPLES["aime25"][0]])
    write_parquet(mixed / "a.parquet", [EXAMPLES["aime25"][0]])
    assert "several kinds (a.jsonl, a.parquet" in refused("prepare", "aime25", "--from", mixed, *output)

    (tmp_path / "broken.parquet").write_bytes(b"not parquet at all")
    assert "broken.parquet cannot be read" in refused(
        "prepare", "aime25", "--from", tmp_path / "broken.parquet", *output
    )
    (tmp_path / "broken.jsonl").write_text('{"problem": "x", "ans\n')
    assert "broken.jsonl line 1 is not JSON" in refused(
        "prepare", "aime25", "--from", tmp_path / "broken.jsonl", *output
    )

    columns = write_lines(tmp_path / "columns.jsonl", [{"text": "x", "label": "y"}])
    message = refused("prepare", "aime25", "--from", columns, *output)
    assert "it has the columns text, label; the columns must be problem or question and answer" in message
    numbers = write_lines(tmp_path / "numbers.jsonl", [{"problem": 1, "answer": "y"}])
    assert "column problem or question of aime25 holds no text; its type is int64" in refused(
        "prepare", "aime25", "--from", numbers, *output
    )
    dates = pa.table({"problem": ["x"], "answer": pa.array([0], pa.timestamp("s"))})
    pq.write_table(dates, tmp_path / "dates.parquet")
    assert "timestamp" in refused("prepare", "aime25", "--from", tmp_path / "dates.parquet", *output)
    field = write_lines(tmp_path / "field.jsonl", [{"prompt": "x", "reward_model": {"style": "rule"}}])
    assert "the columns must be prompt and reward_model.ground_truth" in refused(
        "prepare", "dapo_math_17k", "--from", field, *output
    )
    useless = write_parquet(tmp_path / "useless.parquet", [dapo_row("A?", "1", instructed=False)])
    message = refused("prepare", "dapo_math_17k", "--from", useless, *output)
    assert "none of the 1 rows can be used as dapo_math_17k: other_instruction (1)" in message
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit that a branch stands for is what is loaded and what the manifest names."""
    import datasets
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    asked: dict[str, Any] = {}

    class Info:
        sha = commit

    def dataset_info(self: Any, repo_id: str, **arguments: Any) -> Info:
        asked["branch"] = arguments["revision"]
        return Info()

    def load_dataset(*arguments: Any, **named: Any) -> datasets.Dataset:
        asked["load"] = (arguments, named)
        return datasets.Dataset.from_list([olympiad_row("A?", ["1"]), olympiad_row("B?", ["2"])])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    run("prepare", "olympiadbench", "--output", tmp_path, "--revision", "v2")
    output = Output(tmp_path / "olympiadbench")
    assert asked["branch"] == "v2"
    assert asked["load"][0] == ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP")
    assert asked["load"][1] == {"split": "train", "revision": commit, "data_files": None}
    assert len(output.rows) == 2
    assert output.manifest["hub"] == "Hothan/OlympiadBench"
    assert output.manifest["revision"] == commit


def test_the_test_split_is_loaded_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    asked: dict[str, Any] = {}

    def load_dataset(*arguments: Any, **named: Any) -> datasets.Dataset:
        asked["load"] = (*arguments, named["split"])
        return datasets.Dataset.from_list([EXAMPLES["gsm8k"][0]])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha="0" * 40))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    run("prepare", "gsm8k", "--split", "test", "--output", tmp_path)
    assert asked["load"] == ("openai/gsm8k", "main", "test")
    output = Output(tmp_path / "gsm8k")
    assert output.manifest["split"] == "test"
    assert (output.rows[0]["extra_info"]["split"], output.manifest["file"]) == ("test", "test.parquet")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    file = write_lines(tmp_path / "a.jsonl", [{"q": "A?", "a": 1}])
    monkeypatch.setattr("entropy_fork.data.read.sha256", refuse)
    message = refused("prepare", *OWN, file, "--output", tmp_path)
    assert "a.jsonl cannot be read (PermissionError: [Errno 13] Permission denied)" in message


def test_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at this address: the real error of the real client."""
    import huggingface_hub

    real = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: real(endpoint="http://127.0.0.1:9"))
    message = refused("prepare", "benchmarks", "--output", tmp_path / "out")
    assert "cannot load HuggingFaceH4/aime_2024 from the hub" in message
    assert "Write --from PATH with a local copy of HuggingFaceH4/aime_2024" in message
    assert not (tmp_path / "out").exists()


def test_list() -> None:
    text = "".join(run("list").split())
    for source in SOURCES.values():
        assert source.name[:5] in text


@given(st.text(alphabet="ab \n\té", max_size=12), st.text(alphabet=" \n\t", min_size=1, max_size=3))
def test_normalised(question: str, space: str) -> None:
    assert normalised(normalised(question)) == normalised(question)
    assert normalised(space + question.replace(" ", space + " ") + space) == normalised(question)


def test_normalised_keeps_mathematics_apart_and_composes() -> None:
    assert normalised("x²") != normalised("x2")
    assert normalised("e\u0301") == normalised("é")
    assert normalised("A") != normalised("a")


@pytest.mark.parametrize(
    ("answer", "cleaned"),
    [
        (" 2 ", "2"),
        ("$2$", "2"),
        ("$1$, $2$", "$1$, $2$"),
        ("\\boxed{204}", "204"),
        ("$\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
        ("\\boxed{1} or \\boxed{2}", "\\boxed{1} or \\boxed{2}"),
        ("4.5e33", "4.5 \\times 10^{33}"),
        ("-6e-7", "-6 \\times 10^{-7}"),
        ("2e", "2e"),
        ("$", "$"),
        ("", ""),
    ],
)
def test_clean_answer(answer: str, cleaned: str) -> None:
    assert clean_answer(answer) == cleaned
    assert clean_answer(cleaned) == cleaned


@pytest.mark.process
def test_powers_of_ten_are_scored_as_a_model_writes_them() -> None:
    for truth in ("4.5e33", clean_answer("4.5e33")):
        assert compute_score("", "\\boxed{4.5 \\times 10^{33}}", truth)["acc"] == 1.0
        assert compute_score("", "\\boxed{4.5\\cdot 10^{33}}", truth)["acc"] == 1.0


@given(st.integers(-(10**18) + 1, 10**18 - 1))
def test_an_integer_agrees_with_itself(number: int) -> None:
    assert agree(str(number), str(number))
    assert compute_score("", f"\\boxed{{{number}}}", str(number))["acc"] == 1.0


@given(st.lists(st.tuples(*[st.sampled_from(["a", "b", None])] * 3), max_size=30), st.integers(1, 7))
def test_distinct_rows_do_not_depend_on_the_batches(rows: list[tuple[str | None, ...]], size: int) -> None:
    table = pa.table(
        [
            pa.array([row[0] for row in rows], pa.string()),
            pa.array([row[1] for row in rows], pa.string()),
            pa.array([str(i) for i in range(len(rows))], pa.string()),
            pa.array([row[2] for row in rows], pa.string()),
        ],
        names=list(COLUMNS),
    )
    batches = [table.slice(start, size) for start in range(0, len(rows), size)]
    expected: dict[tuple[str | None, ...], list[int]] = {}
    for number, row in enumerate(rows):
        expected.setdefault(row, []).append(number)
    found = distinct_rows(batches)
    assert [(r["question"], r["answer"], r["unusable"]) for r in found] == list(expected)
    assert [(r["first"], r["id"], r["copies"]) for r in found] == [(n[0], str(n[0]), len(n)) for n in expected.values()]


# --- the template, in verl ---

#: the paper's prompt, to the letter
PAPER = "User:\n{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}.\n\nAssistant:\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 without weights: its configuration, and a byte-level tokenizer with Qwen's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    ).save_pretrained(folder)
    config = Qwen3Config(vocab_size=259, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    file = write_parquet(
        tmp_path / "dapo.parquet", [dapo_row("What is $1+1$?", "2"), dapo_row("Longer: $1+1+1$?", "3")]
    )
    run("prepare", "dapo_math_17k", "--from", file, "--output", tmp_path)
    return tmp_path / "dapo_math_17k" / "train.parquet"


def verl_config(compose: Callable[..., Any], model: Path, parquet: Path, *overrides: str) -> Any:
    import entropy_fork.verl.plugin  # noqa: F401

    files = [f"data.{split}_files={parquet}" for split in ("train", "val")]
    return compose(f"actor_rollout_ref.model.path={model}", *files, *overrides)


def verl_data(config: Any) -> tuple[Any, Any]:
    """verl's tokenizer and training data, made as its trainer makes them."""
    from verl.trainer.ppo.utils import create_rl_dataset
    from verl.utils.config import omega_conf_to_dataclass

    model_config = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    files = config.data.train_files
    return model_config, create_rl_dataset(
        files, config.data, model_config.tokenizer, model_config.processor, is_train=True, max_samples=-1
    )


def agent_loop_prompt(config: Any, model_config: Any, row: dict[str, Any]) -> list[int]:
    """The token ids that verl's single-turn agent loop sends to the rollout."""
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    builder = create_continuous_token_builder(
        model_config.tokenizer,
        hf_model_type=model_config.hf_config.model_type,
        chat_template_kwargs={} if config is None else config.data.get("apply_chat_template_kwargs", {}),
        processor=model_config.processor,
    )
    return builder.build_initial_tokens(list(row["raw_prompt"]))


def test_verl_sends_the_papers_prompt_to_the_letter(compose: Callable[..., Any], model: Path, parquet: Path) -> None:
    config = verl_config(compose, model, parquet, "+template=paper", "data.max_prompt_length=2048")
    model_config, data = verl_data(config)
    assert len(data) == 2
    ids = agent_loop_prompt(config, model_config, data[0])
    assert model_config.tokenizer.decode(ids) == PAPER.format(question="What is $1+1$?")
    assert data[0]["reward_model"]["ground_truth"] == "2"
    assert data[1]["index"] == 1
    assert data[1]["data_source"] == "dapo_math_17k"

    # EOS: what the tokenizer says, in the configuration that the rollout stops by and at the end of an answer
    assert model_config.tokenizer.eos_token == "<|endoftext|>"
    assert model_config.hf_config.eos_token_id == model_config.tokenizer.eos_token_id
    turns = [*data[0]["raw_prompt"], {"role": "assistant", "content": "\\boxed{2}"}]
    whole = model_config.tokenizer.apply_chat_template(turns, tokenize=False)
    assert whole == PAPER.format(question="What is $1+1$?") + "\\boxed{2}<|endoftext|>"


@pytest.mark.process
def test_verls_length_filter_counts_the_papers_prompt(compose: Callable[..., Any], model: Path, parquet: Path) -> None:
    length = len(PAPER.format(question="What is $1+1$?"))  # one token per byte
    for limit, kept in ((length, 1), (length - 1, 0), (length + 2, 2)):
        overrides = ("data.filter_overlong_prompts=true", f"data.max_prompt_length={limit}")
        assert len(verl_data(verl_config(compose, model, parquet, "+template=paper", *overrides))[1]) == kept


def test_the_models_own_template(compose: Callable[..., Any], model: Path, parquet: Path) -> None:
    expected = f"<|im_start|>user\nWhat is $1+1$?\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    for override in ("+template=chat", "data.shuffle=true"):
        config = verl_config(compose, model, parquet, override)
        model_config, data = verl_data(config)
        assert model_config.tokenizer.decode(agent_loop_prompt(config, model_config, data[0])) == expected


def test_the_worked_examples_come_before_the_question(compose: Callable[..., Any], model: Path, parquet: Path) -> None:
    model_config, data = verl_data(verl_config(compose, model, parquet, "+template=worked"))
    prompt = model_config.tokenizer.decode(agent_loop_prompt(None, model_config, data[0]))
    turns = prompt.split("<|im_start|>")
    assert [turn.split("\n")[0] for turn in turns] == ["", "system", *["user", "assistant"] * 4]
    assert turns[-2] == f"user\nWhat is $1+1$?\n{INSTRUCTION}<|im_end|>\n"
    for asked, answered in zip(turns[2:-2:2], turns[3:-1:2], strict=True):
        assert asked.endswith(f"\n{INSTRUCTION}<|im_end|>\n")
        assert answered.startswith("assistant\n")
        assert answered.endswith("}.<|im_end|>\n")
        assert " The answer is \\boxed{" in answered


def test_the_papers_template_refuses_what_it_has_no_place_for(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}]
    with pytest.raises(Exception, match="no place for a message of the role 'system'"):
        tokenizer.apply_chat_template(messages, chat_template=chat_template("paper"), tokenize=False)


def test_templates_by_name() -> None:
    assert chat_template("chat") is None
    with pytest.raises(EntropyForkError, match="no template 'plain'; write one of chat, paper, worked"):
        chat_template("plain")


@pytest.mark.process
def test_files_of_all_sources_can_be_given_to_verl_together(
    compose: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    """Also those whose rows have no id: verl concatenates, which one schema allows."""
    files = []
    for name, (row, *_) in EXAMPLES.items():
        run("prepare", name, "--from", write_lines(tmp_path / f"{name}.jsonl", [row]), "--output", tmp_path / "out")
        files.append(tmp_path / "out" / name / f"{SOURCES[name].use}.parquet")
        assert pq.read_schema(files[-1]).equals(SCHEMA)
    config = verl_config(compose, model, files[0], f"data.train_files=[{','.join(map(str, files))}]")
    data = verl_data(config)[1]
    assert [data[i]["data_source"] for i in range(len(data))] == list(EXAMPLES)


def test_validation_metrics_are_per_benchmark() -> None:
    from verl.trainer.ppo.metric_utils import process_validation_metrics

    metrics = process_validation_metrics(["aime24", "aime24", "amc23"], ["a", "a", "b"], {"acc": [0.0, 1.0, 1.0]})
    assert metrics["aime24"]["acc"]["mean@2"] == 0.5
    assert metrics["amc23"]["acc"]["mean@1"] == 1.0


def test_a_template_without_the_plugin_is_refused(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    run = python(
        "-m",
        "verl.trainer.main_ppo",
        "--cfg",
        "job",
        "+template=paper",
        VERL_USE_EXTERNAL_PLUGINS="none",
        VERL_PLATFORM="",
    )
    assert run.returncode != 0
    assert "entropy_fork was asked for, but is not active" in run.stderr
