"""The config nodes ``entropy_fork`` and ``entropy_fork_guards``: their keys, and how a config is read.

- ``names``: the names of losses, estimators, engines, guarded losses and runs.
- ``schema``: a dataclass for each node, with a sentence for each key.
- ``nodes``: reads the nodes, gives them their types, and refuses a node in a place where it would do nothing.

``entropy_fork/verl/checks.py`` checks the rest of the config. Every process of a run imports this folder, so it imports
no module of verl.
"""

from entropy_fork.common.asked_for import NODE
from entropy_fork.verl.config.names import (
    ALL_TOKENS,
    ANSWERS_PER_STEP,
    ESTIMATORS,
    MASKABLE_LOSSES,
    MASKED_STRATEGIES,
    NEED_CRITIC,
    NEED_GROUP,
    RULE_KEYS,
    TOKENWISE_LOSSES,
    TrainedOn,
    averages_by_sequence,
    guarded_name,
    is_ours,
    plain_name,
    selection_name,
)
from entropy_fork.verl.config.nodes import (
    MOVED,
    check_places,
    guard_loss,
    is_guarded,
    make_typed,
    moved,
    read_config,
    read_guards,
    read_node,
)
from entropy_fork.verl.config.schema import EntropyForkConfig, GuardsConfig, default_of, keys, register_schema

__all__ = [
    "ALL_TOKENS",
    "ANSWERS_PER_STEP",
    "ESTIMATORS",
    "MASKABLE_LOSSES",
    "MASKED_STRATEGIES",
    "MOVED",
    "NEED_CRITIC",
    "NEED_GROUP",
    "NODE",
    "RULE_KEYS",
    "TOKENWISE_LOSSES",
    "EntropyForkConfig",
    "GuardsConfig",
    "TrainedOn",
    "averages_by_sequence",
    "check_places",
    "default_of",
    "guard_loss",
    "guarded_name",
    "is_guarded",
    "is_ours",
    "keys",
    "make_typed",
    "moved",
    "plain_name",
    "read_config",
    "read_guards",
    "read_node",
    "register_schema",
    "selection_name",
]
