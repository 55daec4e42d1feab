"""How this package is installed here, and the command that installs one of its extras in the same way."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

NAME = "entropy-fork"


def install_command(extra: str = "") -> str:
    """The pip command that installs this package, where it came from, with one of its extras.

    The package is on no index, so its name alone does not install it. pip writes down where a package came from
    (``direct_url.json``, PEP 610): the folder of a clone, a repository, or a file.

    Args:
        extra: ``analysis``, ``cpu``, ``cpu-vllm`` or ``data``; empty for the package alone.

    Returns:
        The command, quoted for a shell. Where pip wrote nothing down, it installs from the folder of a clone, and a
        remark in brackets behind it says so.
    """
    wanted = f"[{extra}]" if extra else ""
    origin = _origin()
    url = str(origin.get("url", ""))
    if vcs := origin.get("vcs_info"):
        revision = vcs.get("requested_revision") or vcs.get("commit_id")
        folder = f"#subdirectory={origin['subdirectory']}" if "subdirectory" in origin else ""
        address = f"{vcs['vcs']}+{url}" + (f"@{revision}" if revision else "") + folder
        return f"pip install {shlex.quote(f'{NAME}{wanted} @ {address}')}"
    if "dir_info" in origin and (clone := Path(unquote(urlsplit(url).path))).is_dir():
        editable = "-e " if origin["dir_info"].get("editable") else ""
        return f"pip install {editable}{shlex.quote(f'{clone}{wanted}')}"
    if "archive_info" in origin:
        return f"pip install {shlex.quote(f'{NAME}{wanted} @ {url}')}"
    return f"pip install {shlex.quote(f'.{wanted}')} (in the folder of a clone of {NAME})"


def _origin() -> dict[str, Any]:
    """What pip wrote down about where this package came from; empty if it wrote nothing."""
    try:
        text = importlib.metadata.distribution(NAME).read_text("direct_url.json")
        origin = json.loads(text or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return {}
    return origin if isinstance(origin, dict) else {}


def why_missing(missing: list[str], extra: str) -> str:
    """The sentence that names modules that are not installed and the command that installs them.

    Args:
        missing: at least one module.
        extra: the extra that brings them.
    """
    names = " and ".join([", ".join(missing[:-1]), missing[-1]] if len(missing) > 1 else missing)
    return f"{names} {'are' if len(missing) > 1 else 'is'} not installed. Install the extra: {install_command(extra)}"
