"""The versions of verl that this package works with. Imports nothing of verl, so that it can be asked first."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

#: the versions whose internals we read; as in any specifier, without pre-releases of 0.9.0 and 0.10.0, with 0.9.2rc1
SUPPORTED = ">=0.9,<0.10"

#: the versions on which the installed wheel is tested (docs/reference/versions.md), oldest first
TESTED = ("0.9.0", "0.9.1")


def why_unsupported(version: str) -> str | None:
    """The message that refuses this version of verl, or None if it is supported."""
    try:
        supported = SpecifierSet(SUPPORTED).contains(version, prereleases=True)
    except InvalidVersion:
        supported = False
    if supported:
        return None
    return (
        f"entropy_fork works with verl {SUPPORTED} (tested with {' and '.join(TESTED)}), and this is verl {version}. "
        f"Install one of them: pip install 'verl{SUPPORTED}'; or an entropy-fork made for this verl."
    )
