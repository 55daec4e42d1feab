"""A user's own function, named by its import path ``package.module:function``."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_import_path(text: str) -> bool:
    """Whether a text has the form ``package.module:function``."""
    return IMPORT_PATH.fullmatch(text) is not None


def load_function(path: str, key: str) -> Callable[..., Any]:
    """Import a function.

    Args:
        path: ``package.module:function``.
        key: the key of the config that names it, for messages.

    Raises:
        ValueError: the module cannot be imported, or has no such function.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(
            f"{key}={path}: the module {module_name} cannot be imported ({type(error).__name__}: {error}). It must be "
            f"installed, or in the folder that the run starts in, in every process that selects"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{key}={path}: the module {module_name} has no function {name}")
    found: Callable[..., Any] = function
    return found
