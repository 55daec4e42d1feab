"""Which versions of verl this package holds on to. Imports nothing of verl, so that it can be asked before that."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

#: whose internals were read. As in any specifier, pre-releases of 0.9.0 and of 0.10.0 are outside, and 0.9.2rc1 is in
SUPPORTED = ">=0.9,<0.10"

#: on which the installed wheel is tested (docs/reference/versions.md), oldest first
TESTED = ("0.9.0", "0.9.1")


def why_unsupported(version: str) -> str | None:
    """The sentence to refuse a verl of this version with, or None where it is supported."""
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
