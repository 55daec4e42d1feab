"""From a GGUF file of SmolLM2 to a Hugging Face folder.

transformers reads the weights. It also reads tokenizers out of GGUF files, but what it makes of this one is not the
model's: ``<|im_start|>`` ends a text, so that no answer ends, and two line breaks before a number become other tokens.
So the tokenizer is made here, of the tokens and merges in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.progress import Task, track

#: what GGUF calls the way in which SmolLM2's tokenizer parts a text before it looks for merges
PRE_TOKENIZER = "smollm"

#: GGUF's number for tokens that are signs to the model, such as the end of a message
_CONTROL = 3

BEGIN, END, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


@dataclass(frozen=True)
class Facts:
    """What the file says of itself, for the card.

    Attributes:
        name: the model's name in the file.
        licence: likewise.
        parameters: how many there are.
        formats: in which form weights are stored there, and how many parameters are stored so.
    """

    name: str
    licence: str
    parameters: int
    formats: dict[str, int]


def write_folder(gguf: Path, folder: Path, shown: Task) -> Facts:
    """Write weights, configuration and tokenizer.

    Args:
        gguf: the file.
        folder: an existing folder.
        shown: what is being done, for the display.

    Raises:
        EntropyForkError: the file is no GGUF, or holds another kind of model or tokenizer.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
    except (ValueError, IndexError) as error:
        raise EntropyForkError(f"{gguf.name} is no GGUF file ({error})") from None
    kind = _field(reader, "general.architecture"), _field(reader, "tokenizer.ggml.pre")
    if kind != ("llama", PRE_TOKENIZER):
        raise EntropyForkError(
            f"{gguf.name} is a model of the kind {kind[0]} with a tokenizer of the kind {kind[1]}, and this reads only "
            f"llama with {PRE_TOKENIZER}"
        )
    tokenizer = tokenizer_of(reader)
    tokenizer.save_pretrained(folder)
    with _without_bars():
        model = _model(gguf)
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    shown.say("writing the weights")
    with _without_bars():
        model.save_pretrained(folder)
    formats: dict[str, int] = {}
    for tensor in reader.tensors:
        formats[tensor.tensor_type.name] = formats.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return Facts(
        str(_field(reader, "general.name")), str(_field(reader, "general.license")), sum(formats.values()), formats
    )


def tokenizer_of(reader: Any) -> Any:
    """The tokenizer in an open file, as a ``PreTrainedTokenizerFast``.

    Bytes are the alphabet. White space, digits and words are parted as in llama.cpp's kind ``smollm``: every digit is a
    piece of its own, and the rest is parted as in GPT-2. A text becomes the same text again, but for the few control
    characters that the vocabulary lacks.

    Raises:
        EntropyForkError: the vocabulary lacks one of the tokens that begin and end messages.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in _field(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if missing := [token for token in (BEGIN, END, UNKNOWN) if token not in vocabulary]:
        raise EntropyForkError(f"the vocabulary has no {', '.join(missing)}")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        unk_token=UNKNOWN,
        chat_template=_field(reader, "tokenizer.chat_template"),
        model_max_length=int(_field(reader, "llama.context_length")),
        clean_up_tokenization_spaces=False,
    )


def _model(gguf: Path) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    for surplus in ("_model_name_or_path", "unk_token_id"):  # names of the file's own
        model.config.__dict__.pop(surplus, None)
    return model


def _field(reader: Any, name: str) -> Any:
    """A value of the file; None if it has none of that name."""
    field = reader.get_field(name)
    return None if field is None else field.contents()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Draw none of transformers' bars. The display of the command counts the tensors in their place."""
    from transformers import modeling_gguf_pytorch_utils as reading
    from transformers.utils import logging

    drawn, bar = logging.is_progress_bar_enabled(), getattr(reading, "tqdm", None)
    logging.disable_progress_bar()
    reading.tqdm = lambda tensors, **_: track("turning the weights into floats", tensors)
    try:
        yield
    finally:
        reading.tqdm = bar
        if drawn:
            logging.enable_progress_bar()
