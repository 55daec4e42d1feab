"""The six forms of Ψ_t, compared with slow literal sums, known identities, and an exactly solved problem."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from verl.trainer.ppo.core_algos import compute_gae_advantage_return
from verl.utils.torch_functional import masked_whiten

from entropy_fork.core import returns

GAMMAS = st.sampled_from([1.0, 0.99, 0.5, 0.0])
LAMBDAS = st.sampled_from([1.0, 0.95, 0.3, 0.0])


@st.composite
def trajectories(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Random rewards (several per row, also between and after actions), values, and a mask with holes and ends."""
    rows, length = draw(st.integers(1, 5)), draw(st.integers(1, 17))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = (torch.rand(rows, length, generator=random) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))).long()
    rewards = torch.randn(rows, length, generator=random, dtype=torch.float64)
    rewards *= torch.rand(rows, length, generator=random) < 0.4
    values = torch.randn(rows, length, generator=random, dtype=torch.float64)
    return rewards, values, mask


def literal(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> dict[str, Tensor]:
    """Every form, action by action, exactly as it is defined."""
    names = ("total_return", "reward_to_go", "q_value", "td_residual", "gae")
    out = {name: torch.zeros_like(rewards) for name in names}
    for row in range(len(rewards)):
        places = [t for t in range(mask.shape[1]) if mask[row, t]]
        if not places:
            continue
        ends = [*places[1:], mask.shape[1]]
        starts = [0, *places[1:]]  # a reward before the first action belongs to the first action
        r = [float(rewards[row, start:end].sum()) for start, end in zip(starts, ends, strict=True)]
        v = [float(values[row, place]) for place in places] + [0.0]
        delta = [r[k] + gamma * v[k + 1] - v[k] for k in range(len(r))]
        for k, place in enumerate(places):
            out["total_return"][row, place] = sum(gamma**j * r[j] for j in range(len(r)))
            out["reward_to_go"][row, place] = sum(gamma ** (j - k) * r[j] for j in range(k, len(r)))
            out["q_value"][row, place] = r[k] + gamma * v[k + 1]
            out["td_residual"][row, place] = delta[k]
            out["gae"][row, place] = sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, len(r)))
    return out


@given(trajectories(), GAMMAS, LAMBDAS)
def test_each_form_is_its_definition(batch: tuple[Tensor, Tensor, Tensor], gamma: float, lam: float) -> None:
    rewards, values, mask = batch
    expected = literal(rewards, values, mask, gamma, lam)
    actual = {
        "total_return": returns.total_return(rewards, mask, gamma),
        "reward_to_go": returns.reward_to_go(rewards, mask, gamma),
        "q_value": returns.q_value(rewards, values, mask, gamma),
        "td_residual": returns.td_residual(rewards, values, mask, gamma),
        "gae": returns.gae(rewards, values, mask, gamma, lam),
    }
    for name, form in actual.items():
        torch.testing.assert_close(form, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@given(trajectories(), GAMMAS)
def test_the_two_ends_of_lambda(batch: tuple[Tensor, Tensor, Tensor], gamma: float) -> None:
    rewards, values, mask = batch
    one = returns.gae(rewards, values, mask, gamma, lam=1.0)
    torch.testing.assert_close(one, returns.reward_to_go(rewards, mask, gamma) - values * mask)
    zero = returns.gae(rewards, values, mask, gamma, lam=0.0)
    torch.testing.assert_close(zero, returns.q_value(rewards, values, mask, gamma) - values * mask)
    torch.testing.assert_close(zero, returns.td_residual(rewards, values, mask, gamma))


@given(trajectories(), GAMMAS, LAMBDAS)
def test_form_five_is_verls_before_it_is_whitened(
    batch: tuple[Tensor, Tensor, Tensor], gamma: float, lam: float
) -> None:
    """If every reward is at an action, as verl expects."""
    rewards, values, mask = batch
    rewards = rewards * mask
    if mask.sum() < 2:
        return  # nothing to whiten
    theirs, theirs_returns = compute_gae_advantage_return(rewards, values, mask.double(), gamma, lam)  # type: ignore[arg-type]
    ours = returns.gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(masked_whiten(ours, mask.double()) * mask, theirs * mask)
    torch.testing.assert_close((ours + values) * mask, theirs_returns * mask)


@given(trajectories())
def test_what_stands_where_no_action_is_does_not_matter(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    rewards, values, mask = batch
    spoiled = values.masked_fill(mask == 0, float("nan"))
    for form in (returns.q_value, returns.td_residual, returns.gae):
        torch.testing.assert_close(form(rewards, spoiled, mask, 0.9), form(rewards, values, mask, 0.9))
        assert not form(rewards, spoiled, mask, 0.9)[mask == 0].any()


def test_a_tool_turn_takes_no_discount_and_its_reward_belongs_to_the_call() -> None:
    mask = torch.tensor([[1, 0, 0, 1, 1, 0]])
    rewards = torch.tensor([[0.0, 0.0, 4.0, 0.0, 0.0, 8.0]])
    assert returns.reward_to_go(rewards, mask, 0.5).tolist() == [[6.0, 0.0, 0.0, 4.0, 8.0, 0.0]]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 1000))
def test_the_baseline_is_the_mean_of_the_group_or_of_the_others(groups: list[int], seed: int) -> None:
    group = torch.tensor(groups)
    values = torch.randn(len(groups), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for leave_one_out in (False, True):
        actual = returns.group_baseline(values, group, leave_one_out)
        for i, number in enumerate(groups):
            members = [j for j, other in enumerate(groups) if other == number]
            counted = [j for j in members if j != i or not leave_one_out]
            expected = sum(float(values[j]) for j in counted) / len(counted) if len(members) > 1 else 0.0
            assert float(actual[i]) == pytest.approx(expected)


# --- a tabular problem: horizon 3, two actions, every trajectory enumerated -----------------------------------------

HORIZON, GROUP = 3, 3
ACTIONS = torch.tensor(list(itertools.product([0, 1], repeat=HORIZON)))  # (8, 3): every possible trajectory
#: a reward at each step; good and bad luck of a trajectory are at different steps
REWARDS = torch.stack(
    [ACTIONS[:, 0] + 1.0, 2.0 * (ACTIONS[:, 0] == ACTIONS[:, 1]), 3.0 * ACTIONS[:, 2]], dim=1
).double()
LOGITS = torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64)  # the probability of action 1 at each step
MASK = torch.ones(len(ACTIONS), HORIZON, dtype=torch.long)


def probabilities(logits: Tensor) -> Tensor:
    """The probability of each trajectory, shape (8,)."""
    return torch.where(ACTIONS == 1, logits.sigmoid(), 1 - logits.sigmoid()).prod(dim=1)


def scores() -> Tensor:
    """∇ log π of each trajectory's action at each step with respect to that step's logit, shape (8, 3)."""
    return ACTIONS - LOGITS.sigmoid()


def moments(gradient: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    """The expectation and the total variance of a gradient over outcomes with these probabilities."""
    mean = (weight[:, None] * gradient).sum(dim=0)
    return mean, float((weight[:, None] * (gradient - mean) ** 2).sum())


def test_one_two_and_three_have_the_same_expectation_and_falling_variance() -> None:
    logits = LOGITS.clone().requires_grad_()
    (exact,) = torch.autograd.grad((probabilities(logits) * REWARDS.sum(dim=1)).sum(), logits)
    weight = probabilities(LOGITS)
    means, variances = {}, {}
    means[1], variances[1] = moments(returns.total_return(REWARDS, MASK) * scores(), weight)
    means[2], variances[2] = moments(returns.reward_to_go(REWARDS, MASK) * scores(), weight)

    # Form 3 uses the other members of the group, so every group of three trajectories is an outcome.
    outcomes = torch.tensor(list(itertools.product(range(len(ACTIONS)), repeat=GROUP)))  # (512, 3)
    of_outcome = weight[outcomes].prod(dim=1)
    of_trajectory = returns.trajectory_return(REWARDS, MASK)[outcomes].flatten()
    group = torch.arange(len(outcomes)).repeat_interleave(GROUP)
    to_go = returns.reward_to_go(REWARDS, MASK)
    for name, leave_one_out in (("group mean", False), ("leave-one-out", True)):
        baseline = returns.group_baseline(of_trajectory, group, leave_one_out).view(len(outcomes), GROUP)
        # the first member's gradient: one trajectory's, to be compared with those of forms 1 and 2
        first = outcomes[:, 0]
        gradient = (to_go[first] - baseline[:, :1]) * scores()[first]
        means[name], variances[name] = moments(gradient, of_outcome)

    for name in (1, 2, "leave-one-out"):
        torch.testing.assert_close(means[name], exact, msg=lambda text, name=name: f"form {name}: {text}")
    torch.testing.assert_close(means["group mean"], exact * (GROUP - 1) / GROUP)
    assert variances[1] > variances[2] > variances["leave-one-out"] > variances["group mean"]


def test_the_true_critic_makes_four_five_and_six_exact_as_well() -> None:
    """With the true V, the forms Q, advantage and TD residual have the exact gradient in expectation, less variance."""
    logits = LOGITS.clone().requires_grad_()
    (exact,) = torch.autograd.grad((probabilities(logits) * REWARDS.sum(dim=1)).sum(), logits)
    weight, to_go = probabilities(LOGITS), returns.reward_to_go(REWARDS, MASK)
    values = torch.zeros_like(REWARDS)
    for step in range(HORIZON):
        for row in range(len(ACTIONS)):
            same_past = (ACTIONS[:, :step] == ACTIONS[row, :step]).all(dim=1)
            values[row, step] = (weight * to_go[:, step])[same_past].sum() / weight[same_past].sum()
    variances = {"to go": moments(to_go * scores(), weight)[1]}
    for name, psi in (
        ("q", returns.q_value(REWARDS, values, MASK)),
        ("gae", returns.gae(REWARDS, values, MASK, lam=0.95)),
        ("td", returns.td_residual(REWARDS, values, MASK)),
    ):
        mean, variances[name] = moments(psi * scores(), weight)
        torch.testing.assert_close(mean, exact, msg=lambda text, name=name: f"{name}: {text}")
    assert variances["to go"] > variances["q"] > variances["gae"] > variances["td"]
