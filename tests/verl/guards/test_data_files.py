"""The data files of a run: columns of every type, JSON lines, and ground truths that no answer equals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.verl.guards.data_files import OUR_REWARD, check_data_files


def row(**changed: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": "1+1"}],
        "data_source": "x",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        **changed,
    }


def row_of(truth: Any) -> dict[str, Any]:
    return row(reward_model={"style": "rule", "ground_truth": truth})


def check(train: Any, val: Any = None, reward: str | None = OUR_REWARD) -> None:
    files = {"train_files": str(train) if isinstance(train, Path) else train, "val_files": str(val) if val else None}
    check_data_files(OmegaConf.create({"data": files, "reward": {"custom_reward_function": {"path": reward}}}))


#: what stands for a missing value, and what is said of it
NO_TRUTHS = {
    "": "has no reward_model.ground_truth",
    " ": "has no reward_model.ground_truth",
    "nan": "has the ground truth 'nan'",
    "NaN": "has the ground truth 'NaN'",
    "-inf": "has the ground truth '-inf'",
    "Infinity": "has the ground truth 'Infinity'",
    "None": "has the ground truth 'None', which stands for a missing one",
    "null": "has the ground truth 'null', which",
    "N/A": "has the ground truth 'N/A', which",
    "[]": r"has the empty ground truth \[\]",
    '["1", "nan"]': "has the ground truth 'nan'",
    '{"target": 1}': r"has a mapping as its ground truth: \{",
    "{'target': 1}": r"has a mapping as its ground truth: \{",
    "['1', '2']": "has a list in Python's notation as its ground truth.* Use double quotes",
}


@pytest.mark.parametrize("truth", NO_TRUTHS)
def test_a_ground_truth_that_no_answer_equals_is_named(tmp_path: Path, truth: str) -> None:
    rows = [row() for _ in range(3000)]
    rows[1234] = rows[2345] = row_of(truth)
    file = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=100)
    expected = (
        rf"data.train_files: {file} row 1234 \(from 0\) {NO_TRUTHS[truth]}.*, and 1 more such rows. Leave it out, or"
    )
    with pytest.raises(EntropyForkError, match=expected):
        check(file)
    check(file, reward=None)  # verl's own reward, or the user's
    check(file, reward="mine.py")


@pytest.mark.parametrize(
    "truth", ["0", "-7", "\\text{None}", "\\emptyset", "\\{1, 2\\}", "[1, 2]", '["1", "2"]', "\\infty"]
)
def test_a_ground_truth_to_compare_with_is_let_through(tmp_path: Path, truth: str) -> None:
    pq.write_table(pa.Table.from_pylist([row_of(truth)]), tmp_path / "train.parquet")
    check(tmp_path / "train.parquet")


#: what a column of ground truths may hold, with one that is none, and what is said of that one
COLUMNS_OF_TRUTHS = {
    "large_string": (pa.large_string(), ["2", "nan"], "'nan'"),
    "string_view": (pa.string_view(), ["2", "nan"], "'nan'"),
    "dictionary": (pa.dictionary(pa.int32(), pa.string()), ["2", "nan"], "'nan'"),
    "list<string>": (pa.list_(pa.string()), [["1", "2"], []], "an empty list"),
    "list<large_string>": (pa.list_(pa.large_string()), [["1", "2"], ["null"]], "'null'"),
    "large_list<string>": (pa.large_list(pa.string()), [["1", "2"], ["1", None]], "has no reward_model.ground_truth"),
    "list<double>": (pa.list_(pa.float64()), [[1.0, 2.5], [float("nan")]], "nan"),
    "large_list<int64>": (pa.large_list(pa.int64()), [[1, 2], None], "has no reward_model.ground_truth"),
    "int64": (pa.int64(), [2, None], "has no reward_model.ground_truth"),
    "double": (pa.float64(), [2.0, float("inf")], "inf"),
    "bool": (pa.bool_(), [None, True], "has no reward_model.ground_truth"),
    "struct": (pa.struct([("target", pa.int64())]), [{"target": 1}, None], "a mapping as its ground truth"),
    "list<list>": (pa.list_(pa.list_(pa.string())), [[["1"]], None], "a list of lists"),
}


@pytest.mark.parametrize("name", COLUMNS_OF_TRUTHS)
def test_ground_truths_of_every_type_are_read(tmp_path: Path, name: str) -> None:
    kind, values, message = COLUMNS_OF_TRUTHS[name]
    rows = [row(), row()]
    reward = pa.StructArray.from_arrays([pa.array(["rule"] * 2), pa.array(values, kind)], ["style", "ground_truth"])
    pq.write_table(pa.Table.from_pylist(rows).set_column(2, "reward_model", reward), tmp_path / "train.parquet")
    assert pq.read_schema(tmp_path / "train.parquet").field("reward_model").type.field("ground_truth").type == kind
    # the first value is one to compare with, except in columns that hold no such values at all
    number, more = (0, ", and 1 more such rows") if name in ("bool", "struct", "list<list>") else (1, "")
    expected = rf"train.parquet row {number} \(from 0\) .*{message}.*{more}. Leave it out"
    with pytest.raises(EntropyForkError, match=expected):
        check(tmp_path / "train.parquet")
    check(tmp_path / "train.parquet", reward=None)


@pytest.mark.parametrize("text", [pa.large_string(), pa.string_view()])
@pytest.mark.parametrize("many", [pa.list_, pa.large_list])
def test_prompts_of_every_type_are_read(
    tmp_path: Path, text: pa.DataType, many: Callable[[pa.DataType], pa.DataType]
) -> None:
    schema = pa.schema(
        [
            ("prompt", many(pa.struct([("role", text), ("content", text)]))),
            ("data_source", text),
            ("reward_model", pa.struct([("style", text), ("ground_truth", text)])),
        ]
    )
    file = tmp_path / "train.parquet"
    with pq.ParquetWriter(file, schema) as writer:  # a row at a time: pyarrow 26 cannot slice views to write them
        writer.write_table(pa.Table.from_pylist([row()], schema=schema))
    assert pq.read_schema(file).equals(schema)
    check(file)
    with pq.ParquetWriter(file, schema) as writer:
        for each in (row(), row(prompt=[{"role": "user", "content": ""}])):
            writer.write_table(pa.Table.from_pylist([each], schema=schema))
    with pytest.raises(EntropyForkError, match=r"row 1 \(from 0\) has a prompt without any text"):
        check(file, reward=None)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([row(), row(reward_model={"ground_truth": 2}), row(reward_model={"ground_truth": ["1", 2]})], None),
        ([row(), row(reward_model={"ground_truth": {"target": 1}})], r"row 1 \(from 0\) has a mapping as its ground"),
        ([row(), row(reward_model={"ground_truth": 2}), row(reward_model={"ground_truth": None})], "row 2 .*has no"),
        ([row(), row(prompt="1+1")], r"row 1 \(from 0\) has a prompt that is no list of chat messages"),
        ([{"question": "1+1"}], r"lacks the column\(s\) data_source, prompt, reward_model; it has question"),
        ([row(), '{"prompt"'], "line 2 is not JSON"),
        ([], "has no rows"),
    ],
)
def test_json_lines_with_mixed_columns_are_read(tmp_path: Path, lines: list[Any], message: str | None) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    if message is None:
        check(file)
    else:
        with pytest.raises(EntropyForkError, match=rf"data.train_files: .*{message}"):
            check(file)


def test_paths_that_name_no_file(tmp_path: Path) -> None:
    good = tmp_path / "folder" / "part-0.parquet"
    good.parent.mkdir()
    pq.write_table(pa.Table.from_pylist([row()]), good)
    (tmp_path / "train.csv").write_text("a\n")
    for path, message in {
        "": "data.train_files is empty",
        tmp_path / "none": "there is no file",
        tmp_path / "none.jsonl": "there is no file",
        good.parent: f"is a folder, and verl reads files: write .{good}",
        tmp_path / "train.csv": "verl cannot read .*train.csv: it takes files that end in .parquet, .json, .jsonl",
    }.items():
        with pytest.raises(EntropyForkError, match=message):
            check(path, good)
    with pytest.raises(EntropyForkError, match=r"data.train_files is empty"):
        check([])
    check(f"{good.parent}/part-*.parquet")  # verl reads with datasets, which takes patterns
    check("s3://bucket/train.parquet")


def test_what_is_wrong_with_both_files_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(EntropyForkError, match=r"data.train_files: .* a.parquet\ndata.val_files: .* b.parquet"):
        check("a.parquet", "b.parquet")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("1+1", "the column prompt has the type string, and verl wants a list of chat messages in each row"),
        ([{"text": "1+1"}], "the messages in the column prompt have no 'role'; write role and content"),
    ],
)
def test_prompts_that_are_no_messages(tmp_path: Path, prompt: Any, message: str) -> None:
    pq.write_table(pa.Table.from_pylist([row(prompt=prompt)]), tmp_path / "train.parquet")
    with pytest.raises(EntropyForkError, match=message):
        check(tmp_path / "train.parquet")
