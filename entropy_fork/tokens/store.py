"""A folder of response tokens with their entropies. Training and the analyses write it, analyses and report read it.

::

    FOLDER/manifest.json               where the tokens come from, T, ρ, the threshold
    FOLDER/answers/part-00000.parquet  one row per answer: prompt, text, score, …
    FOLDER/tokens/part-00000.parquet   one row per response token, sorted by (answer, position)

Part n of both tables has the same answers. A part counts when both of its files exist under their final names, so a
process that is killed leaves only whole parts behind. One part is in memory at a time.

A part may lack the columns :data:`OPTIONAL`, as all parts of older versions do. Readers take the columns that they know
by name, so an older version reads newer parts too.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.output_folder import write_whole

FORMAT = 1
MANIFEST, ANSWERS, TOKENS = "manifest.json", "answers", "tokens"

#: float32 columns that a part has only where they are known: what scores other than the entropy are made of
OPTIONAL = ("advantage", "ref_log_prob", "rollout_log_prob", "sum_pi_squared")

_PART = re.compile(r"part-(\d{5,})\.parquet")


@dataclass(frozen=True)
class AnswerTokens:
    """One answer, and what is known about each of its response tokens. All arrays have the shape (tokens,).

    Attributes:
        prompt, text: what the model read and wrote.
        token_ids: int32, ids of the response, the end token included.
        pieces: the text of each token for display, see :func:`token_pieces`.
        entropy: float32, nats: H_t of the distribution that the token was drawn from (arXiv 2506.01939, Eq. 1).
        log_prob: float32, nats: log-probability of the token itself.
        rank: int32, how many tokens were likelier, 0 for the likeliest; None if it was not computed.
        selected: bool, whether the token was selected; None before a selection was made.
        answer: number of the answer, unique in its folder.
        step: step of a training run; None for other tokens.
        data_source, ground_truth, score, truncated: as in verl's data and rewards; None if unknown.
        prompt_ids: int32, shape (prompt tokens,): the prompt as the model read it; None if only its text is known.
        advantage: float32, as verl computed it; None if it is not known, as for the three below.
        ref_log_prob, rollout_log_prob: float32, nats: the token's log-probability under the reference policy, and in
            the rollout engine.
        sum_pi_squared: float32: the sum of the squared probabilities of all tokens that could have come next.

    Raises:
        ValueError: columns have different lengths.
    """

    prompt: str
    text: str
    token_ids: np.ndarray
    pieces: Sequence[str]
    entropy: np.ndarray
    log_prob: np.ndarray
    rank: np.ndarray | None = None
    selected: np.ndarray | None = None
    answer: int = 0
    step: int | None = None
    data_source: str | None = None
    ground_truth: str | None = None
    score: float | None = None
    truncated: bool | None = None
    prompt_ids: np.ndarray | None = None
    advantage: np.ndarray | None = None
    ref_log_prob: np.ndarray | None = None
    rollout_log_prob: np.ndarray | None = None
    sum_pi_squared: np.ndarray | None = None

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self._columns().items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"answer {self.answer}: columns have different lengths: {lengths}")

    def _columns(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _PER_TOKEN if getattr(self, name) is not None}


_PER_TOKEN = ("token_ids", "pieces", "entropy", "log_prob", "rank", "selected", *OPTIONAL)


def write_part(folder: Path, number: int, answers: Sequence[AnswerTokens]) -> None:
    """Write some answers as one part, whole or not at all. An older part of this number is replaced.

    Raises:
        ValueError: two answers have the same id.
    """
    import pyarrow as pa

    answers = sorted(answers, key=lambda answer: answer.answer)
    ids = [answer.answer for answer in answers]
    if len(set(ids)) < len(ids):
        raise ValueError(f"part {number} of {folder} has two answers with the same id")
    lengths = np.array([len(answer.token_ids) for answer in answers], dtype=np.int64)
    known = [name for name in OPTIONAL if any(getattr(answer, name) is not None for answer in answers)]
    answer_schema, token_schema = _schemas(tuple(known))

    def joined(name: str) -> Any:
        field = token_schema.field(name)
        return pa.chunked_array([pa.array(_column(answer, name), field.type) for answer in answers], field.type)

    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    tokens = [
        pa.array(np.repeat(np.array(ids, dtype=np.int64), lengths)),
        pa.array((np.arange(lengths.sum()) - starts).astype(np.int32)),
        *(joined(name) for name in token_schema.names[2:]),
    ]
    rows = [
        {
            "answer": answer.answer,
            "step": answer.step,
            "prompt": _storable(answer.prompt),
            "text": _storable(answer.text),
            "data_source": _storable(answer.data_source),
            "ground_truth": _storable(answer.ground_truth),
            "score": answer.score,
            "truncated": answer.truncated,
            "tokens": int(length),
            "prompt_ids": None if answer.prompt_ids is None else np.asarray(answer.prompt_ids, dtype=np.int32),
        }
        for answer, length in zip(answers, lengths, strict=True)
    ]
    _write(pa.table(tokens, schema=token_schema), _file(folder, TOKENS, number))
    _write(pa.Table.from_pylist(rows, schema=answer_schema), _file(folder, ANSWERS, number))


def read_answers(folder: Path) -> Iterator[AnswerTokens]:
    """All answers of all complete parts, in order.

    Raises:
        EntropyForkError: ``folder`` has no tokens, or a part of it cannot be read.
    """
    read_manifest(folder)
    for number in parts(folder):
        yield from read_part(folder, number)


def read_part(folder: Path, number: int) -> list[AnswerTokens]:
    """The answers of one part.

    Raises:
        EntropyForkError: the part cannot be read, or its two files do not belong together.
    """
    answers = _read(_file(folder, ANSWERS, number)).to_pylist()
    table = _read(_file(folder, TOKENS, number)).combine_chunks()
    ends = np.cumsum([row["tokens"] for row in answers], dtype=np.int64)
    ids = np.repeat([row["answer"] for row in answers], [row["tokens"] for row in answers])
    if not np.array_equal(ids, table.column("answer").to_numpy()):
        raise EntropyForkError(
            f"part {number} of {folder}: the tokens are not those of its answers, sorted by (answer, position): delete "
            f"both of its files and repeat the command that wrote them"
        )
    in_file = {name: {"token_ids": "token_id", "pieces": "piece"}.get(name, name) for name in _PER_TOKEN}
    there = set(table.column_names)
    columns = {name: table.column(other) for name, other in in_file.items() if other in there or name not in OPTIONAL}
    found = []
    for row, start in zip(answers, [0, *ends], strict=False):
        length, prompt_ids = row.pop("tokens"), row.pop("prompt_ids")
        mine = {name: _values(column.slice(start, length)) for name, column in columns.items()}
        row["prompt_ids"] = None if prompt_ids is None else np.array(prompt_ids, dtype=np.int32)
        found.append(AnswerTokens(**row, **mine))
    return found


def read_columns(folder: Path, number: int, *names: str) -> list[np.ndarray]:
    """Some columns of the token table of one part, each of shape (tokens of the part,).

    Only these columns are read, so that a pass over millions of tokens is quick.
    """
    table = _read(_file(folder, TOKENS, number), list(names))
    return [table.column(name).to_numpy() for name in names]


def known_columns(folder: Path, names: Sequence[str]) -> list[str]:
    """The columns that have a value for every token of a folder.

    A folder that several versions of this package wrote may have a column in some parts only.

    Args:
        folder: of tokens.
        names: columns of the token table.
    """
    import pyarrow.compute as pc

    known = list(names)
    for number in parts(folder):
        file = _file(folder, TOKENS, number)
        size, there = _rows_and_columns(file)
        if size:  # a part without tokens lacks nothing
            known = [name for name in known if name in there]
            table = _read(file, known)
            known = [name for name in known if not pc.any(pc.is_null(table.column(name))).as_py()]
    return known


def read_answer_columns(folder: Path, number: int, *names: str) -> list[list[Any]]:
    """Some columns of the answer table of one part, each a list with one value per answer.

    Args:
        folder: of tokens.
        number: of the part.
        names: columns: ``answer``, ``step``, ``tokens``, …
    """
    table = _read(_file(folder, ANSWERS, number), list(names))
    return [table.column(name).to_pylist() for name in names]


def parts(folder: Path) -> list[int]:
    """The numbers of the complete parts, ascending."""
    tokens, answers = (
        {int(found[1]) for file in (folder / kind).glob("part-*") if (found := _PART.fullmatch(file.name))}
        for kind in (TOKENS, ANSWERS)
    )
    return sorted(tokens & answers)


def num_answers(folder: Path, number: int) -> int:
    """The number of answers in one part, without reading them."""
    import pyarrow.parquet as pq

    return pq.read_metadata(_file(folder, ANSWERS, number)).num_rows


def write_selected(folder: Path, number: int, selected: np.ndarray) -> None:
    """Replace the column ``selected`` of one part: bool, shape (tokens of the part,)."""
    import pyarrow as pa

    file = _file(folder, TOKENS, number)
    table = _read(file)
    place = table.column_names.index("selected")
    _write(table.set_column(place, table.schema.field(place), pa.array(selected, pa.bool_())), file)


def delete_part(folder: Path, number: int) -> None:
    """Delete one part. Its answers go first: without them the part does not count, even if the rest stays."""
    for kind in (ANSWERS, TOKENS):
        _file(folder, kind, number).unlink(missing_ok=True)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest.json``, whole or not at all; ``format`` is added. Floats that JSON does not have become null."""
    folder.mkdir(parents=True, exist_ok=True)
    values = json.loads(json.dumps({"format": FORMAT, **manifest}), parse_constant=lambda _: None)
    write_whole(folder / MANIFEST, json.dumps(values, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of tokens: where they come from, T, ρ, the threshold.

    Raises:
        EntropyForkError: there is no folder, it has no tokens, or they are in another format.
    """
    file = folder / MANIFEST
    advice = "name a folder that 'entropy-fork analyze' or a training run with entropy_fork.dump_every has written"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = f"{folder} has no tokens (no {MANIFEST})" if folder.is_dir() else f"there is no folder {folder}"
        raise EntropyForkError(f"{what}: {advice}") from error
    except (OSError, ValueError) as error:
        raise EntropyForkError(f"{file} cannot be read ({error}): {advice}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found is None:
        raise EntropyForkError(f"{file} is a manifest of something else: {advice}")
    if found != FORMAT:
        raise EntropyForkError(
            f"{folder} has tokens in format {found}, and this version of Entropy Fork reads format {FORMAT}: write "
            f"the folder again, or install the version that wrote it"
        )
    return manifest


def token_pieces(tokenizer: Any, token_ids: Sequence[int] | np.ndarray) -> list[str]:
    """What each token adds to the text, for display.

    Joined, the pieces are the answer's text with its special tokens. There are two exceptions. If a character is spread
    over several tokens, each of its bytes is shown as ``<0xE2>``. An id that the tokenizer does not know is shown as
    ``<id 151700>``: a model can have more rows than its tokenizer has tokens.

    Args:
        tokenizer: a tokenizer of transformers of any kind (byte-level, SentencePiece with byte fallback, WordPiece, …).
        token_ids: int, shape (tokens,): the ids of one answer.
    """
    ids, place = np.unique(np.asarray(token_ids, dtype=np.int64), return_inverse=True)
    if not len(ids):
        return []
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    names = tokenizer.convert_ids_to_tokens(ids.tolist())
    is_byte_level = _is_byte_level(tokenizer)

    def piece(number: int, name: str | None) -> str:
        if number in added:
            return added[number]
        if name is None:
            return f"<id {number}>"
        if is_byte_level and all(character in _byte_of() for character in name):
            return bytes(_byte_of()[character] for character in name).decode("utf-8", _SHOWN)
        if found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name):
            return bytes.fromhex(found[1]).decode("utf-8", _SHOWN)
        # Decode the token twice in a row: many decoders treat the first token of a text differently (space, ##).
        once, twice = (tokenizer.decode([number] * n, clean_up_tokenization_spaces=False) for n in (1, 2))
        return twice[len(once) :]

    pieces = np.array([piece(*pair) for pair in zip(ids.tolist(), names, strict=True)], dtype=object)
    return pieces[place].tolist()


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hasattr(tokenizer, "byte_decoder")
    return backend.decoder is not None and b'"ByteLevel"' in backend.decoder.__getstate__()


@cache
def _byte_of() -> dict[str, int]:
    """The alphabet of byte-level tokenizers: printable bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _show_bytes(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"<0x{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


_SHOWN = "entropy_fork.show_bytes"
codecs.register_error(_SHOWN, _show_bytes)


@cache
def _schemas(optional: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """The columns of both tables. ``optional``: those of :data:`OPTIONAL` that the part has."""
    import pyarrow as pa

    answers = pa.schema(
        [
            pa.field("answer", pa.int64(), nullable=False),
            ("step", pa.int32()),
            pa.field("prompt", pa.string(), nullable=False),
            pa.field("text", pa.string(), nullable=False),
            ("data_source", pa.string()),
            ("ground_truth", pa.string()),
            ("score", pa.float32()),
            ("truncated", pa.bool_()),
            pa.field("tokens", pa.int32(), nullable=False),
            ("prompt_ids", pa.list_(pa.int32())),
        ]
    )
    tokens = pa.schema(
        [
            pa.field("answer", pa.int64(), nullable=False),
            pa.field("position", pa.int32(), nullable=False),
            pa.field("token_id", pa.int32(), nullable=False),
            pa.field("piece", pa.string(), nullable=False),
            pa.field("entropy", pa.float32(), nullable=False),
            pa.field("log_prob", pa.float32(), nullable=False),
            ("rank", pa.int32()),
            ("selected", pa.bool_()),
            *((name, pa.float32()) for name in optional),
        ]
    )
    return answers, tokens


def _column(answer: AnswerTokens, name: str) -> Any:
    if name == "piece":
        return [_storable(piece) for piece in answer.pieces]
    values = getattr(answer, {"token_id": "token_ids"}.get(name, name))
    if values is None:
        return [None] * len(answer.token_ids)
    kinds = {"token_id": np.int32, "rank": np.int32, "selected": np.bool_}
    return np.asarray(values).astype(kinds.get(name, np.float32))


def _storable(text: str | None) -> str | None:
    """Text that UTF-8 can express: half of a surrogate pair, which JSON can have, becomes a question mark."""
    return None if text is None else text.encode("utf-8", errors="replace").decode("utf-8")


def _values(column: Any) -> Any:
    """One answer's part of a column: a numpy array, or a list of strings; None if it has no values."""
    import pyarrow as pa

    if pa.types.is_string(column.type):
        return column.to_pylist()
    return None if len(column) and column.null_count == len(column) else column.to_numpy()


def _file(folder: Path, kind: str, number: int) -> Path:
    return folder / kind / f"part-{number:05d}.parquet"


def _write(table: Any, file: Path) -> None:
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        pq.write_table(table, temporary, compression="zstd")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _read(file: Path, columns: list[str] | None = None) -> Any:
    import pyarrow.parquet as pq

    with _readable(file):
        return pq.read_table(file, columns=columns)


def _rows_and_columns(file: Path) -> tuple[int, list[str]]:
    import pyarrow.parquet as pq

    with _readable(file):
        found = pq.read_metadata(file)
    return found.num_rows, list(found.schema.names)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise EntropyForkError(
            f"{file} cannot be read ({error}): delete it and repeat the command that wrote it"
        ) from error
