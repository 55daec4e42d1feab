"""One batch of verl's in the TransferQueue: fetch its fields, write fields to it, and name its rows.

verl hands its trainer a description of the batch: the keys of the rows and the names of the fields. The values are in
the TransferQueue, in other processes. Each fetch copies them to this process, each :meth:`QueuedBatch.put` copies them
back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor

from entropy_fork.common.errors import EntropyForkError, process_name
from entropy_fork.common.verl_types import BatchDescription
from entropy_fork.core.identity import Identity, RowKey, identify


class FlatField(NamedTuple):
    """One field of all rows of a batch, one row after another.

    Attributes:
        values: any type, shape (num_values,).
        offsets: int64, shape (num_rows + 1,): where each row begins, and where the last one ends.
    """

    values: Tensor
    offsets: Tensor

    @classmethod
    def of_equal_rows(cls, values: Tensor) -> FlatField:
        """A field with the same number of values for each row.

        Args:
            values: any type, shape (num_rows, values_per_row).
        """
        num_rows, per_row = values.shape
        return cls(values.flatten(), torch.arange(0, num_rows * per_row + 1, per_row))

    def at_responses(self, offsets: Tensor) -> FlatField:
        """The part of a field of whole rows, prompt and response, that belongs to the response tokens.

        verl writes a token's value at the position before it (``workers/utils/padding.py: response_from_nested``).

        Args:
            offsets: int64, shape (num_rows + 1,): where each response begins and ends.
        """
        values = self.values.new_empty(int(offsets[-1]))
        ends = zip(offsets[:-1].tolist(), offsets[1:].tolist(), self.offsets[1:].tolist(), strict=True)
        for start, end, end_of_row in ends:  # row by row, because a number per token for its place would take more
            values[start:end] = self.values[end_of_row - 1 - (end - start) : end_of_row - 1]
        return FlatField(values, offsets)


class QueuedBatch:
    """A batch in the TransferQueue.

    Args:
        description: verl's description of the batch.
    """

    def __init__(self, description: BatchDescription):
        self.description = description

    def __len__(self) -> int:
        return len(self.description)

    def __contains__(self, name: str) -> bool:
        """Whether the batch has this field."""
        return name in self.description.fields

    def fetch(self, name: str) -> FlatField | None:
        """One field of all rows; None if the batch does not have it.

        Fetch one field at a time. The TransferQueue needs twice a field's size while it puts the field together. For
        verl's response mask, with eight bytes per token, that is the peak of a selection's memory.

        Args:
            name: the name of a field of tensors.
        """
        if name not in self:
            return None
        field = self._get(self.description.keys, [name]).get(name, None)
        return None if field is None else FlatField(field.values(), field.offsets())

    def fetch_rows(self, names: Sequence[str], rows: Sequence[int] | None = None) -> dict[str, list[Any]]:
        """Some fields of some rows, in one call.

        Args:
            names: the names of fields, of tensors or of other objects. Fields that the batch lacks are left out.
            rows: the places of the rows in the batch; None for all.

        Returns:
            For each field a list with one item per row: a tensor, or the object.
        """
        keys = self.description.keys
        fetched = self._get(keys if rows is None else [keys[row] for row in rows], names)
        columns = {name: fetched.get(name, None) for name in names}
        return {name: _row_by_row(column) for name, column in columns.items() if column is not None}

    def put(self, fields: Mapping[str, FlatField]) -> BatchDescription:
        """Write fields of all rows.

        Returns:
            verl's description of the batch with these fields. Workers fetch the fields that a description names and no
            others, so an older description does not bring them the new fields.
        """
        nested = {name: torch.nested.nested_tensor_from_jagged(*field) for name, field in fields.items()}
        description: BatchDescription = tq.kv_batch_put(
            keys=self.description.keys,
            partition_id=self.description.partition_id,
            fields=TensorDict(nested, batch_size=len(self)),
        )
        return description

    def is_padding(self) -> list[bool]:
        """For each row, whether verl added it to fill up a mini-batch."""
        return [tag.get("is_padding", False) for tag in self.description.tags]

    def identities(self) -> list[Identity]:
        """The name of each row, the same in every run; see ``core/identity.py``.

        Fetches one prompt per group. Fetches answers only of groups that have the same prompt and index.

        Raises:
            EntropyForkError: the batch has no prompts.
        """
        if "prompts" not in self:
            raise EntropyForkError(
                f"the batch has no field 'prompts' in {process_name()}, so draws and ties cannot follow the data. "
                f"verl's agent loops write it; one of your own must write it too."
            )
        keys = self.description.keys
        indices = self.fetch_rows(["index"])["index"] if "index" in self else [""] * len(keys)
        row_keys = []
        for key, index, is_padding in zip(keys, indices, self.is_padding(), strict=True):
            uid, session, output = key.rsplit("_", 2)
            row_keys.append(RowKey(uid, int(session), int(output), str(index), is_padding))
        return identify(row_keys, self._prompts, self._answers)

    def _prompts(self, rows: list[int]) -> Iterable[Tensor]:
        return self.fetch_rows(["prompts"], rows)["prompts"]

    def _answers(self, rows: list[int]) -> Iterable[Tensor]:
        return self.fetch_rows(["responses"], rows)["responses"]

    def _get(self, keys: list[str], names: Sequence[str]) -> Any:
        return tq.kv_batch_get(keys=keys, partition_id=self.description.partition_id, select_fields=list(names))


def _row_by_row(column: Any) -> list[Any]:
    """A field as the TransferQueue returns it: a nested tensor, or a list, array or stack of other objects."""
    if isinstance(column, Tensor) and column.is_nested:
        return list(column.unbind())
    return column.tolist() if hasattr(column, "tolist") else list(column)
