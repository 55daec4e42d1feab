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


def in_one_line(error: BaseException) -> str:
    """The class and the message of an error that a user's code raised, in one line of at most 300 characters."""
    message = "".join(letter if letter.isprintable() else " " for letter in f"{type(error).__name__}: {error}")
    line = " ".join(message.split())
    return line if len(line) <= 300 else f"{line[:299]}…"


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
    except (Exception, SystemExit) as error:  # whatever the user's module raises; a script may end itself
        raise ValueError(
            f"{key}={path}: the module {module_name} cannot be imported ({in_one_line(error)}). It must be "
            f"installed, or in the folder that the run starts in, in every process that selects"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{key}={path}: the module {module_name} has no function {name}")
    found: Callable[..., Any] = function
    return found
