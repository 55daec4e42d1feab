"""Check every row of a run's data files before Ray starts.

verl reads a row when its turn comes: one that has no prompt ends the run in some later epoch, one whose length filter
stumbles over it is left out with a traceback in the log, and an answer that has no ground truth to be compared with is
left out of its batch. Only the columns that verl reads are read, a batch of rows at a time.

What a ground truth must be depends on the reward. It is checked only where the reward is ours.
"""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, ListConfig, OmegaConf

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.ground_truth import fault_of
from entropy_fork.common.json_rows import json_rows

if TYPE_CHECKING:
    import pyarrow as pa

#: the value of ``reward.custom_reward_function.path`` for a reward function of ours
OUR_REWARD = "pkg://entropy_fork.reward"

#: the files that verl's data set reads, by how their names end
READ_BY_VERL = (".parquet", ".json", ".jsonl")

_LEAVE_OUT = "Leave it out; 'entropy-fork data prepare' writes files without such rows."
_WRITE_TRUTH = (
    "Leave it out, or write an expression in LaTeX, a finite number, or a list of these of which any is right; "
    "'entropy-fork data prepare' writes files without such rows."
)


class _Wants(NamedTuple):
    """What a run wants of a row."""

    #: the name of the column with the prompt
    prompt: str
    #: whether our reward reads the ground truth
    truth: bool

    @property
    def columns(self) -> list[str]:
        return sorted({self.prompt, "data_source", "reward_model"})


class _Bad(NamedTuple):
    """A row that cannot be used: its number in its batch, what is wrong with it, and what to do."""

    row: int
    says: str
    advice: str


def reads_with_verl(config: DictConfig) -> bool:
    """Whether verl's own data set class reads the files. What another class needs in them is not known."""
    return OmegaConf.select(config, "data.custom_cls.path", default=None) is None


def check_data_files(config: DictConfig) -> None:
    """Local files must be there, be readable to the end, and have in every row what a run needs of it.

    If the user's own data set class reads the files (``data.custom_cls.path``), nothing is checked.

    Raises:
        EntropyForkError: with the file, the column or the first such row, what is wrong with it, and what to write. One
            line for each file that has something wrong.
    """
    if not reads_with_verl(config):
        return
    path = OmegaConf.select(config, "reward.custom_reward_function.path", default=None)
    wants = _Wants(config.data.get("prompt_key", "prompt"), path == OUR_REWARD)
    wrong: list[str] = []
    for key in ("train_files", "val_files"):
        given: Any = config.data[key]
        files = list(given) if isinstance(given, (list, ListConfig)) else [given]
        if not files or any(not str(file).strip() for file in files):
            wrong.append(f"data.{key} is empty: write the path of a parquet or JSON lines file, or a list of them")
            continue
        for file in files:
            if file is not None and "://" not in str(file):
                wrong += [f"data.{key}: {problem}" for problem in _wrong_at(os.path.expanduser(str(file)), wants)]
    if wrong:
        raise EntropyForkError("\n".join(wrong))


def _wrong_at(path: str, wants: _Wants) -> Iterator[str]:
    """What is wrong with what a path of the config names. ``datasets``, which verl reads with, takes patterns too."""
    if os.path.isdir(path):
        inside = sorted(name for name in os.listdir(path) if name.endswith(READ_BY_VERL))[:3]
        example = f"[{','.join(os.path.join(path, name) for name in inside)}]" if inside else "[FILE,FILE]"
        yield f"{path} is a folder, and verl reads files: write {example}"
        return
    matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not matches:
        yield f"there is no file {path}"
    elif not path.endswith(READ_BY_VERL):
        yield f"verl cannot read {path}: it takes files that end in {', '.join(READ_BY_VERL)}"
    for file in matches if path.endswith(READ_BY_VERL) else []:
        parquet = path.endswith(".parquet")
        try:
            wrong = _wrong_with(file, wants, parquet)
        except EntropyForkError as error:
            wrong = str(error)
        except (OSError, ValueError) as error:
            wrong = f"{file} is not a readable {'parquet' if parquet else 'JSON'} file: {error}"
        if wrong:
            yield wrong


def _wrong_with(path: str, wants: _Wants, parquet: bool) -> str | None:
    first: tuple[int, _Bad] | None = None
    number, start = 0, 0
    for length, bad_rows in _parquet_batches(path, wants) if parquet else _json_batches(path, wants):
        for bad in bad_rows:
            first, number = first or (start + bad.row, bad), number + 1
        start += length
    if start == 0:
        return f"{path} has no rows"
    if first is None:
        return None
    row, bad = first
    more = f", and {number - 1} more such rows" if number > 1 else ""
    return f"{path} row {row} (from 0) {bad.says}{more}. {bad.advice}"


def _lacking(path: str, missing: list[str], columns: list[str], wants: _Wants) -> str:
    close = difflib.get_close_matches(wants.prompt, columns, 1) if wants.prompt in missing else []
    return (
        f"{path} lacks the column(s) {', '.join(missing)}; it has {', '.join(sorted(columns))}. verl expects prompt (a "
        f"list of chat messages), data_source, and reward_model with its ground_truth. Another name for the prompt "
        f"column: data.prompt_key={close[0] if close else 'NAME'}. 'entropy-fork data prepare --question COLUMN "
        f"--answer COLUMN --name NAME FILE' makes such a file."
    )


def _json_batches(path: str, wants: _Wants) -> Iterator[tuple[int, list[_Bad]]]:
    """Each row of a JSON file as a batch of one.

    Raises:
        EntropyForkError: a line is not JSON, or no row has a column that is needed.
    """
    seen: dict[str, None] = {}
    for row in json_rows(Path(path)):
        seen.update(dict.fromkeys(row))
        found = _bad_prompt(row.get(wants.prompt), wants.prompt)
        if found is None and wants.truth:
            found = _bad_reward(row.get("reward_model"))
        yield 1, [] if found is None else [found]
    if seen and (missing := [name for name in wants.columns if name not in seen]):
        raise EntropyForkError(_lacking(path, missing, list(seen), wants))


def _parquet_batches(path: str, wants: _Wants) -> Iterator[tuple[int, list[_Bad]]]:
    """The number of rows of each batch of a parquet file, and those that cannot be used.

    Raises:
        EntropyForkError: a column is missing, or holds values of a type that no row can be used with.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path, page_checksum_verification=True)
    schema = file.schema_arrow
    if missing := [name for name in wants.columns if name not in schema.names]:
        raise EntropyForkError(_lacking(path, missing, schema.names, wants))
    if wrong := _wrong_type(schema, wants):
        raise EntropyForkError(f"{path}: {wrong}")
    for batch in file.iter_batches(columns=wants.columns):
        batch.validate(full=True)  # text that is no UTF-8
        try:
            bad = list(_bad_prompts(batch.column(wants.prompt), wants.prompt))
        except pa.ArrowNotImplementedError:  # a type that Arrow's functions do not take
            bad = _one_by_one(batch.column(wants.prompt), lambda value: _bad_prompt(value, wants.prompt))
        if wants.truth:
            known = {each.row for each in bad}
            bad += [each for each in _bad_truths(batch.column("reward_model")) if each.row not in known]
        yield batch.num_rows, sorted(bad)


def _wrong_type(schema: pa.Schema, wants: _Wants) -> str | None:
    """What is wrong with the types of the columns, and so with all rows."""
    import pyarrow as pa

    prompt = schema.field(wants.prompt).type
    if not _is_list(prompt) and not pa.types.is_null(prompt):
        return (
            f"the column {wants.prompt} has the type {prompt}, and verl wants a list of chat messages in each row: "
            f'[{{"role": "user", "content": "…"}}]. \'entropy-fork data prepare --question {wants.prompt} --answer '
            f"COLUMN --name NAME FILE' makes such a file"
        )
    if _is_list(prompt) and pa.types.is_struct(prompt.value_type):
        for name in ("role", "content"):
            if prompt.value_type.get_field_index(name) < 0:
                return f"the messages in the column {wants.prompt} have no '{name}'; write role and content in each one"
    reward = schema.field("reward_model").type
    if wants.truth and pa.types.is_struct(reward) and reward.get_field_index("ground_truth") < 0:
        there = ", ".join(field.name for field in reward.fields) or "no fields"
        return f"the column reward_model has no ground_truth, which {OUR_REWARD} compares with; it has {there}"
    if wants.truth and not pa.types.is_struct(reward) and not pa.types.is_null(reward):
        return f"the column reward_model has the type {reward}; write a mapping with style and ground_truth in each row"
    return None


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    tests = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    return any(test(kind) for test in tests)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _bad_prompts(messages: pa.Array, prompt: str) -> Iterator[_Bad]:
    """The rows of a batch whose prompt cannot be used, by Arrow's functions."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not _is_list(messages.type) or not pa.types.is_struct(messages.type.value_type):
        raise pa.ArrowNotImplementedError(str(messages.type))
    lengths = pc.list_value_length(messages)
    for row in _where(pc.fill_null(pc.equal(lengths, 0), True)):
        yield _Bad(row, f"has no {prompt}", _LEAVE_OUT)
    each, parents = pc.list_flatten(messages), pc.list_parent_indices(messages)
    faulty: set[int] = set()
    for name in ("role", "content"):
        for message in _where(pc.is_null(pc.struct_field(each, name))):
            row = parents[message].as_py()
            if row not in faulty:
                yield _Bad(row, f"has a message without '{name}'", _LEAVE_OUT)
            faulty.add(row)
    content = pc.struct_field(each, "content")
    if _is_text(content.type):
        written = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(content.cast(pa.string())), ""), True)
        with_text = pc.unique(parents.filter(written))
        rows = pa.array(range(len(messages)), parents.type)
        blank = pc.and_(pc.invert(pc.is_in(rows, value_set=with_text)), pc.fill_null(pc.greater(lengths, 0), False))
        for row in _where(blank):
            yield _Bad(row, f"has a {prompt} without any text", _LEAVE_OUT)


def _bad_prompt(value: Any, prompt: str) -> _Bad | None:
    """What is wrong with one prompt, as Python holds it."""
    if value is None or value == []:
        return _Bad(0, f"has no {prompt}", _LEAVE_OUT)
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return _Bad(
            0,
            f"has a {prompt} that is no list of chat messages",
            'Write [{"role": "user", "content": "…"}] in each row, or let \'entropy-fork data prepare --question '
            f"{prompt} --answer COLUMN --name NAME FILE' do it.",
        )
    for message in value:
        for name in ("role", "content"):
            if message.get(name) is None:
                return _Bad(0, f"has a message without '{name}'", _LEAVE_OUT)
    contents = [message["content"] for message in value]
    if all(isinstance(content, str) and not content.strip() for content in contents):
        return _Bad(0, f"has a {prompt} without any text", _LEAVE_OUT)
    return None


def _bad_truths(reward: pa.Array) -> list[_Bad]:
    """The rows of a batch whose ground truth our reward cannot compare with."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_struct(reward.type):
        return [_Bad(row, "has no reward_model.ground_truth", _WRITE_TRUTH) for row in range(len(reward))]
    truth = pc.struct_field(reward, "ground_truth")
    if pa.types.is_dictionary(truth.type):
        truth = truth.dictionary_decode()
    if not _is_text(truth.type):
        return _one_by_one(truth, _bad_truth)
    texts = truth.cast(pa.string())
    faulty = {text: bad for text in pc.unique(texts).to_pylist() if (bad := _bad_truth(text))}
    if not faulty:
        return []
    rows = _where(pc.is_in(texts, value_set=pa.array(list(faulty), pa.string())))
    return [faulty[texts[row].as_py()]._replace(row=row) for row in rows]


def _bad_reward(reward: Any) -> _Bad | None:
    if reward is not None and not isinstance(reward, dict):
        return _Bad(0, "has a reward_model that is no mapping with style and ground_truth", _WRITE_TRUTH)
    return _bad_truth(reward.get("ground_truth") if reward else None)


def _bad_truth(truth: Any) -> _Bad | None:
    fault = fault_of(truth)
    return None if fault is None else _Bad(0, fault.says, _WRITE_TRUTH)


def _one_by_one(column: pa.Array, check: Any) -> list[_Bad]:
    return [bad._replace(row=row) for row, value in enumerate(column.to_pylist()) if (bad := check(value))]


def _where(mask: Any) -> list[int]:
    import pyarrow.compute as pc

    places: list[int] = pc.indices_nonzero(mask).to_pylist()
    return places
