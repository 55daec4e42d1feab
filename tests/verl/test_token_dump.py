"""``entropy_fork.dump_every``: what the hook writes in a step, with a batch in memory in verl's layout."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.rows import jagged, make_rows
from omegaconf import OmegaConf

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.tokens.store import parts, read_answers, read_manifest
from entropy_fork.verl import token_dump, trainer
from entropy_fork.verl.config import EntropyForkConfig
from entropy_fork.verl.queued_batch import tq

NUM_ROWS, MINI_BATCH_ROWS = 16, 8


class Tokenizer:
    """A tokenizer with what a dump needs: words by number."""

    eos_token_id = 7
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"w{number}" for number in ids]

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f"w{number}" for number in ids)


class Stock:
    """The part of verl's trainer that a masked trainer needs."""

    def __init__(self, config: Any):
        self.config = config
        self.tokenizer = Tokenizer()
        self.actor_rollout_wg = SimpleNamespace(_query_dispatch_info=lambda name: [0], workers=[])
        self.local_trigger_step = 0

    def _setup(self) -> None:
        return

    def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
        return batch


class Masked(trainer.TokenWeights, Stock): ...


class Batch(SimpleNamespace):
    def __len__(self) -> int:
        return NUM_ROWS


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that takes one step. From (step, config node) it returns the batch's fields as workers get them."""

    def take(
        number: int, masked: Any = None, layout: list[int] | None = None, more: Any = None, **node: Any
    ) -> dict[str, Any]:
        this = masked or make(**node)
        rows = make_rows(seed=number, num_rows=NUM_ROWS, eligible=0.9)
        lengths = rows.lengths.tolist()
        random = torch.Generator().manual_seed(number)
        total = int(rows.lengths.sum())
        data: dict[str, Any] = {
            "prompts": jagged(torch.arange(NUM_ROWS * 2), torch.full((NUM_ROWS,), 2)),
            "responses": jagged(torch.randint(0, 50, (total,), generator=random), rows.lengths),
            "response_mask": jagged(rows.eligible, rows.lengths),
            "advantages": jagged(torch.ones(total), rows.lengths),
            "entropy": jagged(rows.entropy, rows.lengths),
            "old_log_probs": jagged(-torch.rand(total, generator=random), rows.lengths),
            "rm_scores": jagged(torch.ones(total) / rows.lengths.repeat_interleave(rows.lengths), rows.lengths),
            "reward_model": [{"ground_truth": f"{row}"} for row in range(NUM_ROWS)],
            "data_source": ["unit"] * NUM_ROWS,
            "index": np.array([row // 2 for row in range(NUM_ROWS)], dtype=object),
        }
        data |= more(rows.lengths, random) if more else {}
        asked_for: list[str] = []
        keys = [f"u{row // 2}_{row % 2}_0" for row in range(NUM_ROWS)]
        tags = [{"is_padding": row == 4} for row in range(NUM_ROWS)]
        if layout is not None:  # as in another run: other uids, and the rows in another order
            data = {name: pick(value, layout) for name, value in data.items()} | {"index": np.zeros(NUM_ROWS, int)}
            keys = [f"u{layout.index(row // 2 * 2)}_{row % 2}_0" for row in layout]
            tags = [tags[row] for row in layout]

        def get(keys: list[str], select_fields: list[str], **_: Any) -> dict[str, Any]:
            asked_for.extend(select_fields)
            asked = [batch.keys.index(key) for key in keys]
            found = {name: data[name] for name in select_fields if name in data}
            return {name: pick(value, asked) for name, value in found.items()}

        def put(fields: Any, **_: Any) -> Batch:
            data.update({name: jagged(field.values(), field.offsets().diff()) for name, field in fields.items()})
            return batch

        batch = Batch(keys=keys, tags=tags, partition_id="train", fields=list(data))
        monkeypatch.setattr(tq, "kv_batch_get", get)
        monkeypatch.setattr(tq, "kv_batch_put", put)
        this.global_steps = number
        this._compute_advantage(batch, {})
        return {**data, "lengths": lengths, "trainer": this, "asked_for": asked_for}

    def pick(value: Any, rows: list[int]) -> Any:
        if isinstance(value, torch.Tensor):
            return jagged(torch.cat([value.unbind()[row] for row in rows]), value.offsets().diff()[rows])
        return value[rows] if isinstance(value, np.ndarray) else [value[row] for row in rows]

    def make(shuffle: bool = False, **node: Any) -> Any:
        monkeypatch.setattr(trainer, "check_maskable", lambda *_: None)
        actor = {
            "strategy": "fsdp2", "use_kl_loss": False, "entropy_coeff": 0, "calculate_entropy": False,
            "ppo_mini_batch_size": MINI_BATCH_ROWS, "loss_agg_mode": "token-mean", "shuffle": shuffle,
            "policy_loss": {"loss_mode": "vanilla"},
        }  # fmt: skip
        rollout = {"n": 1, "temperature": 1.0}
        config = {
            "actor_rollout_ref": {"model": {"path": "tiny"}, "actor": actor, "rollout": rollout},
            "data": {"max_response_length": 24},
            "trainer": {"critic_warmup": 0, "default_local_dir": str(tmp_path / "run")},
            "entropy_fork": {"dump_answers": 3, **node},
        }
        masked = Masked(OmegaConf.create(config))
        monkeypatch.setattr(trainer.ray, "get", lambda _: None)
        masked._setup()
        return masked

    return take


def test_what_is_dumped_is_what_the_workers_will_be_given(step: Any, tmp_path: Path) -> None:
    seen = step(2, dump_every=2)
    answers = list(read_answers(tmp_path / "run" / "tokens"))
    # the first answer of each prompt before the second of any; row 4, the first of prompt 2, is padding
    assert [answer.ground_truth for answer in answers] == ["0", "2", "6"]
    for answer, row in zip(answers, (0, 2, 6), strict=True):
        ours = seen["response_mask"].unbind()[row].bool()
        weights = seen["rollout_is_weights"].unbind()[row]
        for actual, field in (
            (answer.token_ids, "responses"),
            (answer.entropy, "entropy"),
            (answer.log_prob, "old_log_probs"),
        ):
            np.testing.assert_array_equal(actual, seen[field].unbind()[row][ours].numpy())
        np.testing.assert_array_equal(answer.selected, weights[ours].numpy() > 0)
        assert answer.step == 2
        assert answer.score == pytest.approx(1.0)
        assert answer.pieces == [f"w{number}" for number in answer.token_ids]
        assert answer.prompt == f"w{2 * row}w{2 * row + 1}"
        assert answer.prompt_ids is not None
        assert answer.rank is None
    assert len({answer.answer for answer in answers}) == 3
    assert 0 < sum(answer.selected.sum() for answer in answers) < sum(len(answer.selected) for answer in answers)
    manifest = read_manifest(tmp_path / "run" / "tokens")
    assert (manifest["source"], manifest["top_ratio"], manifest["temperature"]) == ("training", 0.2, 1.0)


def of_scores(lengths: torch.Tensor, random: torch.Generator) -> dict[str, Any]:
    """Fields of a run with a reference policy, checked rollouts and Σπ²; verl writes the last one for whole rows."""
    total = int(lengths.sum())
    return {
        "advantages": jagged(torch.randn(total, generator=random), lengths),
        "ref_log_prob": jagged(-torch.rand(total, generator=random), lengths),
        "rollout_log_probs": jagged(-torch.rand(total, generator=random), lengths),
        "sum_pi_squared": jagged(
            torch.rand(total + 2 * len(lengths), generator=random), lengths + 2
        ),  # 2 of the prompt
    }


def test_what_other_scores_read_is_dumped_where_the_batch_has_it(step: Any, tmp_path: Path) -> None:
    seen = step(2, more=of_scores, dump_every=1)
    for answer, row in zip(read_answers(tmp_path / "run" / "tokens"), (0, 2, 6), strict=True):
        ours = seen["response_mask"].unbind()[row].bool()
        for column, field in (
            ("advantage", "advantages"),
            ("ref_log_prob", "ref_log_prob"),
            ("rollout_log_prob", "rollout_log_probs"),
        ):
            np.testing.assert_array_equal(getattr(answer, column), seen[field].unbind()[row][ours].numpy())
        # the value of a token is at the position before it: that of the first one at the prompt's last token
        whole_row = seen["sum_pi_squared"].unbind()[row]
        np.testing.assert_array_equal(answer.sum_pi_squared, whole_row[1 : len(ours) + 1][ours].numpy())

    seen = step(1, dump_every=1, dump_dir=str(tmp_path / "plain"))
    plain = list(read_answers(tmp_path / "plain"))
    assert all(answer.advantage is not None and (answer.advantage == 1).all() for answer in plain)
    missing = ("ref_log_prob", "rollout_log_prob", "sum_pi_squared")
    assert all(getattr(answer, column) is None for answer in plain for column in missing)
    assert not {"ref_log_prob", "rollout_log_probs", "sum_pi_squared"} & set(seen["asked_for"])


def test_a_field_without_a_value_for_each_token_is_left_out(step: Any, tmp_path: Path) -> None:
    step(
        1,
        more=lambda lengths, _: {"rollout_log_probs": jagged(torch.zeros(int(lengths.sum()) + NUM_ROWS), lengths + 1)},
        dump_every=1,
    )
    assert all(answer.rollout_log_prob is None for answer in read_answers(tmp_path / "run" / "tokens"))


def test_the_manifest_names_the_score_and_what_it_is_used_for(step: Any, tmp_path: Path) -> None:
    keys = ("score", "where", "use", "control", "select")
    for name, node, expected in (
        ("plain", {}, ["entropy", "", "mask", "none", "top"]),
        (
            "rsi",
            {"score": "rsi", "where": "advantage > 0", "control": "matched_random"},
            ["rsi", "advantage > 0", "mask", "matched_random", "top"],
        ),
        ("weight", {"score": "surprisal", "use": "weight"}, ["surprisal", "", "weight", "none", "top"]),
        ("off", {"score": "rsi", "enabled": False}, [None, None, None, None, "all"]),
    ):
        step(1, dump_every=1, dump_dir=str(tmp_path / name), **node)
        manifest = read_manifest(tmp_path / name)
        assert [manifest[key] for key in keys] == expected, name


def test_the_same_answers_in_the_same_order_in_every_run(step: Any, tmp_path: Path) -> None:
    """verl's random uids and the layout make no difference, also if every prompt has the same index."""
    dumped = []
    for run, layout in enumerate((range(NUM_ROWS), range(NUM_ROWS - 1, -1, -1), [*range(6, NUM_ROWS), *range(6)])):
        step(1, layout=list(layout), dump_every=1, dump_dir=str(tmp_path / str(run)))
        dumped.append([answer.ground_truth for answer in read_answers(tmp_path / str(run))])
    assert len(set(dumped[0])) == 3
    assert dumped == dumped[:1] * 3


def test_every_second_step_and_nothing_where_it_is_off(step: Any, tmp_path: Path) -> None:
    masked = step(1, dump_every=2)["trainer"]
    for number in (2, 3, 4):
        step(number, masked)
    assert parts(tmp_path / "run" / "tokens") == [2, 4]
    assert step(1, dump_every=0)["trainer"]._entropy_fork_dump is None
    masked.local_trigger_step = 1  # a later update of the same step
    step(6, masked)
    assert parts(tmp_path / "run" / "tokens") == [2, 4]


def test_a_run_that_goes_on_from_a_checkpoint_has_each_step_once(step: Any, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    masked = step(1, dump_every=1, dump_dir=str(folder))["trainer"]
    for number in (2, 3, 4):
        step(number, masked)
    step(3, dump_every=1, dump_dir=str(folder))  # resumed from the checkpoint of step 2, in a new process
    assert parts(folder) == [1, 2, 3]
    assert sorted({answer.step for answer in read_answers(folder)}) == [1, 2, 3]
    assert not (tmp_path / "run").exists()


def test_a_baseline_dumps_all_tokens_as_selected(step: Any, tmp_path: Path) -> None:
    seen = step(1, dump_every=1, enabled=False)
    assert "rollout_is_weights" not in seen
    answers = list(read_answers(tmp_path / "run" / "tokens"))
    assert len(answers) == 3
    assert all(answer.selected is not None and answer.selected.all() for answer in answers)


def test_what_the_workers_select_is_not_made_up(step: Any, tmp_path: Path) -> None:
    step(1, dump_every=1, entropy="current")
    assert all(answer.selected is None for answer in read_answers(tmp_path / "run" / "tokens"))
    step(1, dump_every=1, pool="batch", shuffle=True, dump_dir=str(tmp_path / "batch"))
    (first, *_) = read_answers(tmp_path / "batch")
    assert first.selected is not None


def test_a_folder_that_cannot_be_written_stops_the_run_and_a_full_disk_does_not(
    step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EntropyForkError, match=r"dump_every=1 asks for tokens in .*entropy_fork.dump_dir=FOLDER"):
        step(1, dump_every=1, dump_dir=str(tmp_path / "file" / "below"))

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(token_dump, "write_part", full)
    assert "rollout_is_weights" in step(1, dump_every=1)
    assert "the tokens of step 1 could not be dumped: No space left on device" in capsys.readouterr().out


def test_a_batch_without_entropies_is_an_error(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    masked = step(2, dump_every=1, enabled=False)["trainer"]
    one = jagged(torch.ones(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    data = {"prompts": one, "response_mask": one}
    monkeypatch.setattr(tq, "kv_batch_get", lambda select_fields, **_: {n: data[n] for n in select_fields if n in data})
    batch = Batch(keys=["u_0_0"], tags=[{}], partition_id="train", fields=list(data))
    with pytest.raises(EntropyForkError, match=r"no entropies in .*dump_every=0 trains without"):
        masked._entropy_fork_dump.write(batch, 3, Tokenizer())


def test_the_defaults_dump_nothing() -> None:
    assert EntropyForkConfig().dump_every == 0


@pytest.mark.parametrize("use", ["weight", "advantage"])
def test_the_dump_says_which_tokens_were_treated_if_all_are_trained_on(step: Any, tmp_path: Path, use: str) -> None:
    step(1, dump_every=1, dump_answers=NUM_ROWS, use=use, pool="response", top_ratio=0.2)
    for answer in read_answers(tmp_path / "run" / "tokens"):
        assert answer.selected is not None
        assert int(answer.selected.sum()) == -(-len(answer.entropy) // 5)
        assert answer.entropy[answer.selected].min() >= answer.entropy[~answer.selected].max(initial=0.0)
