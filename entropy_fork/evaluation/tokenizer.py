"""Load a model's tokenizer, or say that there is none.

transformers 5 makes an empty tokenizer where a folder has no files of one: every prompt would have no tokens. So its
vocabulary is looked at. An evaluation does this before it merges shards or loads weights.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.evaluation.checkpoint import code_refused

#: the files of a tokenizer, by the names that transformers gives them
FILES = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "special_tokens_map.json", "*.tiktoken", "*.jinja")


def load_tokenizer(folder: Path, trusted: bool = False) -> Any:
    """The tokenizer in a folder.

    Args:
        folder: a Hugging Face folder.
        trusted: whether code in the folder may run (``trust_remote_code``).

    Raises:
        EntropyForkError: there is no tokenizer, it cannot be read, or its vocabulary is empty.
    """
    from transformers import AutoTokenizer

    way_out = "copy the tokenizer's files there, or name a folder that has them with --tokenizer FOLDER"
    if not folder.is_dir():
        raise EntropyForkError(f"there is no tokenizer: no folder {folder}: {way_out}")
    try:
        with code_refused(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    except EntropyForkError:
        raise
    except Exception as error:  # each kind of tokenizer has its own
        if not _files(folder):
            raise EntropyForkError(f"{folder} has no tokenizer: {way_out}") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EntropyForkError(f"the tokenizer in {folder} cannot be read ({reason}): {way_out}") from error
    added = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}  # Mistral's has no such method
    if not set(tokenizer.get_vocab()) - set(added) - set(tokenizer.all_special_tokens):
        found = ", ".join(file.name for file in _files(folder))
        raise EntropyForkError(
            f"{folder} has no tokenizer: {way_out}"
            if not found
            else f"the tokenizer in {folder} has no vocabulary (there is {found}): {way_out}"
        )
    return tokenizer


def tokenizer_checksum(folder: Path) -> str:
    """sha256 of a tokenizer's files."""
    digest = hashlib.sha256()
    for file in _files(folder):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted({file for kind in FILES for file in folder.glob(kind) if file.is_file()})
