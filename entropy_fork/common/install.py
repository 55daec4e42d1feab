"""How this package is installed today, for every message that asks for one of its extras. It is not on PyPI."""

from __future__ import annotations


def how_to_install(extra: str = "") -> str:
    """What to type, and where, as the end of a sentence.

    Args:
        extra: of ``pyproject.toml``: ``analysis``, ``cpu``, ``cpu-vllm`` or ``data``; empty for the package alone.
    """
    return f"pip install '.[{extra}]' in a clone of entropy-fork" if extra else "pip install . in a clone of it"
