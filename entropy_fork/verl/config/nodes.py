"""Our two nodes in a config: read them, give them their types, refuse them in a place where they would do nothing.

A process without this plugin cannot unpickle a typed node: its TaskRunner stops with ``No module named 'entropy_fork'``
instead of training on all tokens. So a node gets its type however it came into the config.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from entropy_fork.common.asked_for import GUARDS, NODE
from entropy_fork.common.errors import EntropyForkError, process_name
from entropy_fork.verl.config.names import guarded_name
from entropy_fork.verl.config.schema import EntropyForkConfig, GuardsConfig

#: keys that moved to another node: {old: new}
MOVED = {f"{NODE}.patience_s": f"{GUARDS}.patience_s"}


def read_config(config: DictConfig) -> EntropyForkConfig | None:
    """The typed node of a root config; None if it is absent or switched off. Raises as :func:`read_node`."""
    fork_config = read_node(config)
    return fork_config if fork_config is not None and fork_config.enabled else None


def read_node(config: DictConfig) -> EntropyForkConfig | None:
    """The typed node of a root config, also if it is switched off; None if it is absent.

    Raises:
        EntropyForkError: the node is not at the root, is not a mapping, or has an unknown key or a value out of range.
    """
    check_places(config)
    return _parsed(config, NODE, EntropyForkConfig, f"{NODE}=off trains without the mask")


def read_guards(config: DictConfig) -> GuardsConfig:
    """The guards of a run. If the node is absent, all guards are off.

    Raises:
        EntropyForkError: the node is not a mapping, or has an unknown key or a value out of range.
    """
    guards = _parsed(config, GUARDS, GuardsConfig, f"{GUARDS}=off switches all of them off")
    return guards or GuardsConfig(waiting=False, checkpoints=False, data_files=False)


Schema = TypeVar("Schema", EntropyForkConfig, GuardsConfig)


def _parsed(config: DictConfig, name: str, schema: type[Schema], way_out: str) -> Schema | None:
    node = _node(config, name)
    if node is None:
        return None
    if not isinstance(node, DictConfig):
        raise EntropyForkError(
            f"'{name}: {node}' arrived as a plain value, not as a preset, so it would do nothing. The presets were "
            f"not on Hydra's search path. Check that the plugin is active in this process ({process_name()}): "
            f"'python -c \"import verl, entropy_fork.verl.plugin\"' must run without an error."
        )
    for key in MOVED:
        if key.removeprefix(f"{name}.") in node:
            raise EntropyForkError(moved(key))
    try:
        # Unstructured first: merging two structured configs of one type would skip the check of the keys.
        typed = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(node, resolve=True))
        parsed: Schema = OmegaConf.to_object(typed)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        known = ", ".join(f"{f.name} ({f.type})" for f in fields(schema))
        raise EntropyForkError(
            f"bad config node '{name}': {str(error).splitlines()[0]}. Known keys: {known}."
        ) from None
    try:
        parsed.check()
    except ValueError as error:
        raise EntropyForkError(f"{name}: {error}; {way_out}") from None
    return parsed


def _node(config: Any, name: str) -> Any:
    """A node at the root; None if it is absent, or if ``config`` is no config of OmegaConf."""
    return OmegaConf.select(config, name, default=None) if OmegaConf.is_config(config) else None


def moved(key: str) -> str:
    """What to write instead of a key that moved to another node."""
    group, _ = MOVED[key].split(".")
    return f"'{key}' is now '{MOVED[key]}'. Write +{group}=on {MOVED[key]}=… (with a recipe without +{group}=on)."


#: the name of ρ here, in the authors' release, in TRL and ms-swift, and in LightRFT
SPELLINGS = ("top_ratio", "entropy_top_ratio", "top_entropy_quantile", "high_entropy_token_ratio")

#: verl's nodes in which such a key can only be meant for the mask. In other nodes it may be the user's own key.
MEANT_FOR_A_MASK = (
    "actor_rollout_ref.actor",
    "actor_rollout_ref.actor.policy_loss",
    "actor_rollout_ref.model",
    "algorithm",
)


def check_places(config: DictConfig) -> None:
    """Refuse a key of ours in a place where nobody reads it. verl ignores keys that it does not know.

    Raises:
        EntropyForkError: with the key, and what to write at the root instead.
    """
    if not OmegaConf.is_config(config):
        return
    for path, value in _misplaced(OmegaConf.to_container(config, resolve=False)):
        if path.rsplit(".")[-1] == GUARDS:
            raise EntropyForkError(f"'{path}' does nothing: '{GUARDS}' is read at the root of the config.")
        ratio = value if isinstance(value, float) else "…"
        raise EntropyForkError(
            f"'{path}' does nothing: '{NODE}' is read at the root of the config. Write +{NODE}=global or "
            f"+{NODE}.top_ratio={ratio} on the command line."
        )


def _misplaced(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Our nodes, a whole preset of ours, or a name of ρ, in a place where nobody reads them: path and value."""
    if not isinstance(node, dict):
        return
    if path and {field.name for field in fields(EntropyForkConfig)} <= node.keys():  # +entropy_fork@trainer=global
        yield f"{path}.top_ratio", node["top_ratio"]
    for key, child in node.items():
        below = f"{path}.{key}" if path else str(key)
        if (path and key in (NODE, GUARDS)) or (path in MEANT_FOR_A_MASK and key in SPELLINGS and child is not None):
            yield below, child
        if path or key not in (NODE, GUARDS):
            yield from _misplaced(child, below)


def make_typed(config: DictConfig) -> None:
    """Give our nodes in a root config their types, so that a process without this plugin cannot unpickle them.

    Raises:
        EntropyForkError: see :func:`read_node`.
    """
    read_node(config)
    read_guards(config)
    for name, schema in ((NODE, EntropyForkConfig), (GUARDS, GuardsConfig)):
        if not _has_type(config, name, schema):
            node = OmegaConf.to_container(config[name], resolve=True)
            with _changeable(config):
                config[name] = OmegaConf.merge(OmegaConf.structured(schema), node)


def _has_type(config: DictConfig, name: str, schema: type) -> bool:
    node = _node(config, name)
    return node is None or (isinstance(node, DictConfig) and OmegaConf.get_type(node) is schema)


def guard_loss(config: DictConfig) -> None:
    """Write the guarded loss into the config: a worker then uses token weights, or stops. Twice is the same as once.

    Args:
        config: the root of a config that asks for a mask.
    """
    actor = config.actor_rollout_ref.actor
    loss_mode = guarded_name(OmegaConf.select(actor, "policy_loss.loss_mode", default="vanilla"))
    with _changeable(actor):
        OmegaConf.update(actor, "policy_loss.loss_mode", loss_mode, force_add=True)


def is_guarded(config: DictConfig) -> bool:
    """Whether a root config may leave its process: our nodes have types, and a config with a mask the guarded loss."""
    if not (_has_type(config, NODE, EntropyForkConfig) and _has_type(config, GUARDS, GuardsConfig)):
        return False
    if (node := _node(config, NODE)) is None or not node.enabled:
        return True
    loss_mode = OmegaConf.select(config, "actor_rollout_ref.actor.policy_loss.loss_mode", default="")
    return str(loss_mode).startswith(f"{NODE}/")


def _changeable(config: DictConfig) -> AbstractContextManager[Any]:
    """A context in which a config can be changed, even if it is read-only or takes no new keys."""
    return flag_override(config, ["struct", "readonly"], [False, False])
