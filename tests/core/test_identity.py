"""The name of a row is the same in every run and layout, and no two rows share one, with any index of the data set."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.hook import NUM_ROWS, Masked, run_hook
from helpers.rows import jagged
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import NonTensorStack, TensorDict

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.core.identity import Identity, row_order, row_seeds
from entropy_fork.core.responses import Responses
from entropy_fork.verl import masking
from entropy_fork.verl.config import EntropyForkConfig
from entropy_fork.verl.queued_batch import QueuedBatch, tq


@dataclass(frozen=True)
class Row:
    """A row of a batch, with what is the same in every run: its group's content and its place in the group."""

    uid: str
    session: int
    output: int
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    index: Any
    is_padding: bool = False


Answer = list[tuple[int, ...]]


@st.composite
def groups(draw: st.DrawFn) -> list[tuple[tuple[int, ...], Any, list[Answer]]]:
    """(prompt, index, answers of one or two outputs), with few prompts, indices and answers, so that most collide."""
    tokens = st.lists(st.integers(0, 2), min_size=1, max_size=2).map(tuple)
    answer = st.lists(tokens, min_size=1, max_size=2)
    index = draw(st.sampled_from([st.just(0), st.integers(0, 2), st.sampled_from(["a", 0, "0"])]))
    one = st.tuples(tokens, index, st.lists(answer, min_size=1, max_size=3))
    some = draw(st.lists(one, min_size=1, max_size=5))
    return some + draw(st.lists(st.sampled_from(some), max_size=2))  # and a few groups that are equal in everything


def batch_of(some: list[tuple[tuple[int, ...], Any, list[Answer]]], run: str) -> list[Row]:
    return [
        Row(f"{run}_{number}", session, output, prompt, response, index)
        for number, (prompt, index, answers) in enumerate(some)
        for session, outputs in enumerate(answers)
        for output, response in enumerate(outputs)
    ]


def padding_rows(number: int, of: Row) -> list[Row]:
    """Padding rows as verl makes them: with a real row's index and a new uid. Here they may even have real tokens."""
    row = replace(of, uid="pad0f", output=0, prompt=(0,), response=(0,), is_padding=True)
    return [replace(row, session=session) for session in range(number)]


def identities_of(
    monkeypatch: pytest.MonkeyPatch, rows: list[Row], with_index: bool = True
) -> tuple[list[Identity], dict[str, int]]:
    """The identities that the trainer's class computes, and the rows that it fetched. No TransferQueue is needed."""
    of_key = {f"{row.uid}_{row.session}_{row.output}": row for row in rows}
    assert len(of_key) == len(rows)
    fetched: dict[str, int] = Counter()

    def get(keys: list[str], select_fields: list[str], **_: Any) -> TensorDict:
        asked = [of_key[key] for key in keys]
        fetched.update({name: len(keys) for name in select_fields})
        fields: dict[str, Any] = {"index": NonTensorStack(*(row.index for row in asked))}
        for name in ("prompts", "responses"):
            values = [torch.tensor(getattr(row, name.removesuffix("s"))) for row in asked]
            fields[name] = torch.nested.as_nested_tensor(values, layout=torch.jagged)
        return TensorDict({name: fields[name] for name in select_fields}, batch_size=len(asked))

    with monkeypatch.context() as patch:
        patch.setattr(tq, "kv_batch_get", get)
        names = ["prompts", "responses", *(["index"] if with_index else [])]
        tags = [{"is_padding": True} if row.is_padding else {} for row in rows]
        batch = SimpleNamespace(keys=list(of_key), tags=tags, partition_id="train", fields=names)
        return QueuedBatch(batch).identities(), fetched


def by_content(rows: list[Row], values: list[Any]) -> dict[tuple, list[Any]]:
    """The values, grouped by the content of their rows: groups that are equal in everything may change places."""
    content: dict[str, tuple] = {}
    for row in sorted(rows, key=lambda row: (row.session, row.output)):
        content[row.uid] = (*content.get(row.uid, ()), (row.session, row.output, row.response))
    found: dict[tuple, list[Any]] = {}
    for row, value in zip(rows, values, strict=True):
        if not row.is_padding:
            found.setdefault((row.prompt, str(row.index), content[row.uid], row.session, row.output), []).append(value)
    return {key: sorted(some) for key, some in found.items()}


@given(groups(), st.booleans(), st.randoms(use_true_random=False), st.integers(0, 3))
@settings(max_examples=300)
def test_draws_and_ties_are_the_same_in_another_run_and_layout(
    some: list, with_index: bool, random: Any, padding: int
) -> None:
    """The other run has other uids, other orders of groups and rows, and padding rows between them."""
    monkeypatch = pytest.MonkeyPatch()
    if not with_index:
        some = [(prompt, None, answers) for prompt, _, answers in some]
    rows = batch_of(some, "first")
    identities, _ = identities_of(monkeypatch, rows, with_index)
    seeds, order = row_seeds(identities, 0, 1), row_order(identities)
    assert len(set(seeds.tolist())) == len(rows), "two rows draw the same"
    assert sorted(order.tolist()) == list(range(len(rows)))

    random.shuffle(some)
    others = batch_of(some, f"{random.random()}")
    others += padding_rows(padding, others[0])
    random.shuffle(others)
    again, _ = identities_of(monkeypatch, others, with_index)
    assert by_content(others, row_seeds(again, 0, 1).tolist()) == by_content(rows, seeds.tolist())
    real = [place for place, row in zip(row_order(again).tolist(), others, strict=True) if not row.is_padding]
    rank = {place: number for number, place in enumerate(sorted(real))}
    places = [rank.get(place) for place in row_order(again).tolist()]
    assert by_content(others, places) == by_content(rows, order.tolist())
    assert sorted(row_order(again).tolist()) == list(range(len(others)))


def test_64_prompts_of_a_data_set_without_index_have_512_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl gives every prompt the index 0 if the data set has none. By index alone there were 8 seeds for all."""
    rows = batch_of([((prompt,), 0, [[(1, 2)]] * 8) for prompt in range(64)], "run")
    identities, fetched = identities_of(monkeypatch, rows)
    assert len(set(row_seeds(identities, 0, 1).tolist())) == 512
    assert fetched == {"index": 512, "prompts": 64}, "one prompt per group, and no answers, for they do not collide"


def test_only_the_answers_of_colliding_groups_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    same = ((7, 7), 0, [[(1,), (2,)], [(3,)]])
    other = ((7, 7), 0, [[(1,), (2,)], [(4,)]])
    rows = batch_of([same, ((8,), 0, [[(1,)]] * 5), other, ((7, 7), 1, [[(1,)]])], "run")
    identities, fetched = identities_of(monkeypatch, rows)
    assert fetched == {"index": 12, "prompts": 4, "responses": 6}
    assert len(set(identities)) == 12


def test_ties_between_rows_follow_the_data_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for of_7, of_3 in (("f0", "a1"), ("00", "zz")):
        rows = [
            Row(of_7, 0, 0, (1,), (1,), 7), Row(of_3, 1, 0, (2,), (1,), 3),
            Row(of_7, 1, 0, (1,), (1,), 7), Row(of_3, 0, 0, (2,), (1,), 3),
        ]  # fmt: skip
        assert row_order(identities_of(monkeypatch, rows)[0]).tolist() == [2, 1, 3, 0]


def test_a_batch_without_prompts_is_refused() -> None:
    batch = SimpleNamespace(keys=["u_0_0"], tags=[{}], partition_id="train", fields=["index"])
    with pytest.raises(EntropyForkError, match=r"no field 'prompts' in .* pid \d+"):
        QueuedBatch(batch).identities()


def seen(
    monkeypatch: pytest.MonkeyPatch, update: int | None = None, **settings: Any
) -> tuple[Responses, dict[str, float]]:
    """The rows that the hook selects from, and its metrics. There are 4 prompts of 4 answers, all with the index 0."""
    kept: list[Responses] = []
    select = masking.choose

    class OfAnUpdate(Masked):
        def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
            if update is not None:
                self.local_trigger_step = update
            return super()._compute_advantage(batch, metrics)

    def selecting(responses: Responses, *arguments: Any) -> Any:
        kept.append(responses)
        return select(responses, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(masking, "choose", selecting)
        keys = [f"{'abcd'[row // 4]}_{row % 4}_0" for row in range(NUM_ROWS)]
        prompts = jagged(torch.arange(NUM_ROWS) // 4, torch.ones(NUM_ROWS, dtype=torch.int64))
        fork_config = EntropyForkConfig(**settings)
        _, metrics = run_hook(
            patch, fork_config=fork_config, trainer_class=OfAnUpdate, keys=keys, fields={"prompts": prompts}
        )
    return kept[0], metrics


def test_the_number_of_distinct_draws_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, metrics = seen(monkeypatch, select="random")
    assert len(set(rows.seeds.tolist())) == NUM_ROWS
    # one row is padding
    assert metrics["entropy_fork/distinct_draws"] == metrics["entropy_fork/responses"] == NUM_ROWS - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "row_seeds", lambda identities, *_: torch.tensor([row.session for row in identities]))
        assert seen(patch, select="random")[1]["entropy_fork/distinct_draws"] == 4, "what the old seeds would have said"
    assert "entropy_fork/distinct_draws" not in seen(monkeypatch)[1]


def test_the_updates_of_one_step_draw_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    """separate_async trains on several batches between two weight syncs, and a prompt may be in two of them."""
    plain, first, second = (seen(monkeypatch, update, select="random")[0].seeds for update in (None, 0, 1))
    assert torch.equal(plain, first)
    assert not set(first.tolist()) & set(second.tolist())
