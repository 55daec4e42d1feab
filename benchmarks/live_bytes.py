"""Count the bytes of all living tensors, to check formulas about memory. Storages count, as on an accelerator."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While active, records the peak of the bytes that operations have made. It works on fake tensors too.

    Args:
        known: tensors that do not count, such as weights or gradients that exist already.
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
            if (
                isinstance(tensor, torch.Tensor) and not tensor.is_nested
            ):  # which is its values, and no bytes of its own
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._known and key not in self._alive:
                    self._alive[key] = weakref.ref(storage, lambda _, key=key: self._alive.pop(key, None))
                    changed = True
        if changed:
            self.peak = max(self.peak, self.now())
        return made


class LiveBytesWithNumpy(LiveBytes):
    """The same, and also the memory that numpy and Python allocate between two operations of torch.

    A tensor that shares the memory of a numpy array adds no bytes, because numpy's allocation has been counted. An
    input counts only if it was made while this is active.
    """

    def __enter__(self) -> LiveBytesWithNumpy:
        tracemalloc.start()
        self._numpy_before = tracemalloc.get_traced_memory()[0]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._see()
        super().__exit__(*exception)
        tracemalloc.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see()
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                tensor = tensor.values() if tensor.is_nested else tensor
                key = tensor.untyped_storage()._cdata
                if key not in self._alive and key not in self._known:
                    self._known.add(key)
                    weakref.finalize(tensor.untyped_storage(), self._known.discard, key)
        made = super().__torch_dispatch__(func, types, args, kwargs)
        self._see()
        return made

    def note(self) -> int:
        """The peak since the last note."""
        self._see()
        peak, self.peak = self.peak, 0
        return peak

    def _see(self) -> None:
        """Called before and after each operation: note its tensors, and numpy's peak since the last call."""
        highest = tracemalloc.get_traced_memory()[1] - self._numpy_before
        self.peak = max(self.peak, self.now() + highest)
        tracemalloc.reset_peak()
