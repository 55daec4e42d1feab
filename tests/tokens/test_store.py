"""The folder of token records: what is written can be read again, in whole parts only, for any text of a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.tokens.store import (
    OPTIONAL,
    AnswerTokens,
    delete_part,
    known_columns,
    parts,
    read_answer_columns,
    read_answers,
    read_columns,
    read_manifest,
    token_pieces,
    write_manifest,
    write_part,
    write_selected,
)

HOSTILE = [
    "<script>alert(1)</script>",
    "\x00\x07",
    "\u202eright to left",
    "a" * 5000,
    "\ud800 half a pair",
    "",
    "\r",
    "🙂",
]


def answer(number: int, length: int, **values: object) -> AnswerTokens:
    draw = np.random.default_rng(number)
    return AnswerTokens(
        prompt=f"prompt {number}",
        text=f"text {number}",
        token_ids=draw.integers(0, 150_000, length).astype(np.int32),
        pieces=[HOSTILE[n % len(HOSTILE)] for n in range(length)],
        entropy=draw.random(length, dtype=np.float32),
        log_prob=-draw.random(length, dtype=np.float32),
        answer=number,
        **values,  # type: ignore[arg-type]
    )


def same(there: AnswerTokens, now: AnswerTokens) -> bool:
    def plain(value: object) -> object:
        if isinstance(value, np.ndarray):
            return value.dtype, value.tolist()
        clean = [text.encode("utf-8", "replace").decode() for text in value] if isinstance(value, list) else value
        return clean.encode("utf-8", "replace").decode() if isinstance(clean, str) else clean

    return {k: plain(v) for k, v in vars(there).items()} == {k: plain(v) for k, v in vars(now).items()}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    written = [
        answer(0, 7, rank=np.arange(7, dtype=np.int32), selected=np.arange(7) % 2 == 0, step=3, score=0.5),
        answer(1, 0),
        answer(2, 9, data_source="aime", ground_truth="\ud8004", truncated=True, prompt_ids=np.array([1, 2], np.int32)),
        answer(5, 1),
    ]
    write_manifest(tmp_path, {"source": "model", "threshold": float("nan")})
    write_part(tmp_path, 0, written[:2][::-1])
    write_part(tmp_path, 3, written[2:])
    found = list(read_answers(tmp_path))
    assert [one.answer for one in found] == [0, 1, 2, 5]
    empty = found.pop(1)
    assert len(empty.token_ids) == len(empty.pieces) == 0
    assert all(same(*pair) for pair in zip([written[0], *written[2:]], found, strict=True))
    assert read_manifest(tmp_path) == {"format": 1, "source": "model", "threshold": None}
    positions, entropy = read_columns(tmp_path, 3, "position", "entropy")
    assert positions.tolist() == [*range(9), 0]
    assert entropy.tolist() == [*written[2].entropy.tolist(), *written[3].entropy.tolist()]


def test_a_selection_replaces_nothing_else(tmp_path: Path) -> None:
    write_manifest(tmp_path, {})
    write_part(tmp_path, 0, [answer(0, 3), answer(1, 2)])
    before = pq.read_table(tmp_path / "tokens" / "part-00000.parquet")
    write_selected(tmp_path, 0, np.array([True, False, False, True, True]))
    after = pq.read_table(tmp_path / "tokens" / "part-00000.parquet")
    assert after.drop(["selected"]).equals(before.drop(["selected"]))
    assert after.schema.equals(before.schema)
    assert [one.selected.tolist() for one in read_answers(tmp_path) if one.selected is not None] == [
        [True, False, False],
        [True, True],
    ]


#: the columns of a part's tokens, as versions wrote and read them that knew no other score than the entropy
FIRST_COLUMNS = ["answer", "position", "token_id", "piece", "entropy", "log_prob", "rank", "selected"]


def test_what_other_scores_read_is_kept_where_it_is_known(tmp_path: Path) -> None:
    def values(seed: int, length: int) -> np.ndarray:
        return np.random.default_rng(seed).normal(size=length).astype(np.float32)

    written = [
        answer(0, 4, advantage=values(0, 4), rollout_log_prob=values(1, 4)),
        answer(1, 3, ref_log_prob=values(2, 3), advantage=values(3, 3)),
        answer(2, 2),
    ]
    write_part(tmp_path, 0, written[:2])
    write_part(tmp_path, 1, written[2:])
    write_manifest(tmp_path, {})
    names = [pq.read_schema(tmp_path / "tokens" / f"part-0000{part}.parquet").names for part in range(2)]
    assert names == [[*FIRST_COLUMNS, "advantage", "ref_log_prob", "rollout_log_prob"], FIRST_COLUMNS]
    # this version reads both, and an older one, which takes its columns by name, reads the newer part
    assert all(same(*pair) for pair in zip(written, read_answers(tmp_path), strict=True))
    table = pq.read_table(tmp_path / "tokens" / "part-00000.parquet")
    assert table.column("entropy").to_pylist() == [*written[0].entropy.tolist(), *written[1].entropy.tolist()]
    assert pq.read_table(tmp_path / "tokens" / "part-00000.parquet", columns=FIRST_COLUMNS).num_columns == 8
    # known is what every token has
    assert known_columns(tmp_path, OPTIONAL) == []
    assert known_columns(tmp_path, FIRST_COLUMNS[:6]) == FIRST_COLUMNS[:6]
    delete_part(tmp_path, 1)
    assert known_columns(tmp_path, OPTIONAL) == ["advantage"]
    write_part(tmp_path, 7, [answer(9, 0)])  # lacks nothing
    assert known_columns(tmp_path, OPTIONAL) == ["advantage"]
    assert read_answer_columns(tmp_path, 0, "answer", "tokens", "step") == [[0, 1], [4, 3], [None, None]]
    with pytest.raises(ValueError, match="columns have different lengths"):
        answer(0, 4, advantage=values(0, 3))


def test_a_part_is_there_when_both_files_are(tmp_path: Path) -> None:
    for number in (0, 1, 10):
        write_part(tmp_path, number, [answer(number, 2)])
    (tmp_path / "answers" / "part-00001.parquet").unlink()
    (tmp_path / "tokens" / ".part-00007.parquet.55").write_text("half")
    assert parts(tmp_path) == [0, 10]
    assert parts(tmp_path / "nowhere") == []


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(EntropyForkError, match=r"no folder .*none: name a folder that 'entropy-fork analyze'"):
        read_manifest(tmp_path / "none")
    with pytest.raises(EntropyForkError, match=r"has no tokens"):
        list(read_answers(tmp_path))
    for content, message in (
        ("{", "cannot be read"),
        ('{"identity": {}}', "manifest of something else"),
        ("[1]", "manifest of something else"),
        ('{"format": 2}', "in format 2, and this version of Entropy Fork reads format 1"),
    ):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(EntropyForkError, match=message):
            read_manifest(tmp_path)
    write_manifest(tmp_path, {})
    write_part(tmp_path, 0, [answer(0, 2)])
    (tmp_path / "other").mkdir()
    write_part(tmp_path / "other", 0, [answer(1, 2)])
    (tmp_path / "other" / "tokens" / "part-00000.parquet").rename(tmp_path / "tokens" / "part-00000.parquet")
    with pytest.raises(EntropyForkError, match=r"part 0 of .*: the tokens are not those of its answers"):
        list(read_answers(tmp_path))
    (tmp_path / "tokens" / "part-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(EntropyForkError, match=r"part-00000\.parquet cannot be read"):
        list(read_answers(tmp_path))
    with pytest.raises(ValueError, match="columns have different lengths"):
        AnswerTokens("", "", np.zeros(2), ["a"], np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match="two answers with the same id"):
        write_part(tmp_path, 1, [answer(0, 2), answer(0, 2)])


# ---- pieces, over kinds of tokenizers


def byte_level() -> PreTrainedTokenizerFast:
    vocabulary = {symbol: n for n, symbol in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end|>"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama's: it has a sign for the space, and bytes for characters without a token."""
    vocabulary = {"<unk>": 0, "▁a": 1, "b": 2, "▁": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20))
def test_pieces_of_bytes_joined_are_the_text(text: str) -> None:
    tokenizer = byte_level()
    pieces = token_pieces(tokenizer, tokenizer(text)["input_ids"])
    shown = "".join(c if ord(c) < 128 else "".join(f"<0x{byte:02X}>" for byte in c.encode()) for c in text)
    assert "".join(pieces) == shown


def test_pieces_of_other_tokenizers() -> None:
    bytes_ = byte_level()
    assert token_pieces(bytes_, []) == []
    assert token_pieces(bytes_, [256, 9999, 256]) == ["<|end|>", "<id 9999>", "<|end|>"]
    sentence = byte_fallback()
    assert token_pieces(sentence, [1, 2, 1, 4 + 0x0A, 4 + 0xE2, 3]) == [" a", "b", " a", "\n", "<0xE2>", " "]
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "fork": 1, "##ing": 2}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece(cleanup=False)
    assert token_pieces(PreTrainedTokenizerFast(tokenizer_object=words), [1, 2]) == [" fork", "ing"]


def test_a_token_with_whole_characters_and_a_part_of_one_shows_both() -> None:
    vocabulary = {"Ġ": 0, "â": 1, "Ġâ": 2}  # 'â' is how a byte-level vocabulary writes the byte E2
    backend = Tokenizer(models.BPE(vocabulary, [("Ġ", "â")]))
    backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    assert token_pieces(PreTrainedTokenizerFast(tokenizer_object=backend), [2, 1]) == [" <0xE2>", "<0xE2>"]


def test_a_manifest_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_manifest(tmp_path, {"what": object()})
    assert not list(tmp_path.iterdir())
    write_manifest(tmp_path / "new", {"threshold": 0.5})
    assert json.loads((tmp_path / "new" / "manifest.json").read_text())["threshold"] == 0.5
