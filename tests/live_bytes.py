"""The bytes of all tensors that are alive, for formulas about memory: counts storages, as an accelerator would."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is active, the peak of the bytes of what operations made; works on fake tensors as well.

    Args:
        known: tensors that are not to be counted (weights, gradients that are there already).
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.peak = 0
        self._kept = list(known)
        self._known = {tensor.untyped_storage()._cdata for tensor in self._kept}
        self._alive: dict[int, weakref.ref] = {}

    def now(self) -> int:
        return sum(storage.nbytes() for ref in self._alive.values() if (storage := ref()) is not None)

    def restart(self) -> None:
        self.peak = self.now()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        changed = "resize" in str(func)  # FSDP frees what it gathered so
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._known and key not in self._alive:
                    self._alive[key] = weakref.ref(storage, lambda _, key=key: self._alive.pop(key, None))
                    changed = True
        if changed:
            self.peak = max(self.peak, self.now())
        return made
