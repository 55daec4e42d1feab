"""The clipped loss with a range per token: verl's ``vanilla`` to the last bit where all ranges are equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.core.factors import clip_bounds
from entropy_fork.core.rule import Rule
from entropy_fork.verl.clip_by_token import clipped_by_token
from entropy_fork.verl.policy_loss import (
    CLIP_HIGHEST,
    CLIP_LOWEST,
    CLIPPED,
    WEIGHED,
    kept_sums,
    weighed_by_driver,
)

ROWS, LENGTH = 5, 12


def actor_config(low: float, high: float, dual: float) -> Any:
    return FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_mini_batch_size=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=low,
        clip_ratio_high=high, clip_ratio_c=dual,
    )  # fmt: skip


def arguments(seed: int, dtype: torch.dtype, low: float, high: float, dual: float) -> dict[str, Any]:
    """Ratios from 1/e to e, many of them next to the ends of the range or exactly on them."""
    random = torch.Generator().manual_seed(seed)

    def numbers(scale: float) -> Tensor:
        return torch.randn(ROWS, LENGTH, generator=random) * scale

    old = -numbers(1.0).abs() - 1
    change = numbers(0.4)
    edges = torch.tensor([1 - low, 1 + high, dual]).log()
    change[:, :6] = edges.repeat(2)[None] + numbers(1e-7)[:, :6]
    mask = torch.rand(ROWS, LENGTH, generator=random) < 0.8
    advantages = numbers(1.0).to(dtype)
    advantages[0] = 0.0
    return {
        "old_log_prob": old.to(dtype),
        "log_prob": (old.to(dtype) + change.to(dtype)).requires_grad_(),
        "advantages": advantages,
        "response_mask": mask,
        "loss_agg_mode": "token-mean",
        "config": actor_config(low, high, dual),
        "rollout_is_weights": (0.5 + torch.rand(ROWS, LENGTH, generator=random)).to(dtype) * mask,
    }


def constant_bounds(low: float, high: float, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """As the driver makes them, padded as the worker gets them."""
    rule = Rule.of(use="clip", map="linear")
    number = ROWS * LENGTH
    lowest, highest = clip_bounds(torch.full((number,), factor), torch.zeros(number), rule, low, high)
    return lowest.view(ROWS, LENGTH), highest.view(ROWS, LENGTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (0.2, 0.2), (0.1, 0.3), (3e-4, 4e-4), (0.5, 1.0)])
@pytest.mark.parametrize("dual", [3.0, 1.1, 10.0])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_equal_ranges_are_vanilla_to_the_last_bit(
    dtype: torch.dtype, low: float, high: float, dual: float, mode: str
) -> None:
    """Loss, gradient and metrics."""
    for seed in range(4):
        ours, theirs = (arguments(seed, dtype, low, high, dual) | {"loss_agg_mode": mode} for _ in range(2))
        loss, metrics = clipped_by_token(**ours, bounds=constant_bounds(low, high))
        expected, expected_metrics = get_policy_loss_fn("vanilla")(**theirs)
        loss.backward()
        expected.backward()
        assert torch.equal(loss, expected)
        assert loss.dtype == expected.dtype
        assert torch.equal(ours["log_prob"].grad, theirs["log_prob"].grad)
        assert metrics == expected_metrics
    assert expected_metrics["actor/pg_clipfrac"] > 0


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.5])
def test_a_factor_for_all_tokens_is_vanilla_with_another_range(factor: float) -> None:
    ours, theirs = (arguments(7, torch.float32, 0.2, 0.28, 3.0) for _ in range(2))
    theirs["config"] = actor_config(0.2 * factor, 0.28 * factor, 3.0)
    loss, metrics = clipped_by_token(**ours, bounds=constant_bounds(0.2, 0.28, factor))
    expected, expected_metrics = get_policy_loss_fn("vanilla")(**theirs)
    assert torch.equal(loss, expected)
    assert metrics == expected_metrics


def restated(arguments: dict[str, Any], lowest: Tensor, highest: Tensor) -> float:
    """The mean over the response tokens, token by token."""
    total, count = 0.0, 0
    for row in range(ROWS):
        for place in range(LENGTH):
            if not arguments["response_mask"][row, place]:
                continue
            count += 1
            psi = float(arguments["advantages"][row, place])
            change = float(arguments["log_prob"].detach()[row, place] - arguments["old_log_prob"][row, place])
            ratio = torch.tensor(change).exp().item()
            within = min(max(ratio, float(lowest[row, place])), float(highest[row, place]))
            gain = min(ratio * psi, within * psi)
            if psi < 0:
                gain = max(gain, arguments["config"].clip_ratio_c * psi)
            total -= gain * float(arguments["rollout_is_weights"][row, place])
    return total / count


@pytest.mark.parametrize("dual", [3.0, 1.1])
def test_each_token_has_its_own_range(dual: float) -> None:
    given = arguments(3, torch.float32, 0.2, 0.28, dual)
    random = torch.Generator().manual_seed(1)
    lowest = 1 - torch.rand(ROWS, LENGTH, generator=random)
    highest = 1 + torch.rand(ROWS, LENGTH, generator=random)
    loss, metrics = clipped_by_token(**given, bounds=(lowest, highest))
    assert float(loss) == pytest.approx(restated(given, lowest, highest), rel=1e-5)
    ratio = (given["log_prob"].detach() - given["old_log_prob"]).exp()
    psi = given["advantages"]
    clipped = ((ratio > highest) & (psi > 0)) | ((ratio < lowest) & (psi < 0))
    mask = given["response_mask"]
    assert metrics["actor/pg_clipfrac"] == pytest.approx(float((clipped & mask).sum() / mask.sum()))
    sums = kept_sums(given["old_log_prob"], given["log_prob"].detach(), psi, mask, given["config"], (lowest, highest))
    assert sums["entropy_fork/loss_clipped"] == int((clipped & mask).sum())
    assert sums["entropy_fork/loss_tokens"] == int(mask.sum())


def test_a_second_clip_that_would_cut_into_the_range_is_refused_as_verl_does() -> None:
    given = arguments(3, torch.float32, 0.2, 0.28, 0.9)
    with pytest.raises(AssertionError, match="clip_ratio_c"):
        get_policy_loss_fn("vanilla")(**given)
    with pytest.raises(EntropyForkError, match=r"clip_ratio_c must be above 1.*got 0\.9"):
        clipped_by_token(**given, bounds=constant_bounds(0.2, 0.28))


# --- the ranges on their way to the loss ------------------------------------------------------------------------------


def batch_of(bounds: tuple[list[Tensor], list[Tensor]] | None, **flags: bool) -> Any:
    mask = torch.nested.as_nested_tensor([torch.ones(3), torch.ones(5)], layout=torch.jagged)
    tensors = {"response_mask": mask}
    if bounds is not None:
        for name, values in zip((CLIP_LOWEST, CLIP_HIGHEST), bounds, strict=True):
            tensors[name] = torch.nested.as_nested_tensor(values, layout=torch.jagged)
    return tu.get_tensordict(tensors, flags)


def test_the_loss_gets_the_ranges_of_its_own_batch_and_no_others() -> None:
    from entropy_fork.verl import policy_loss

    seen: list[Any] = []

    def loss(**_: Any) -> None:
        seen.append(policy_loss._bounds.get())

    wrapped = weighed_by_driver(loss)
    bounds = ([torch.full((3,), 0.8), torch.full((5,), 0.7)], [torch.full((3,), 1.2), torch.full((5,), 1.3)])
    with_range = batch_of(bounds, **{WEIGHED: True, CLIPPED: True})
    wrapped(data=with_range)
    lowest, highest = seen.pop()
    assert lowest.tolist() == [pytest.approx([0.8] * 3 + [0.0] * 2), pytest.approx([0.7] * 5)]
    assert highest.tolist() == [pytest.approx([1.2] * 3 + [0.0] * 2), pytest.approx([1.3] * 5)]
    wrapped(data=batch_of(None, **{WEIGHED: True}))
    wrapped(data=batch_of(bounds, **{WEIGHED: True, CLIPPED: False}))
    assert seen == [None, None]
    assert policy_loss._bounds.get() is None
    for without in (batch_of(None, **{WEIGHED: True, CLIPPED: True}),):
        with pytest.raises(EntropyForkError, match=r"has no clip ranges in .* pid \d+.*so it stops here"):
            wrapped(data=without)
        assert policy_loss._bounds.get() is None
