"""A tiny model, questions, and settings to evaluate the one on the others."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.evaluations import TEMPLATE, write_data

if TYPE_CHECKING:  # the statistics' tests need no torch
    from entropy_fork.evaluation import evaluate as evaluation


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 that writes characters, 7 tokens on average or so."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    letters = ["<end>", *string.digits, *string.ascii_lowercase, *"\\{}+= "]
    spelt = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<end>"))
    spelt.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    spelt.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelt, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(letters), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, intermediate_size=64, max_position_embeddings=64, initializer_range=0.3, eos_token_id=0,
        tie_word_embeddings=False, bos_token_id=None, dtype="bfloat16",
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data.parquet", ["aime24"] * 5 + ["cpu"] * 4)


@pytest.fixture
def settings(model: Path, data: Path, tmp_path: Path) -> Callable[..., evaluation.EvaluationSettings]:
    from entropy_fork.evaluation import evaluate as evaluation
    from entropy_fork.evaluation.engines import SamplingSettings

    def make(**changes: Any) -> evaluation.EvaluationSettings:
        sampling = SamplingSettings(max_tokens=12) if "sampling" not in changes else changes.pop("sampling")
        fixed = {"model": model, "data": [data], "output": tmp_path / "out", "answers": 4, "engine": "transformers"}
        return evaluation.EvaluationSettings(**{**fixed, "batch_size": 4, "sampling": sampling, **changes})

    return make
