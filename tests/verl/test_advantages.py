"""The registered forms of Ψ_t, called through verl's own functions, and what is refused before training."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.ppo import ray_trainer
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, get_policy_loss_fn
from verl.trainer.ppo.v1 import utils
from verl.workers.config import FSDPActorConfig, PolicyLossConfig

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.recipes import preset_names
from entropy_fork.core import returns
from entropy_fork.verl.checks import check_estimator, check_maskable, check_on_policy
from entropy_fork.verl.config import ESTIMATORS, NEED_CRITIC, read_config

ROWS, WIDTH, GROUP = 6, 9, 3
ALGORITHM = OmegaConf.create({"gamma": 0.9, "lam": 0.8})


def make_data(with_values: bool = True) -> DataProto:
    random = torch.Generator().manual_seed(0)
    mask = torch.ones(ROWS, WIDTH, dtype=torch.long)
    mask[:, 3:5] = 0  # the output of a tool
    mask[2, 6:] = 0
    tensors = {
        "response_mask": mask,
        "token_level_rewards": torch.randn(ROWS, WIDTH, generator=random) * (torch.arange(WIDTH) % 4 == 1),
    }
    if with_values:
        tensors["values"] = torch.randn(ROWS, WIDTH, generator=random)
    uid = np.array(["a", "b", "a", "b", "a", "b"], dtype=object)
    return DataProto(batch=TensorDict(tensors, batch_size=ROWS), non_tensor_batch={"uid": uid})


def through_verl(name: str, data: DataProto) -> DataProto:
    """Compute Ψ in the way of the V1 trainer."""
    keys = [f"{uid}_{row}_0" for row, uid in enumerate(data.non_tensor_batch["uid"])]
    return utils.compute_advantage_for_multi_trajectories(
        data, batch_keys=keys, adv_estimator=name, gamma=0.9, lam=0.8, num_repeat=GROUP, config=ALGORITHM
    )


@pytest.mark.parametrize("name", ESTIMATORS)
def test_verl_computes_each_form(name: str) -> None:
    data = make_data()
    rewards, mask, values = (data.batch[key] for key in ("token_level_rewards", "response_mask", "values"))
    to_go = returns.reward_to_go(rewards, mask, 0.9)
    worth = to_go[:, 0]  # the first position has an action
    mean = torch.stack([worth[0::2].mean(), worth[1::2].mean()]).repeat(GROUP)
    psi = {
        "total_return": worth[:, None] * mask,
        "reward_to_go": to_go,
        "reward_to_go_baseline": (to_go - mean[:, None]) * mask,
        "reward_to_go_leave_one_out": (to_go - ((GROUP * mean - worth) / (GROUP - 1))[:, None]) * mask,
        "q_value": returns.q_value(rewards, values, mask, 0.9),
        "td_residual": returns.td_residual(rewards, values, mask, 0.9),
    }[name]
    targets = to_go if name not in NEED_CRITIC else returns.gae(rewards, values, mask, 0.9, 0.8) + values * mask
    result = through_verl(name, data)
    torch.testing.assert_close(result.batch["advantages"], psi)
    torch.testing.assert_close(result.batch["returns"], targets)


@pytest.mark.parametrize("name", NEED_CRITIC)
def test_values_of_an_earlier_batch_are_not_taken_for_those_of_this(name: str) -> None:
    through_verl(name, make_data())
    with pytest.raises(EntropyForkError, match=r"needs the values of a critic.*critic\.enable=True"):
        through_verl(name, make_data(with_values=False))


def test_verl_still_calls_what_is_wrapped_in_the_same_way() -> None:
    assert "adv_estimator" in inspect.signature(ray_trainer.compute_advantage).parameters
    source = inspect.getsource(utils.compute_advantage_for_multi_trajectories)
    assert source.count("compute_advantage(\n") == source.count("adv_estimator=adv_estimator") == 2
    assert hasattr(utils.compute_advantage, "__wrapped__")
    # once verl passes the values to registered estimators, the wrapper can be removed
    assert 'adv_kwargs["values"]' not in inspect.getsource(ray_trainer.compute_advantage)


def test_verls_own_estimators_are_still_there() -> None:
    assert {"gae", "grpo", "rloo", "opo", *ESTIMATORS} <= set(ADV_ESTIMATOR_REGISTRY)


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 2.5, 1.0]])
def test_reinforce_is_minus_psi_times_the_log_probability(weights: list[float] | None) -> None:
    config = FSDPActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=2,
        policy_loss=PolicyLossConfig(loss_mode="reinforce"),
    )
    log_prob = torch.tensor([[-0.5, -1.0, -9.0, -2.0]], requires_grad=True)
    psi, mask = torch.tensor([[3.0, -1.0, 7.0, 0.5]]), torch.tensor([[1, 1, 0, 1]])
    weight = None if weights is None else torch.tensor([weights])
    # the old policy is very different: without a ratio there is no clipping
    loss, _ = get_policy_loss_fn("reinforce")(
        old_log_prob=log_prob.detach() - 5, log_prob=log_prob, advantages=psi, response_mask=mask,
        loss_agg_mode="token-mean", config=config, rollout_is_weights=weight,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, log_prob)
    torch.testing.assert_close(gradient, -psi * mask * (1.0 if weight is None else weight) / 3)


Compose = Callable[..., DictConfig]
ON_POLICY = ("data.train_batch_size=32", "actor_rollout_ref.actor.ppo_mini_batch_size=32")


@pytest.mark.parametrize("preset", preset_names("entropy_fork"))
@pytest.mark.parametrize("name", ESTIMATORS)
def test_each_form_composes_with_each_preset(compose: Compose, preset: str, name: str) -> None:
    loss = "vanilla" if preset in ("archer", "dcpo") else "reinforce"  # these two are about PPO's clip
    config = compose(
        "+recipe=demo_cpu", f"entropy_fork={preset}", f"algorithm.adv_estimator={name}", "critic.enable=true",
        f"actor_rollout_ref.actor.policy_loss.loss_mode={loss}", "actor_rollout_ref.actor.ppo_mini_batch_size=16",
    )  # fmt: skip
    check_estimator(config)
    check_on_policy(config)
    fork_config = read_config(config)
    assert (fork_config is None) == (preset == "off")
    if fork_config is not None:
        check_maskable(config, fork_config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.adv_estimator=q_value"], r"critic\.enable=True.*total_return"),
        (["algorithm.adv_estimator=td_residual", "critic.enable=false"], r"critic\.enable=True"),
        (["algorithm.adv_estimator=reward_to_go_baseline"], r"n=1 asks for one answer.*n=2"),
        (["algorithm.adv_estimator=total_return", "trainer.use_v1=false"], r"trainer\.use_v1=True"),
    ],
)
def test_what_an_estimator_lacks_is_said_before_training(compose: Compose, overrides: list[str], message: str) -> None:
    with pytest.raises(EntropyForkError, match=message):
        check_estimator(compose(*overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train_batch_size=64"], r"ppo_mini_batch_size=64 \(the train_batch_size, not 32\)"),
        (["actor_rollout_ref.actor.ppo_epochs=2"], r"ppo_epochs=1 \(not 2\)"),
        (["trainer.v1.trainer_mode=colocate_async"], r"trainer_mode=sync"),
    ],
)
def test_reinforce_refuses_what_is_not_on_policy(compose: Compose, overrides: list[str], message: str) -> None:
    loss = "actor_rollout_ref.actor.policy_loss.loss_mode="
    check_on_policy(compose(*ON_POLICY, f"{loss}reinforce"))
    check_on_policy(compose(*ON_POLICY, f"{loss}vanilla", *overrides))
    with pytest.raises(EntropyForkError, match=message):
        check_on_policy(compose(*ON_POLICY, f"{loss}reinforce", *overrides))


def test_the_launcher_asks_for_both(python: Callable[..., Any]) -> None:
    for overrides, message in (
        (["algorithm.adv_estimator=td_residual"], "critic.enable=True"),
        (
            ["algorithm.adv_estimator=total_return", "actor_rollout_ref.actor.policy_loss.loss_mode=reinforce"],
            "ppo_mini_batch_size=16 (the train_batch_size, not 8)",
        ),
    ):
        run = python("-m", "verl.trainer.main_ppo", "+recipe=demo_cpu", *overrides)
        assert run.returncode != 0
        assert message in run.stderr, run.stderr[-2000:]
