"""A user's own loss and estimators, some with the same names as ours. Loaded through VERL_USE_EXTERNAL_MODULES."""

from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss


@register_policy_loss("mine")
@register_policy_loss("reinforce")
def my_loss(**_):
    raise NotImplementedError


@register_adv_est("mine")
@register_adv_est("q_value")
@register_adv_est("reward_to_go_leave_one_out")
def my_estimator(**_):
    raise NotImplementedError
