"""The advantage hook on batches in verl's layout: in every layout, pools are mini-batches over all ranks."""

from __future__ import annotations

import inspect
import math
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transfer_queue as tq
from helpers.hook import Masked, Stock, run_hook
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.core.responses import Responses, choose, pool_of_responses, weigh_mini_batches
from entropy_fork.core.rule import Rule, Selector
from entropy_fork.core.tally import Pool
from entropy_fork.verl import masking, trainer
from entropy_fork.verl.config import EntropyForkConfig, guarded_name
from entropy_fork.verl.gradient_step import KEPT_TOKENS, ROW_IDENTITY, RULE
from entropy_fork.verl.policy_loss import WEIGHED, weights_written


def make_rows(num_rows: int, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (num_rows,), generator=random).tolist()
    entropies = [(torch.rand(n, generator=random) * 8).round() / 4 for n in lengths]
    masks = [(torch.rand(n, generator=random) < 0.9).long() for n in lengths]
    return entropies, masks


def weights_by_row(
    entropies: list[torch.Tensor], masks: list[torch.Tensor], mini_batch: torch.Tensor, order: torch.Tensor, rule: Rule
) -> tuple[list[torch.Tensor], list[Pool]]:
    lengths = torch.tensor([len(row) for row in entropies])
    rows = Responses(torch.cat(entropies), torch.cat(masks), lengths, order, seeds=order)
    choice = choose(rows, pool_of_responses(rule.pool, mini_batch), rule)
    return list(weigh_mini_batches(rows, choice, mini_batch, rule).split(lengths.tolist())), choice.pools


TOP20 = Selector(0.2)
RULES = st.sampled_from(
    [
        Rule(TOP20),
        Rule(TOP20, pool="batch"),
        Rule(TOP20, pool="response"),
        Rule(TOP20, denominator="all"),
        Rule(TOP20, weight="soft"),
        Rule(Selector(0.8, "bottom")),
        Rule(Selector(0.2, "random")),
        Rule(Selector(0.2, "band", band_from=0.1)),
        Rule(Selector(0.2, ties="threshold")),
    ]
)


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]), RULES)
@settings(max_examples=150)
def test_weights_do_not_depend_on_how_ranks_share_the_mini_batches(
    seed: int, dp_size: int, num_pools: int, rule: Rule
) -> None:
    """The same mini-batches laid out for 1, 2 and 4 ranks, with the rows in another order, and padding rows."""
    rows_per_pool = 8
    entropies, masks = make_rows(rows_per_pool * num_pools, seed)
    pool_of = [row // rows_per_pool for row in range(len(entropies))]
    expected, _ = weights_by_row(entropies, masks, torch.tensor(pool_of), torch.arange(len(entropies)), rule)

    # verl's layout: rank r holds its share of each mini-batch, one after another; 4 padding rows per mini-batch.
    random = np.random.default_rng(seed)
    layout: list[int | None] = []
    shares = []
    for pool in range(num_pools):
        members: list[int | None] = [row for row in range(len(entropies)) if pool_of[row] == pool]
        members += [None] * 4
        random.shuffle(members)  # type: ignore[arg-type]
        shares.append(np.array(members, dtype=object).reshape(dp_size, -1))
    for rank in range(dp_size):
        for share in shares:
            layout.extend(share[rank])
    mini_batch = masking.mini_batch_of_row(len(layout), rows_per_pool + 4, 1, dp_size)
    padded = [torch.tensor([5.0]) if row is None else entropies[row] for row in layout]
    padded_masks = [torch.tensor([0]) if row is None else masks[row] for row in layout]
    order = torch.tensor([10**6 + i if row is None else row for i, row in enumerate(layout)])
    actual, pools = weights_by_row(padded, padded_masks, mini_batch, order, rule)

    for row, weights in zip(layout, actual, strict=True):
        # soft weights are divided by a mean, whose last bits depend on the order of summation
        torch.testing.assert_close(weights, torch.zeros(1) if row is None else expected[row], rtol=1e-6, atol=0)
    if rule != Rule(TOP20):
        return
    for pool, statistics in enumerate(pools):
        tokens = sum(int(masks[row].sum()) for row in range(len(masks)) if pool_of[row] == pool)
        assert statistics.num_tokens == tokens
        assert statistics.num_kept == max(1, math.ceil(tokens / 5))


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_mini_batches_are_those_that_verls_worker_cuts(dp_size: int) -> None:
    """Compared with verl's own iterator over the contiguous part of each rank (engine_workers.py: train_mini_batch)."""
    num_rows, mini_batch_rows = 48, 16
    ours = masking.mini_batch_of_row(num_rows, mini_batch_rows // 2, 2, dp_size)
    for rank in range(dp_size):
        rows = torch.arange(num_rows).chunk(dp_size)[rank]
        part = tu.get_tensordict({"row": rows, "ours": ours[rows]})
        batches = tu.make_iterator(part, mini_batch_size=mini_batch_rows // dp_size, epochs=1, seed=42 + rank)
        for number, batch in enumerate(batches):
            assert batch["ours"].tolist() == [number] * (mini_batch_rows // dp_size)


def test_rows_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(EntropyForkError, match="50 rows cannot be cut into mini-batches of 8 prompts × 2 responses"):
        masking.mini_batch_of_row(50, prompts=8, answers=2, num_ranks=2)


def test_verls_older_trainer_refuses_a_mask() -> None:
    """A program that derives its trainer from it does not run main_ppo's checks."""
    config = OmegaConf.create({"entropy_fork": {"top_ratio": 0.2}})
    with pytest.raises(EntropyForkError, match=r"RayPPOTrainer in .* pid \d+ .*has no token weights.*entropy_fork=off"):
        RayPPOTrainer(config, None, {}, None)
    config.entropy_fork.enabled = False
    with pytest.raises(AttributeError):  # verl's own constructor, which needs a larger config
        RayPPOTrainer(config, None, {}, None)


def test_every_trainer_of_verls_is_masked_whoever_derives_it() -> None:
    """Programs can import the stock classes, so the mask must be in these classes, not in a registry."""
    from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync

    for stock in (PPOTrainerSync, PPOTrainerColocateAsync, PPOTrainerSeparateAsync):

        class Derived(stock):  # type: ignore[misc, valid-type]
            def on_init_end(self) -> None: ...

            def _compute_advantage(self, batch: object, metrics: dict[str, float]) -> object:
                return super()._compute_advantage(batch, metrics)

        order = [kind.__name__ for kind in Derived.__mro__]
        assert order.index("PPOTrainer") < order.index("TokenWeights") < order.index("StockPPOTrainer")
        for name in trainer.EXTENDED:
            first = next(kind for kind in PPOTrainer.__mro__[1:] if name in vars(kind))
            assert first.__module__.startswith("entropy_fork."), name

    for mixin in (trainer.TokenWeights, trainer.WholeCheckpoints, trainer.WatchedWaiting):
        assert mixin.__bases__ == (object,), "a base for the type checker is none at run time"
        ours = {name for name in vars(mixin) if not name.startswith("__")} - set(trainer.EXTENDED)
        # a derived trainer may have an attribute with any other name
        assert all(name.startswith("_entropy_fork_") for name in ours)

    class Asked(Derived):
        def __init__(self) -> None:  # some of verl's tests make a trainer in this way
            self.config = OmegaConf.create({"entropy_fork": {"top_ratio": 7}})

    for method in ("_save_checkpoint", "_load_checkpoint"):
        with pytest.raises(EntropyForkError, match="top_ratio must be in"):
            getattr(Asked(), method)()


def test_verls_methods_stay_verls_for_whoever_looks_at_them() -> None:
    """verl's own tests call them with another ``self``. Programs read their signatures, and replace them."""
    (stock,) = [kind for kind in PPOTrainer.__mro__ if kind.__name__ == "StockPPOTrainer"]
    for name in trainer.EXTENDED:
        method = vars(PPOTrainer)[name]
        assert inspect.signature(method) == inspect.signature(vars(stock)[name])
        assert (method.__module__, method.__qualname__) == (PPOTrainer.__module__, f"PPOTrainer.{name}")
        assert pickle.loads(pickle.dumps(method)) is method
    plain = SimpleNamespace(config=SimpleNamespace(trainer=SimpleNamespace(resume_mode="disable")))
    PPOTrainer._load_checkpoint(plain)  # a self that is no trainer
    assert plain.global_steps == 0

    class Bare(PPOTrainer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.config = plain.config

        def on_sample_end(self) -> None: ...

        def on_step_end(self) -> None: ...

    bare = Bare()
    bare._load_checkpoint()  # a config that is not OmegaConf's
    assert bare.global_steps == 0
    bare.config = OmegaConf.create({"trainer": {"critic_warmup": 0}})
    bare.entropy_fork = bare.token_dump = "a folder"  # the user's own attributes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock, "_compute_advantage", lambda self, batch, metrics: batch)
        assert bare._compute_advantage("batch", {}) == "batch"


def test_verls_trainer_calls_what_is_extended() -> None:
    """Fails if verl changes how it starts or takes a step: then read what verl does now."""
    step = inspect.getsource(PPOTrainer._step_once)
    calls = ("_compute_old_log_prob", "_compute_ref_log_prob", "_compute_advantage", "_update_actor")
    places = [step.index(f"batch = self.{name}(batch, metrics=metrics)") for name in calls]
    assert places == sorted(places)
    assert "self._setup()\n        self.on_init_end()" in inspect.getsource(PPOTrainer.init)
    (stock,) = [kind for kind in PPOTrainer.__mro__ if kind.__name__ == "StockPPOTrainer"]
    assert set(trainer.EXTENDED) <= set(vars(stock))
    assert all(vars(PPOTrainer)[name].__wrapped__ is vars(stock)[name] for name in trainer.EXTENDED)
    assert "self.actor_rollout_wg.init_model()" in inspect.getsource(vars(stock)["_setup"])


def test_a_trainer_whose_advantages_are_its_own_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without verl's advantages there are no weights. Or the actor may get another batch than the weighed one."""
    data, _ = run_hook(monkeypatch)
    assert "rollout_is_weights" in data

    class Theirs(Masked):
        def _compute_advantage(self, batch: object, metrics: dict[str, float]) -> object:
            return batch

    this = Theirs.__new__(Theirs)
    config = OmegaConf.create({"actor_rollout_ref": {"actor": {"shuffle": False}}})
    this._entropy_fork_masking = masking.masking_of(config, EntropyForkConfig())
    batch = SimpleNamespace(keys=["u_0_0"], extra_info={})
    with pytest.raises(EntropyForkError, match=r"Theirs in .* pid \d+.*no token weights.*super\(\)._compute_advantage"):
        this._update_actor(this._compute_advantage(batch, {}), {})


@pytest.mark.parametrize(
    ("node", "shuffle", "made", "written", "sent"),
    [
        ({}, False, masking.SelectOnDriver, {"rollout_is_weights"}, {WEIGHED}),
        ({"pool": "batch"}, False, masking.SelectOnDriver, {"rollout_is_weights"}, {WEIGHED}),
        ({}, True, masking.SelectInWorker, {ROW_IDENTITY}, {WEIGHED, RULE}),
        ({"entropy": "current"}, False, masking.SelectInWorker, {ROW_IDENTITY}, {WEIGHED, RULE}),
        ({"pool": "micro_batch"}, False, masking.SelectInWorker, {ROW_IDENTITY}, {WEIGHED, RULE}),
        (
            {"pool": "batch"},
            True,
            masking.SelectOnDriverWeighInWorker,
            {ROW_IDENTITY, KEPT_TOKENS},
            {WEIGHED, RULE},
        ),
    ],
)
def test_where_a_mask_is_made_and_what_the_workers_are_given(
    monkeypatch: pytest.MonkeyPatch,
    node: dict[str, Any],
    shuffle: bool,
    made: type[masking.Masking],
    written: set[str],
    sent: set[str],
) -> None:
    trainers = []

    class Shuffling(Masked):
        def __init__(self, config: Any):
            config.actor_rollout_ref.actor.shuffle = shuffle
            super().__init__(config)
            trainers.append(self)

    before, _ = run_hook(monkeypatch, trainer_class=Masked)
    fields, metrics = run_hook(monkeypatch, trainer_class=Shuffling, fork_config=EntropyForkConfig(**node))
    how = trainers[0]._entropy_fork_masking
    assert type(how) is made
    assert fields.keys() - (before.keys() - {"rollout_is_weights"}) == written
    flags = how.flags_to_send(step=1)
    assert flags.keys() == sent
    assert flags[WEIGHED] is (made is masking.SelectOnDriver)
    # only the process that selects reports
    assert ("entropy_fork/kept_ratio" in metrics) is (made is not masking.SelectInWorker)
    if how.selected_field is not None:
        eligible = fields["response_mask"].values().bool()
        selected = (fields[how.selected_field].values() != 0)[eligible]
        assert metrics["entropy_fork/kept_ratio"] == int(selected.sum()) / int(eligible.sum())


@pytest.mark.parametrize("importance", [None, 0.5])
def test_a_trainer_that_writes_over_the_weights_stops(
    monkeypatch: pytest.MonkeyPatch, importance: float | None
) -> None:
    """It writes importance weights into the same field: the batch is the right one, but our weights are gone."""
    batches = []

    class Updating(Stock):
        def _update_actor(self, batch: Any, metrics: dict[str, float]) -> Any:
            """Return metrics like those of the guarded loss."""
            fields = tq.kv_batch_get(keys=batch.keys, select_fields=["response_mask", "rollout_is_weights"])
            mask, weights = (fields[name].values()[None] for name in ("response_mask", "rollout_is_weights"))
            with weights_written():
                _, said = get_policy_loss_fn(guarded_name("vanilla"))(
                    old_log_prob=torch.zeros_like(weights),
                    log_prob=torch.zeros_like(weights),
                    advantages=torch.ones_like(weights),
                    response_mask=mask,
                    config=FSDPActorConfig(
                        strategy="fsdp2", rollout_n=1, ppo_mini_batch_size=1, ppo_micro_batch_size_per_gpu=1
                    ),
                    rollout_is_weights=weights,
                )
            metrics.update({f"actor/{name.removeprefix('actor/')}": value for name, value in said.items()})
            return batch

    class Theirs(trainer.TokenWeights, Updating):
        def _compute_advantage(self, batch: Any, metrics: dict[str, float]) -> Any:
            batch = super()._compute_advantage(batch, metrics)
            batch.extra_info = {}
            batches.append((self, batch))
            return batch

    data, _ = run_hook(monkeypatch, trainer_class=Theirs, importance=importance)
    ((this, batch),) = batches
    metrics: dict[str, float] = {}
    this._update_actor(batch, metrics)
    assert metrics["entropy_fork/ppo_kl"] == 0.0
    assert "actor/entropy_fork/loss_dropped" not in metrics
    data["rollout_is_weights"].values().fill_(0.5)
    with pytest.raises(EntropyForkError, match=r"tokens .* weight 0.*trained on all of them.*wrote the field"):
        this._update_actor(batch, {})


def test_a_batch_without_entropies_stops_with_the_name_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the authors' code the mask was silently off for five months."""
    with pytest.raises(EntropyForkError, match=r"no entropies in .* pid \d+"):
        run_hook(monkeypatch, with_entropy=False)
