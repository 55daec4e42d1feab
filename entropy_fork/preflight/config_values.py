"""Reads the values of a config by their dotted keys, each as the type that it must have.

A value that is missing or of another type does not end the reading. Its complaint is kept, a stand-in is returned, and
:meth:`ConfigValues.check` raises with all complaints at the end.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.preflight.memory import DTYPE_BYTES
from entropy_fork.verl.early.numbers import complaint_about


class UnreadableConfig(EntropyForkError):
    """Values of a config are missing or of the wrong type.

    Attributes:
        complaints: one per value: the key, what is wrong, and what to write.
    """

    def __init__(self, complaints: list[str]):
        super().__init__(" ".join(complaints))
        self.complaints = complaints


#: there is no such key, or its value is '???'
_ABSENT = object()
#: the key lies in something that is no group of keys; the complaint about that is enough
_UNREADABLE = object()


class ConfigValues:
    """A resolved config, read by dotted keys such as ``data.train_batch_size``.

    ``absent`` is what a method returns where the config does not have the key. Without it, the key must be there.
    """

    def __init__(self, config: DictConfig):
        self._tree: Any = OmegaConf.to_container(config, resolve=True)
        self._complaints: dict[str, str] = {}

    def check(self) -> None:
        """Raise if anything that was read so far is missing or of the wrong type.

        Raises:
            UnreadableConfig: with all complaints.
        """
        if self._complaints:
            raise UnreadableConfig(list(self._complaints.values()))

    def complain(self, key: str, complaint: str) -> None:
        """Keep a complaint about a key. Only the first one about each key is kept."""
        self._complaints.setdefault(key, complaint)

    def whole(self, key: str, least: int | None = None, absent: int | None = None) -> int:
        """A whole number of at least ``least``. Null counts as absent; 16384.0 counts as whole."""
        value = self._value(key)
        if absent is not None and (value is None or value is _ABSENT):
            return absent
        return self._whole(key, value, least)

    def whole_or_none(self, key: str, least: int | None = None) -> int | None:
        """A whole number of at least ``least``, or None where the key is null or absent."""
        value = self._value(key)
        return None if value is None or value is _ABSENT else self._whole(key, value, least)

    def number(self, key: str, absent: float | None = None) -> float:
        """A number, as it is written."""
        value = self._value(key)
        if value is _ABSENT and absent is not None:
            return absent
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._wrong(key, value, "a number", f"{key}=NUMBER")
            return 1.0
        return value

    def flag(self, key: str, absent: bool | None = None) -> bool:
        """True or False. Null, 0 and 0.0 count as False, other numbers as True."""
        value = self._value(key)
        if value is _ABSENT and absent is not None:
            return absent
        if value is None or isinstance(value, (bool, int, float)):
            return bool(value)
        self._wrong(key, value, "True or False", f"{key}=True or {key}=False")
        return False

    def text(self, key: str, absent: str | None = None) -> str:
        """A word, such as a name or a path."""
        value = self._value(key)
        if value is _ABSENT and absent is not None:
            return absent
        if not isinstance(value, str):
            self._wrong(key, value, "a name", f"{key}=NAME")
            return ""
        return value

    def text_or_none(self, key: str) -> str | None:
        """A word, or None where the key is null or absent."""
        value = self._value(key)
        return None if value is None or value is _ABSENT else self.text(key)

    def texts_or_none(self, key: str) -> tuple[str, ...] | None:
        """A word or a list of words, or None where the key is null or absent."""
        value = self._value(key)
        if value is None or value is _ABSENT or value is _UNREADABLE:
            return None
        return tuple(str(part) for part in (value if isinstance(value, list) else [value]))

    def names_in(self, key: str) -> tuple[str, ...]:
        """The names of the keys in a group. A group that is null or absent has none."""
        value = self._value(key)
        return tuple(str(name) for name in value) if isinstance(value, dict) else ()

    def dtype_bytes(self, key: str, absent: str, null: str | None = None) -> int:
        """Bytes of one element of a dtype that verl knows by this name.

        Args:
            key: the dtype's key.
            absent: the dtype where the key is absent.
            null: the dtype where the key is null. None refuses null.
        """
        value = self._value(key)
        if value is _UNREADABLE:
            return 1
        value = absent if value is _ABSENT else null if value is None else value
        name = str(value).removeprefix("torch.")
        if name not in DTYPE_BYTES:
            known = ", ".join(DTYPE_BYTES)
            self.complain(
                key, f"{key}={_shown(value)} is not a dtype that verl knows. Write {key}={absent}, or one of {known}."
            )
            return 1
        return DTYPE_BYTES[name]

    def _value(self, key: str) -> Any:
        node, path = self._tree, ""
        for name in key.split("."):
            if node is None or node == "???":
                return _ABSENT
            if not isinstance(node, dict):
                self.complain(path, f"{path}={node} is not a group of keys. Leave {path}={node} out.")
                return _UNREADABLE
            if name not in node:
                return _ABSENT
            node, path = node[name], f"{path}.{name}" if path else name
        return _ABSENT if node == "???" else node

    def _whole(self, key: str, value: Any, least: int | None) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least):
            return value
        kind = "a whole number" if least is None else f"a whole number of at least {least}"
        if value is None or value is _ABSENT or value is _UNREADABLE:
            self._wrong(key, value, kind, f"{key}={'NUMBER' if least is None else f'{least} or more'}")
        elif complaint := complaint_about(key, value, least):
            self.complain(key, complaint)
        return max(1, least or 1)

    def _wrong(self, key: str, value: Any, kind: str, way: str) -> None:
        if value is _UNREADABLE:
            return
        if value is None or value is _ABSENT:
            self.complain(key, f"{key} has no value, and must be {kind}. Write {way}.")
        else:
            self.complain(key, f"{key}={value} is not {kind}. Write {way}.")


def _shown(value: Any) -> str:
    """A value as the command line would have it."""
    return "null" if value is None else str(value)
