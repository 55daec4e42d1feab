"""Names: of verl's losses and engines that can be masked, of our estimators, of guarded losses, and of runs."""

from __future__ import annotations

import hashlib
import re
import sys
from typing import Any

from omegaconf import DictConfig, OmegaConf
from packaging.version import Version

from entropy_fork.common.asked_for import NODE
from entropy_fork.core.rule import KEY_OF, KEYS

#: policy losses (verl's, and ``reinforce``) that multiply the gradient of each token by its ``rollout_is_weights``: a
#: token of weight 0 has a gradient of exactly 0
MASKABLE_LOSSES = (
    "vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "dro", "cispo", "reinforce",
)  # fmt: skip

#: those of them in which a token of weight 0 does not change the loss or the gradient of any other token
TOKENWISE_LOSSES = ("vanilla", "dppo_tv", "dppo_kl", "sapo", "gpg", "dro", "cispo", "reinforce")

#: estimators of ``advantages.py``: those that need a critic's values, those that need a group of answers, and all
NEED_CRITIC = ("q_value", "td_residual")
NEED_GROUP = ("reward_to_go_baseline", "reward_to_go_leave_one_out")
ESTIMATORS = ("total_return", "reward_to_go", *NEED_GROUP, *NEED_CRITIC)

#: verl's engines in which ``engine.py`` can select tokens
MASKED_STRATEGIES = ("fsdp", "fsdp2")

#: keys of the node that say what is trained on: the keys of the rule except ``loss_agg_mode``, which is verl's
RULE_KEYS = tuple(key.name for key in KEYS if key.name != "loss_agg_mode")

#: ids of dumped answers: the step times this, plus the answer's number in its step
ANSWERS_PER_STEP = 100_000

#: what a run without a mask trains on, in words
ALL_TOKENS = "all tokens"

#: what a run trains on: the value of each of ``RULE_KEYS``, or ``ALL_TOKENS``
TrainedOn = dict[str, Any] | str


def averages_by_sequence(loss_mode: str, version: str) -> bool:
    """Whether this verl averages the loss as seq-mean-token-mean with any ``actor.loss_agg_mode`` (core_algos.py)."""
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
    """The name of the loss with its guard (``policy_loss.py``). A guarded name stays as it is."""
    return f"{NODE}/{plain_name(loss_mode)}"


def plain_name(loss_mode: str) -> str:
    """verl's name of the loss: a guarded name without its guard."""
    return loss_mode.removeprefix(f"{NODE}/")


def selection_name(config: DictConfig) -> str:
    """What a run selects, in a few characters: ``off``, ``top0.2``, ``top0.2-current-micro_batch``, …

    Recipes put it into the name of a run. verl resumes from any checkpoint in the folder of that name. So if a baseline
    or an ablation had the same name as the recipe's run, it would continue the other method's checkpoints.

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
            words.append(_as_word(value) if isinstance(value, str) else f"{name}{value:g}")
    return "-".join(words)


def _as_word(value: str) -> str:
    """A value as a part of a name. A condition or an import path is shortened, and told apart by a hash."""
    if re.fullmatch(r"[\w.]+", value):
        return value
    plain = re.sub(r"\W+", "_", value).strip("_")[:24]
    return f"{plain}_{hashlib.sha256(value.encode()).hexdigest()[:6]}"


# ``${entropy_fork_name:}`` in a recipe. Every process that reads a config with our node imports this module.
OmegaConf.register_new_resolver("entropy_fork_name", lambda *, _root_: selection_name(_root_), replace=True)
