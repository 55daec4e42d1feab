"""Name each row of a batch: the same name in every run, on any number of ranks and at any place in the batch.

Random draws and ties between rows need such a name. verl's own name, ``{uid}_{session}_{output}``, differs from run to
run, because the uid is random. The data set's index is not enough: it is 0 if the data set has none, two files may both
count from 0, and a prompt may be drawn twice. So the name, an :class:`Identity`, consists of the data set's index, a
hash of the prompt's tokens, a number if this prompt is in the batch more than once, the session and the output.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_fork.core.randomness import seed_of

#: takes the places of some rows in the batch; returns the token ids of each, one int tensor of shape (num_tokens,)
TokensOf = Callable[[list[int]], Iterable[Tensor]]


class RowKey(NamedTuple):
    """What verl says about a row.

    Attributes:
        group: the name of the drawn prompt, shared by all answers to it. It is random in each run.
        session: the number of the answer in its group.
        output: the number of the row in its answer: an agent may return several rows.
        data_index: the data set's index as text, the same for all rows of a group; empty if there is none.
        is_padding: whether verl added the row only to fill up a mini-batch.
    """

    group: str
    session: int
    output: int
    data_index: str = ""
    is_padding: bool = False


class Identity(NamedTuple):
    """The name of a row; no two rows of a batch have the same. It sorts by the data set's index first.

    Attributes:
        data_index: as in :class:`RowKey`.
        prompt: a hash of the prompt's token ids; for a padding row the word ``padding``.
        occurrence: 0 for the first group in the batch with this prompt and index, 1 for the second, and so on.
        session: as in :class:`RowKey`.
        output: as in :class:`RowKey`.
    """

    data_index: str
    prompt: str
    occurrence: int
    session: int
    output: int


def identify(keys: Sequence[RowKey], prompts: TokensOf, answers: TokensOf) -> list[Identity]:
    """The identity of each row of a batch.

    Groups with the same prompt and index are sorted by their answers, and numbered: occurrence 0, 1, … Groups with
    equal answers too are interchangeable, so their order in the batch decides. Padding rows are in no group, so they
    do not change the identity of any other row.

    Args:
        keys: one per row; distinct in (group, session, output).
        prompts: called once, with one row of each group.
        answers: called at most once, with all rows of the groups that share prompt and index with another group.

    Returns:
        One identity per row, in the order of ``keys``.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for row in sorted(range(len(keys)), key=lambda row: (keys[row].session, keys[row].output)):
        if not keys[row].is_padding:
            groups[keys[row].group].append(row)

    first_rows = [rows[0] for rows in groups.values()]
    prompt_of = dict(zip(groups, map(_hash, prompts(first_rows) if first_rows else []), strict=True))
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for group, row in zip(groups, first_rows, strict=True):
        alike[keys[row].data_index, prompt_of[group]].append(group)

    contested = [row for some in alike.values() if len(some) > 1 for group in some for row in groups[group]]
    answer_of = dict(zip(contested, map(_hash, answers(contested) if contested else []), strict=True))
    occurrence = {}
    for some in alike.values():
        if len(some) > 1:
            some.sort(key=lambda group: [(*keys[row][1:3], answer_of[row]) for row in groups[group]])
        occurrence.update({group: number for number, group in enumerate(some)})
    return [
        Identity("", "padding", 0, number, 0)
        if key.is_padding
        else Identity(key.data_index, prompt_of[key.group], occurrence[key.group], key.session, key.output)
        for number, key in enumerate(keys)
    ]


def row_order(identities: Sequence[Identity]) -> Tensor:
    """The rank of each row's identity, int64, shape (num_rows,). It decides between tokens of equal score."""
    order = torch.empty(len(identities), dtype=torch.int64)
    order[sorted(range(len(identities)), key=identities.__getitem__)] = torch.arange(len(identities))
    return order


def row_seeds(identities: Sequence[Identity], *when: int) -> Tensor:
    """A seed for each row's draws, int64, shape (num_rows,).

    Args:
        identities: one per row.
        when: the run's seed, and numbers that no other selection of the run has, such as the step.
    """
    return torch.tensor([seed_of(*when, *identity) for identity in identities], dtype=torch.int64)


def _hash(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().astype("<i8", copy=False).tobytes()).hexdigest()
