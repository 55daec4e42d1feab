"""Token weights in verl's own losses: the gradient of a dropped token is 0, that of a kept one has the right factor."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss, get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig, PolicyLossConfig

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.core.rule import SEQ_MEAN_TOKEN_MEAN, TOKEN_MEAN, TOKEN_SUMS, Selector
from entropy_fork.core.selection import select_tokens
from entropy_fork.core.weighting import token_weights
from entropy_fork.verl.config import MASKABLE_LOSSES, guarded_name
from entropy_fork.verl.policy_loss import WEIGHED, _written, kept_means, weighed_by_driver, weights_written

ROWS, WIDTH = 6, 11
MODES = (TOKEN_MEAN, SEQ_MEAN_TOKEN_MEAN, *TOKEN_SUMS)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    mask = torch.rand(ROWS, WIDTH, generator=random) < 0.8
    mask[4] = False  # a row without tokens, as rejection sampling or padding makes it
    entropy = torch.rand(ROWS, WIDTH, generator=random)
    entropy[5] = 0.001  # a response without a kept token
    return {
        "mask": mask,
        "entropy": entropy,
        "advantages": torch.randn(ROWS, WIDTH, generator=random),
        "old_log_prob": -torch.rand(ROWS, WIDTH, generator=random),
        "log_prob": -torch.rand(ROWS, WIDTH, generator=random),
    }


def weights_of(
    batch: dict[str, torch.Tensor], ratio: float, mode: str, denominator: str = "kept", soft: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.full((ROWS,), WIDTH)
    flat_mask = batch["mask"].flatten()
    kept = select_tokens(batch["entropy"].flatten(), flat_mask, lengths, Selector(ratio)).kept
    entropy = batch["entropy"].flatten() if soft else None
    weights = token_weights(kept, flat_mask, lengths, mode, denominator, entropy)
    return weights.view(ROWS, WIDTH), kept.view(ROWS, WIDTH)


@pytest.mark.parametrize("mode", MODES)
def test_everything_kept_weighs_exactly_one(batch: dict[str, torch.Tensor], mode: str) -> None:
    weights, _ = weights_of(batch, 1.0, mode)
    assert torch.equal(weights, batch["mask"].float())


@pytest.mark.parametrize("mode", MODES)
def test_verls_aggregation_becomes_the_mean_over_kept_tokens(batch: dict[str, torch.Tensor], mode: str) -> None:
    weights, kept = weights_of(batch, 0.2, mode)
    loss = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3))
    mask = batch["mask"]
    actual = agg_loss(loss * weights, mask, mode)
    if mode == TOKEN_MEAN:
        expected = loss[kept].mean()
    elif mode == SEQ_MEAN_TOKEN_MEAN:
        rows = [loss[row][kept[row]].mean() if kept[row].any() else torch.tensor(0.0) for row in range(ROWS)]
        expected = torch.stack(rows).sum() / mask.any(dim=1).sum()
    else:
        expected = agg_loss(loss * kept, mask, mode)
    torch.testing.assert_close(actual, expected)


def test_rejected_tokens_stay_in_verls_divisor_with_and_without_a_mask() -> None:
    """verl divides by ``loss_mask``, which rejection does not change. 2 of 5 tokens are left: 0.4 times each mean."""
    loss_mask = torch.ones(1, 5)
    response_mask = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0]])
    loss = torch.tensor([[2.0, 6.0, 9.0, 9.0, 9.0]])
    eligible, lengths = response_mask[0].bool(), torch.tensor([5])

    def masked(kept: list[int], denominator: str) -> float:
        chosen = torch.tensor(kept, dtype=torch.bool)
        weights = token_weights(chosen, eligible, lengths, TOKEN_MEAN, denominator)
        return float(agg_loss(loss * weights, response_mask, TOKEN_MEAN, batch_num_tokens=int(loss_mask.sum())))

    assert masked([1, 0, 0, 0, 0], "kept") == pytest.approx(0.4 * 2.0)  # a mean over the kept token would be 2
    assert masked([1, 0, 0, 0, 0], "all") == pytest.approx(2.0 / 5)
    plain = float(agg_loss(loss, response_mask, TOKEN_MEAN, batch_num_tokens=5))
    assert plain == pytest.approx(0.4 * 4.0)  # verl's own loss: 0.4 times the mean over the remaining tokens
    assert masked([1, 1, 0, 0, 0], "kept") == plain


@pytest.mark.parametrize("mode", MODES)
def test_the_denominator_all_leaves_verls_mean(batch: dict[str, torch.Tensor], mode: str) -> None:
    """The paper's first version, TRL and ms-swift do this: the same mask, a smaller loss."""
    weights, kept = weights_of(batch, 0.2, mode, denominator="all")
    assert torch.equal(weights, kept.float())


@pytest.mark.parametrize("mode", MODES)
def test_soft_weights_are_in_proportion_to_entropy_with_a_mean_of_one(
    batch: dict[str, torch.Tensor], mode: str
) -> None:
    weights, kept = weights_of(batch, 0.5, mode, denominator="all", soft=True)
    assert (weights[~kept] == 0).all()
    assert weights[kept].mean() == pytest.approx(1.0, rel=1e-6)
    ratio = weights[kept] / batch["entropy"][kept]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_soft_weights_of_a_pool_without_entropy_are_one() -> None:
    everything = torch.ones(3, dtype=torch.bool)
    weights = token_weights(everything, everything, torch.tensor([3]), TOKEN_MEAN, "all", torch.zeros(3))
    assert torch.equal(weights, torch.ones(3))


def test_an_unknown_denominator_is_refused() -> None:
    with pytest.raises(ValueError, match="denominator must be one of kept, all, got 'some'"):
        token_weights(torch.ones(1, dtype=torch.bool), torch.ones(1), torch.tensor([1]), TOKEN_MEAN, "some")


def test_a_pool_without_tokens_weighs_zero_never_nan() -> None:
    nothing = torch.zeros(4, dtype=torch.bool)
    for mode in MODES:
        weights = token_weights(nothing, nothing, torch.tensor([4]), mode)
        assert torch.equal(weights, torch.zeros(4))


def test_an_aggregation_that_verl_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown loss_agg_mode 'mean'"):
        token_weights(torch.ones(2, dtype=torch.bool), torch.ones(2), torch.tensor([2]), "mean")


@pytest.mark.parametrize("loss_mode", MASKABLE_LOSSES)
def test_every_loss_that_is_let_through_multiplies_the_weights(batch: dict[str, torch.Tensor], loss_mode: str) -> None:
    weights, kept = weights_of(batch, 0.2, TOKEN_MEAN)
    plain, masked = (gradient(batch, loss_mode, w) for w in (torch.ones_like(weights), weights))
    assert (masked[~kept] == 0).all()
    torch.testing.assert_close(masked, plain * weights, atol=1e-7, rtol=1e-5)
    assert masked[kept].abs().sum() > 0


def test_a_worker_without_weights_stops_with_its_name(batch: dict[str, torch.Tensor]) -> None:
    """The guarded loss does not accept importance weights in the field as our token weights."""
    importance = torch.full_like(batch["log_prob"], 0.5)
    for weights in (None, importance):
        with pytest.raises(EntropyForkError, match=r"no token weights reached the policy loss in .* pid \d+"):
            gradient(batch, guarded_name("vanilla"), weights)
    with weights_written(), pytest.raises(EntropyForkError, match="no token weights"):
        gradient(batch, guarded_name("vanilla"), None)


def test_the_guard_changes_nothing_else(batch: dict[str, torch.Tensor]) -> None:
    weights, _ = weights_of(batch, 0.2, TOKEN_MEAN)
    for name in MASKABLE_LOSSES:
        plain = gradient(batch, name, weights)
        with weights_written():
            assert torch.equal(gradient(batch, guarded_name(name), weights), plain)


def test_each_loss_has_one_guard() -> None:
    ours = [name for name in POLICY_LOSS_REGISTRY if name.startswith("entropy_fork/")]
    assert ours == [guarded_name(name) for name in MASKABLE_LOSSES]
    assert guarded_name(guarded_name("vanilla")) == guarded_name("vanilla")


def test_the_drivers_flag_lets_the_loss_run() -> None:
    """A worker's loss function runs on a micro-batch with the flag, and stops on one without."""

    def loss(data: TensorDict, **_: object) -> bool:
        return _written.get()

    admitted = weighed_by_driver(loss)
    assert not admitted(model_output={}, data=tu.get_tensordict({}, {}))
    assert not admitted(model_output={}, data=tu.get_tensordict({}, {WEIGHED: False}))
    assert admitted(model_output={}, data=tu.get_tensordict({}, {WEIGHED: True}))
    assert not _written.get()


def test_an_update_that_did_not_run_the_guarded_loss_is_noticed() -> None:
    with pytest.raises(EntropyForkError, match=r"did not run the loss that applies it.*set_loss_fn.*entropy_fork=off"):
        kept_means({})


def gradient(batch: dict[str, torch.Tensor], loss_mode: str, weights: torch.Tensor | None) -> torch.Tensor:
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_mini_batch_size=ROWS,
        ppo_micro_batch_size_per_gpu=ROWS,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode, dro_beta=0.1),
    )
    log_prob = batch["log_prob"].clone().requires_grad_()
    torch.manual_seed(0)  # clip_cov clips random tokens
    loss, _ = get_policy_loss_fn(loss_mode)(
        old_log_prob=batch["old_log_prob"],
        log_prob=log_prob,
        advantages=batch["advantages"],
        response_mask=batch["mask"],
        loss_agg_mode="token-mean",
        config=config,
        rollout_is_weights=weights,
    )
    loss.backward()
    assert log_prob.grad is not None
    return log_prob.grad
