"""Names: verl's losses and engines that can be masked, our estimators, guarded losses, and what a run is called."""

from __future__ import annotations

import sys
from typing import Any

from omegaconf import DictConfig, OmegaConf
from packaging.version import Version

from entropy_fork.common.asked_for import NODE
from entropy_fork.core.rule import KEY_OF, KEYS

#: policy losses (verl's, and ``reinforce``) whose gradient is ``rollout_is_weights`` times the plain one, exactly 0
#: where the weight is 0
MASKABLE_LOSSES = (
    "vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "dro", "cispo", "reinforce",
)  # fmt: skip

#: those of them in which a token of weight 0 has no part in the loss and gradient of any other token
TOKENWISE_LOSSES = ("vanilla", "dppo_tv", "dppo_kl", "sapo", "gpg", "dro", "cispo", "reinforce")

#: estimators of ``advantages.py``: from a critic's values, from a group of answers, and all of them
NEED_CRITIC = ("q_value", "td_residual")
NEED_GROUP = ("reward_to_go_baseline", "reward_to_go_leave_one_out")
ESTIMATORS = ("total_return", "reward_to_go", *NEED_GROUP, *NEED_CRITIC)

#: verl's engines that ``engine.py`` can make the selection in
MASKED_STRATEGIES = ("fsdp", "fsdp2")

#: keys of the node that say what is trained on: those of the rule, but for verl's ``loss_agg_mode``
RULE_KEYS = tuple(key.name for key in KEYS if key.name != "loss_agg_mode")

#: ids of dumped answers: the step times this, plus the answer's number in its step
ANSWERS_PER_STEP = 100_000

#: what a run without a mask trains on
ALL_TOKENS = "all tokens"

#: What a run trains on: the value of every key that changes it, or ``ALL_TOKENS``.
TrainedOn = dict[str, Any] | str


def averages_by_sequence(loss_mode: str, version: str) -> bool:
    """Whether this verl's loss is a seq-mean-token-mean whatever ``actor.loss_agg_mode`` says (core_algos.py)."""
    return loss_mode == "sapo" or (loss_mode == "gspo" and Version(version) < Version("0.9.1"))


def is_ours(registry: str, name: str, ours: tuple[str, ...]) -> bool:
    """Whether a name of ours means ours: a module of the user's may have registered its own under it.

    Args:
        registry: of ``verl.trainer.ppo.core_algos``.
        name: in the config.
        ours: the names that we register.
    """
    if name not in ours:
        return False
    core_algos = sys.modules.get("verl.trainer.ppo.core_algos")
    registered = getattr(core_algos, registry, {}).get(name)
    return registered is None or registered.__module__.startswith("entropy_fork.")


def guarded_name(loss_mode: str) -> str:
    """The name of a loss with its guard (``policy_loss.py``). A name that has the guard is returned as it is."""
    return f"{NODE}/{plain_name(loss_mode)}"


def plain_name(loss_mode: str) -> str:
    """verl's name of a loss, guarded or not."""
    return loss_mode.removeprefix(f"{NODE}/")


def selection_name(config: DictConfig) -> str:
    """What a run selects, in a few characters: ``off``, ``top0.2``, ``top0.2-current-micro_batch``, …

    For names of runs. verl resumes from whatever lies in the folder of a run's name, so a baseline or an ablation that
    went under the recipe's own name would go on from the checkpoints of another method.

    Args:
        config: the root of a config with or without the node.
    """
    node = OmegaConf.select(config, NODE, default=None)
    if node is None or not node.enabled:
        return "off"
    words = [f"{node.select}{node.top_ratio:g}"]
    for name in RULE_KEYS:
        value = node[name]
        if name not in ("select", "top_ratio") and value != KEY_OF[name].default:
            words.append(value if isinstance(value, str) else f"{name}{value:g}")
    return "-".join(words)


# ``${entropy_fork_name:}`` in a recipe. Here, where every process that reads a config with our node comes by.
OmegaConf.register_new_resolver("entropy_fork_name", lambda *, _root_: selection_name(_root_), replace=True)
