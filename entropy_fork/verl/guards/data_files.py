"""The data files of a run, looked through before Ray starts.

verl reads a row when its turn comes: one that has no prompt ends the run in some later epoch, one whose length filter
stumbles over it is left out with a traceback in the log, and an answer that has no ground truth to be compared with is
left out of its batch. Only the columns that verl reads are read, a batch of rows at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from entropy_fork.common.errors import EntropyForkError

if TYPE_CHECKING:
    import pyarrow as pa

#: how a reward function of ours is named in ``reward.custom_reward_function.path``
OUR_REWARD = "pkg://entropy_fork.reward"


def reads_with_verl(config: DictConfig) -> bool:
    """Whether verl's own data set class reads the files. What another one wants of them, nobody here knows."""
    return OmegaConf.select(config, "data.custom_cls.path", default=None) is None


def check_data_files(config: DictConfig) -> None:
    """Local parquet files must be there, be readable to the end, and have in every row what a run needs of it.

    Nothing is looked at where a data set class of the user's own reads the files (``data.custom_cls.path``).

    Raises:
        EntropyForkError: with the file, the column or the first such row, and what is wrong with it.
    """
    if not reads_with_verl(config):
        return
    prompt = config.data.get("prompt_key", "prompt")
    has_truth = OmegaConf.select(config, "reward.custom_reward_function.path", default=None) == OUR_REWARD
    for key in ("train_files", "val_files"):
        files: Any = config.data[key]
        for file in files if isinstance(files, (list, ListConfig)) else [files]:
            path = os.path.expanduser(str(file))
            if "://" in path or not path.endswith(".parquet"):
                continue
            if not os.path.exists(path):
                raise EntropyForkError(f"data.{key}: there is no file {path}")
            try:
                wrong = _wrong_with(path, prompt, has_truth)
            except (OSError, ValueError) as error:
                raise EntropyForkError(f"data.{key}: {path} is not a readable parquet file: {error}") from None
            if wrong:
                raise EntropyForkError(f"data.{key}: {path} {wrong}")


def _wrong_with(path: str, prompt: str, has_truth: bool) -> str | None:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path, page_checksum_verification=True)
    columns = file.schema_arrow.names
    needed = sorted({prompt, "data_source", "reward_model"})
    if missing := [name for name in needed if name not in columns]:
        return (
            f"lacks the column(s) {', '.join(missing)}; it has {', '.join(sorted(columns))}. verl expects prompt (a "
            f"list of chat messages), data_source, and reward_model with its ground_truth. Another name for the prompt "
            f"column: data.prompt_key=NAME."
        )
    first_row, wrong, number = 0, "", 0
    for batch in file.iter_batches(columns=needed):
        batch.validate(full=True)  # text that is no UTF-8
        for row, reason in _bad_rows(batch, prompt, has_truth):
            if row == EVERY_ROW:
                return reason
            wrong, number = wrong or f"row {first_row + row} (from 0) {reason}", number + 1
        first_row += batch.num_rows
    more = f", and {number - 1} more such rows" if number > 1 else ""
    return (
        f"{wrong}{more}. Leave it out; 'entropy-fork data prepare' writes files without such rows." if wrong else None
    )


#: the number of the row if all rows of a file are wrong, because its columns have the wrong types
EVERY_ROW = -1


def _bad_rows(batch: pa.RecordBatch, prompt: str, has_truth: bool) -> Iterator[tuple[int, str]]:
    """A row's number in the batch and what is wrong with it. ``EVERY_ROW`` comes with a whole sentence, and alone."""
    import pyarrow as pa
    import pyarrow.compute as pc

    messages = batch.column(prompt)
    if not pa.types.is_list(messages.type) and not pa.types.is_large_list(messages.type):
        yield (
            EVERY_ROW,
            f"has values of type {messages.type} in its column {prompt}, where verl reads a list of chat messages. "
            f"Write each prompt as [{{'role': 'user', 'content': TEXT}}]; 'entropy-fork data prepare' does so.",
        )
        return
    for row in _where(pc.fill_null(pc.equal(pc.list_value_length(messages), 0), True)):
        yield row, f"has no {prompt}"
    each = pc.list_flatten(messages)
    if pa.types.is_struct(each.type):
        parents = pc.list_parent_indices(messages)
        for name in ("role", "content"):
            if each.type.get_field_index(name) < 0:
                yield (
                    EVERY_ROW,
                    f"has chat messages without '{name}' in its column {prompt}. Write each message as "
                    f"{{'role': 'user', 'content': TEXT}}.",
                )
                return
            for message in _where(pc.is_null(pc.struct_field(each, name))):
                yield parents[message].as_py(), f"has a message without '{name}'"
    reward = batch.column("reward_model")
    if has_truth and pa.types.is_struct(reward.type):
        if reward.type.get_field_index("ground_truth") < 0:
            yield (
                EVERY_ROW,
                "has no ground_truth in its column reward_model. Write the right answer of each row there: "
                "{'style': 'rule', 'ground_truth': ANSWER}.",
            )
            return
        truth = pc.struct_field(reward, "ground_truth")
        empty = pc.is_null(truth)
        if pa.types.is_string(truth.type) or pa.types.is_large_string(truth.type):
            empty = pc.or_(empty, pc.fill_null(pc.equal(pc.utf8_trim_whitespace(truth), ""), True))
        for row in _where(empty):
            yield row, "has no reward_model.ground_truth"


def _where(mask: Any) -> list[int]:
    import pyarrow.compute as pc

    places: list[int] = pc.indices_nonzero(mask).to_pylist()
    return places
