"""Defects of other programs that train on high-entropy tokens, one test for each, so that they cannot happen here.

The issues are in huggingface/trl (TRL), modelscope/ms-swift, verl-project/verl, the authors' fork of verl, and
haolpku/DataFlex-RL.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.hook import run_hook
from helpers.processes import Processes
from helpers.rows import SELECTORS, TOP20, jagged, make_rows, weights_on_rank, with_padding_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY, PPOTrainer
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.engine.utils import prepare_micro_batches
from verl.workers.utils.losses import ppo_loss

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.core.rule import SEQ_MEAN_TOKEN_MEAN, Rule, Selector
from entropy_fork.core.selection import select_tokens
from entropy_fork.core.weighting import token_weights
from entropy_fork.verl import engine, trainer
from entropy_fork.verl.checks import check_before_training
from entropy_fork.verl.config import MASKED_STRATEGIES
from entropy_fork.verl.gradient_step import ROW_IDENTITY, GradientStep
from entropy_fork.verl.policy_loss import weights_written
from entropy_fork.verl.sparse_head import ENTROPY_OF_MASK


@given(
    seed=st.integers(0, 10_000),
    selector=SELECTORS,
    garbage=st.sampled_from([0.0, 9.0, -1e9, math.inf, -math.inf, math.nan]),
    padding_rows=st.integers(0, 5),
)
@settings(max_examples=200)
def test_padding_entropies_do_not_move_the_threshold(
    seed: int, selector: Selector, garbage: float, padding_rows: int
) -> None:
    """TRL #3709, #3715: padding was in the quantile. In ms-swift padding is NaN, and still counts toward the limit."""
    rows = make_rows(seed, num_rows=6)
    expected = select_tokens(rows.entropy, rows.eligible, rows.lengths, selector, rows.order, rows.seeds)

    masked = replace(rows, entropy=torch.where(rows.eligible.bool(), rows.entropy, garbage))
    padded = with_padding_rows(masked, padding_rows, entropy=garbage)
    actual = select_tokens(padded.entropy, padded.eligible, padded.lengths, selector, padded.order, padded.seeds)
    assert actual.threshold == pytest.approx(expected.threshold, abs=0, nan_ok=True)
    assert (actual.num_tokens, actual.num_kept) == (expected.num_tokens, expected.num_kept)
    num_tokens = rows.entropy.numel()
    assert torch.equal(actual.kept[:num_tokens], expected.kept)
    assert not actual.kept[num_tokens:].any()


@pytest.mark.parametrize("size", [2, 4])
def test_a_threshold_is_not_local_to_a_rank(worlds: dict[int, Processes], size: int) -> None:
    """TRL #3833, and ms-swift today: each rank kept 20% of its own tokens, even if their entropies were low."""
    shares = [make_rows(rank, num_rows=4, eligible=1.0) for rank in range(size)]
    shares = [replace(rows, entropy=rows.entropy + 100 * rank) for rank, rows in enumerate(shares)]
    together = torch.cat([rows.entropy for rows in shares])
    count = math.ceil(together.numel() / 5)
    threshold = float(together.sort(descending=True).values[count - 1])

    answers = worlds[size](weights_on_rank, [(rows, Rule(TOP20)) for rows in shares])
    for rows, (weights, pool) in zip(shares, answers, strict=True):
        kept = torch.cat(weights) > 0
        assert (pool.threshold, pool.num_kept) == (threshold, count)
        assert kept[rows.entropy > threshold].all()
        assert not kept[rows.entropy < threshold].any()
    assert not any(row.any() for row in answers[0][0]), "the rank with the lowest entropies keeps nothing"


@pytest.mark.parametrize("last_rank_is_empty", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_with_other_numbers_of_tokens_or_with_none_do_not_hang(
    worlds: dict[int, Processes], size: int, last_rank_is_empty: bool
) -> None:
    """TRL #3933, #3964: a collective hung on ranks with different counts. #4041: again if a rank had no valid token."""
    shares = [make_rows(rank, num_rows=1 + 3 * rank) for rank in range(size)]
    if last_rank_is_empty:
        shares[-1] = replace(shares[-1], eligible=torch.zeros_like(shares[-1].eligible))
    answers = worlds[size](weights_on_rank, [(share, Rule(TOP20)) for share in shares])
    tokens = sum(int(share.eligible.sum()) for share in shares)
    kept = sum(int((row > 0).sum()) for weights, _ in answers for row in weights)
    assert kept == math.ceil(tokens / 5)
    assert any(row.any() for row in answers[-1][0]) is not last_rank_is_empty


def test_the_entropy_bonus_and_the_kl_term_are_over_all_response_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL #6140: the bonus disagreed with the mask. Here, in verl's own loss, the mask changes only the policy term.

    The bonus and the KL term of a masked run equal those of the plain run: they use every response token, also dropped
    ones, and no padding. The gradients of the two runs differ only in verl's policy term, by the weights.
    """
    masked_batch, _ = run_hook(monkeypatch)
    plain_batch = {name: field for name, field in masked_batch.items() if name != "rollout_is_weights"}
    policy_only = {"entropy_coeff": 0.0, "use_kl_loss": False}
    masked, plain = PpoGradients(masked_batch, "entropy_fork/vanilla"), PpoGradients(plain_batch, "vanilla")
    masked_policy = PpoGradients(masked_batch, "entropy_fork/vanilla", **policy_only)
    plain_policy = PpoGradients(plain_batch, "vanilla", **policy_only)

    response = masked.of_responses(masked_batch["response_mask"].values().bool())
    weights = masked.of_responses(masked_batch["rollout_is_weights"].values())
    dropped = response & (weights == 0)
    assert dropped.sum() > 3 * (weights > 0).sum() > 0

    expected_bonus = torch.where(response, -PpoGradients.ENTROPY_COEFF / response.sum(), 0.0)
    torch.testing.assert_close(masked.by_entropy, expected_bonus)
    assert torch.equal(masked.by_entropy, plain.by_entropy)

    torch.testing.assert_close(masked_policy.by_log_prob, plain_policy.by_log_prob * weights)
    kl = plain.by_log_prob - plain_policy.by_log_prob
    torch.testing.assert_close(masked.by_log_prob - masked_policy.by_log_prob, kl, rtol=1e-4, atol=1e-7)
    assert (kl[dropped] != 0).all()
    assert not masked.by_log_prob[~response].any()
    for name in ("actor/entropy_loss", "kl_loss"):
        assert masked.metrics[name].aggregate() == plain.metrics[name].aggregate() > 0


def test_more_than_2_to_the_24_tokens() -> None:
    """``torch.quantile`` and ``nanquantile`` refuse more than 2^24 elements, and float32 cannot count them."""
    num_tokens = 2**24 + 17
    entropy = torch.rand(num_tokens, generator=torch.Generator().manual_seed(0))
    lengths, everything = torch.tensor([num_tokens]), torch.ones(num_tokens, dtype=torch.bool)
    selection = select_tokens(entropy, everything, lengths, TOP20)
    assert selection.num_tokens == num_tokens
    assert selection.num_kept == int(torch.count_nonzero(selection.kept)) == math.ceil(num_tokens / 5)
    assert entropy[selection.kept].min() == selection.threshold >= entropy[~selection.kept].max()
    assert select_tokens(entropy, everything, lengths, Selector(1.0)).num_kept == num_tokens


def test_many_equal_entropies_do_not_keep_everything() -> None:
    """If 90% of the entropies are equal, ``entropy >= quantile`` keeps all the equal tokens."""
    entropy = torch.cat([torch.zeros(900), torch.linspace(1, 2, 100)])
    selection = select_tokens(entropy, torch.ones(1000), torch.tensor([1000]), TOP20)
    assert selection.kept.sum() == 200
    assert selection.kept[900:].all()
    assert selection.kept[:100].all(), "among equals the earliest positions are taken"


@pytest.mark.parametrize(
    ("option", "where"),
    [
        ("+actor_rollout_ref.actor.entropy_fork.top_ratio=0.2", "actor_rollout_ref.actor.entropy_fork"),
        (
            "+actor_rollout_ref.actor.policy_loss.entropy_fork.seed=2",
            "actor_rollout_ref.actor.policy_loss.entropy_fork",
        ),
        ("+algorithm.entropy_fork.top_ratio=0.2", "algorithm.entropy_fork"),
        ("+trainer.entropy_fork=global", "trainer.entropy_fork"),
        ("+entropy_fork@algorithm.entropy_fork=global", "algorithm.entropy_fork"),
        ("+entropy_fork@trainer=global", "trainer.top_ratio"),
        ("+actor_rollout_ref.actor.policy_loss.top_ratio=0.2", "actor_rollout_ref.actor.policy_loss.top_ratio"),
    ],
)
@pytest.mark.parametrize("also_at_the_root", [False, True])
def test_an_option_under_the_wrong_node_is_refused_and_what_was_kept_is_logged(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, option: str, where: str, also_at_the_root: bool
) -> None:
    """The authors' #14: the option did nothing in that place, and no metric showed it."""
    at_the_root = ["+entropy_fork=global"] if also_at_the_root else []
    with pytest.raises(EntropyForkError, match=rf"'{where}' does nothing.*Write \+entropy_fork=global.*"):
        check_before_training(compose(option, *at_the_root))

    data, metrics = run_hook(monkeypatch)
    kept, tokens = (data["rollout_is_weights"].values() != 0).sum(), data["response_mask"].values().sum()
    assert metrics["entropy_fork/kept_ratio"] == int(kept) / int(tokens)
    assert metrics["entropy_fork/kept_tokens"] == int(kept)


@pytest.mark.parametrize("denominator", ["kept", "all"])
def test_a_response_without_a_kept_token_contributes_zero_not_nan(denominator: str) -> None:
    """Its mean over kept tokens under seq-mean-token-mean was 0/0. This test uses verl's own aggregation."""
    entropy = torch.tensor([[3.0, 1.0, 2.0, 0.5], [0.1, 0.2, 0.1, 0.2], [4.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]])
    lengths = torch.tensor([4, 4, 4])
    kept = select_tokens(entropy.flatten(), mask.flatten(), lengths, Selector(0.3)).kept
    assert kept.view(3, 4).tolist() == [[True, False, True, False], [False] * 4, [True, False, False, False]]

    weights = token_weights(kept, mask.flatten(), lengths, SEQ_MEAN_TOKEN_MEAN, denominator).view(3, 4)
    losses = torch.arange(12.0).view(3, 4).requires_grad_()
    loss = agg_loss(losses * weights, mask, SEQ_MEAN_TOKEN_MEAN)
    loss.backward()
    divisor = 2 if denominator == "kept" else 4
    assert loss.item() == pytest.approx(((0 + 2) / divisor + 0 + 8 / 1) / 3)
    expected = torch.tensor([[1 / divisor, 0, 1 / divisor, 0], [0, 0, 0, 0], [1, 0, 0, 0]]) / 3
    torch.testing.assert_close(losses.grad, expected)


def test_a_double_registration_masks_once() -> None:
    """If a mask were applied twice, the factor of ``denominator=kept`` would be squared."""
    order = PPOTrainer.__mro__
    for _ in range(2):
        trainer.install()
        engine.install()
    assert PPOTrainer.__mro__ == order
    for masked, mixin in [(trainer_class, trainer.TokenWeights) for trainer_class in TRAINER_REGISTRY.values()] + [
        (found, engine.ForkingTokens) for name in MASKED_STRATEGIES if (found := engine._engine_of(name)) is not None
    ]:
        assert masked.__mro__.count(mixin) == 1


@pytest.mark.parametrize("entropy", ["old", "current"])
def test_the_micro_batch_size_does_not_change_the_selection(entropy: str) -> None:
    """verl #7829, with verl's own micro-batches. With ``pool=micro_batch`` the selection does change."""
    cuts: list[dict[str, Any]] = [{"use_dynamic_bsz": False, "micro_batch_size_per_gpu": rows} for rows in (12, 1, 4)]
    cuts += [{"use_dynamic_bsz": True, "max_token_len_per_gpu": tokens} for tokens in (30, 80)]
    whole, *others = [weights_in_worker(Rule(TOP20, entropy), cut) for cut in cuts]
    assert all(torch.equal(weights, whole) for weights in others)
    tokens = int(make_rows(seed=7, num_rows=12).eligible.sum())
    assert torch.count_nonzero(whole) == math.ceil(tokens / 5)
    of_micro_batches = [weights_in_worker(Rule(TOP20, entropy, pool="micro_batch"), cut) for cut in cuts]
    assert torch.equal(of_micro_batches[0], whole)
    assert not any(torch.equal(weights, whole) for weights in of_micro_batches[1:])


@pytest.mark.parametrize("selected", ["on the driver", "before the gradient step", "in the loss"])
def test_existing_importance_weights_are_multiplied(monkeypatch: pytest.MonkeyPatch, selected: str) -> None:
    """DataFlex-RL: overwriting ``rollout_is_weights`` dropped the importance-sampling correction."""
    if selected == "on the driver":
        weights, without = (
            run_hook(monkeypatch, importance)[0]["rollout_is_weights"].values() for importance in (0.5, None)
        )
    else:
        rule = Rule(TOP20, "current", "mini_batch" if selected == "before the gradient step" else "micro_batch")
        cut = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 4}
        weights, without = (weights_in_worker(rule, cut, importance) for importance in (0.5, None))
    assert torch.equal(weights, without * 0.5)
    assert without.any()


class PpoGradients:
    """verl's ``ppo_loss`` on a batch, called as by its engines, with an entropy bonus and a KL term; and its gradients.

    Attributes:
        by_log_prob, by_entropy: float, shape (num_tokens,): prompts and responses, one row after another.
    """

    ENTROPY_COEFF = 0.01

    def __init__(self, batch: dict[str, Tensor], loss_mode: str, **actor: Any):
        random = torch.Generator().manual_seed(1)
        self._lengths = lengths = batch["response_mask"].offsets().diff()
        num_rows, num_tokens = lengths.numel(), int(lengths.sum())
        log_prob, entropy = (
            (scale * torch.rand(num_tokens + 2 * num_rows, generator=random)).requires_grad_() for scale in (-1, 3)
        )
        tensors = {
            **batch,
            "prompts": jagged(torch.zeros(2 * num_rows), torch.full_like(lengths, 2)),
            "responses": jagged(torch.zeros(num_tokens), lengths),
            "old_log_probs": jagged(-torch.rand(num_tokens, generator=random), lengths),
            "ref_log_prob": jagged(-torch.rand(num_tokens, generator=random), lengths),
        }
        eligible = int(batch["response_mask"].values().sum())
        sizes = {"dp_size": 1, "batch_num_tokens": eligible, "global_batch_size": num_rows}
        config = FSDPActorConfig(
            **{
                "strategy": "fsdp2",
                "rollout_n": 1,
                "ppo_mini_batch_size": num_rows,
                "ppo_micro_batch_size_per_gpu": num_rows,
                "policy_loss": PolicyLossConfig(loss_mode=loss_mode),
                "entropy_coeff": self.ENTROPY_COEFF,
                "use_kl_loss": True,
                "kl_loss_coef": 0.1,
                "kl_loss_type": "low_var_kl",
                **actor,
            }
        )
        model_output = {"log_probs": log_prob, "entropy": entropy}
        with weights_written():
            loss, self.metrics = ppo_loss(config, model_output, tu.get_tensordict(tensors, sizes))
        loss.backward()
        assert log_prob.grad is not None
        assert entropy.grad is not None
        self.by_log_prob, self.by_entropy = log_prob.grad, entropy.grad

    def of_responses(self, values: Tensor) -> Tensor:
        """The values of the response tokens at the positions that predict them, one earlier; 0 at other positions."""
        rows = values.split(self._lengths.tolist())
        return torch.cat([torch.cat([row.new_zeros(1), row, row.new_zeros(1)]) for row in rows])


def weights_in_worker(rule: Rule, cut: dict[str, Any], importance: float | None = None) -> Tensor:
    """The weights that verl's loss gets in one gradient step on one rank, flat, in the order of the rows.

    The current policy's entropy of a token is a function of its input id. Micro-batches are verl's own.
    """
    rows = make_rows(seed=7, num_rows=12)
    # The logits of a token are at the position before it: those of a response start at its one prompt token.
    table = torch.cat([torch.cat([row, row.new_zeros(1)]) for row in rows.entropy.split(rows.lengths.tolist())])
    tensors = {
        "input_ids": jagged(torch.arange(table.numel()), rows.lengths + 1),
        "response_mask": jagged(rows.eligible, rows.lengths),
        "advantages": jagged(torch.ones_like(rows.entropy), rows.lengths),
        "entropy": jagged(rows.entropy, rows.lengths),
        ROW_IDENTITY: jagged(torch.stack([rows.order, rows.seeds], dim=1).flatten(), torch.full_like(rows.lengths, 2)),
    }
    if importance is not None:
        tensors["rollout_is_weights"] = jagged(torch.full_like(rows.entropy, importance), rows.lengths)

    def model_output(data: Any, name: str) -> dict[str, Tensor]:
        ids = data["input_ids"]
        return {name: jagged(table[ids.values()], ids.offsets().diff())}

    this_engine = SimpleNamespace(
        get_data_parallel_group=lambda: None,
        ulysses_sequence_parallel_size=1,
        infer_batch=lambda data: {"model_output": model_output(data, "entropy")},
        module=torch.nn.Identity(),
        mode="train",
        eval_mode=lambda **_: contextlib.nullcontext(),
    )
    by_row: dict[int, Tensor] = {}

    def loss(model_output: Any, data: Any, dp_group: Any) -> None:
        members = data[ROW_IDENTITY].values().view(-1, 2)[:, 0].tolist()
        by_row.update(zip(members, data["rollout_is_weights"].unbind(), strict=True))

    data = tu.get_tensordict(tensors, {"sp_size": 1, **cut})
    step = GradientStep(this_engine, data, rule, loss)
    micro_batches, _ = prepare_micro_batches(data)
    for micro_batch in micro_batches:
        step.loss(model_output(micro_batch, ENTROPY_OF_MASK), micro_batch)
    return torch.cat([by_row[int(order)] for order in rows.order])
