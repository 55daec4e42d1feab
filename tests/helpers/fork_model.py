"""A Qwen3 with known forks: the next character is uniform over a few given successors of the last character.

Attention and MLP add nothing, and embeddings are unit vectors. A column of the head has one number for the successors
of a character and a lower one for all others. So the entropy after a character with k successors is log k.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

LETTERS = ["<end>", *string.digits, *string.ascii_lowercase, *"\\{}+= $"]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
#: how far a logit is below those of the successors; such a character has about e^-40 of a successor's probability
LOW = 40.0


def tokenizer() -> PreTrainedTokenizerFast:
    spelt = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="<end>"))
    spelt.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    spelt.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=spelt, eos_token="<end>", pad_token="<end>")
    made.chat_template = TEMPLATE
    return made


def random_model(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A random Qwen3 with this vocabulary."""
    torch.manual_seed(seed)
    Qwen3ForCausalLM(_config(**changes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def fork_model(folder: Path, successors: Mapping[str, str]) -> Path:
    """A model with these forks. After a character that is not in ``successors`` the answer ends."""
    model = Qwen3ForCausalLM(_config())
    size = len(LETTERS)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, model.config.hidden_size))
        head = model.lm_head.weight
        head.fill_(-LOW)
        for number, letter in enumerate(LETTERS):
            for following in successors.get(letter, ["<end>"]):
                head[LETTERS.index(following), number] = 0.0
        head.div_(model.config.hidden_size**0.5)  # the last norm multiplies a unit vector by this
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _config(**changes: object) -> Qwen3Config:
    values = {
        "vocab_size": len(LETTERS), "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64, "max_position_embeddings": 128,
        "initializer_range": 0.3, "eos_token_id": 0, "bos_token_id": None, "tie_word_embeddings": False,
        "dtype": "float32",
    }  # fmt: skip
    return Qwen3Config(**{**values, **changes})
