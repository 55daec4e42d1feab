"""Reads the size of a model from its config: builds the model on the meta device and takes each parameter's shape.

No weights are read and no memory is used: tensors on ``torch.device("meta")`` have a shape and no values.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from entropy_fork.common.errors import EntropyForkError

BUILT_IN_DIR = Path(__file__).parent / "model_shapes"

#: the context of Qwen3's base models, tokens; the shape files have that of the chat models
QWEN3_BASE_POSITIONS = 32768


@dataclass(frozen=True)
class Parameter:
    """One weight: its name in the model and its shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """A causal language model's sizes.

    Attributes:
        source: where they come from, in words.
        hidden, layers, intermediate, heads, kv_heads, head_dim, vocab: as in the model's ``config.json``. For a mixture
            of experts ``intermediate`` is what one token passes through.
        tied: whether the LM head is the embedding.
        max_positions: the model's context, tokens.
        experts: experts per layer, 0 for a dense model.
        parameters: every weight once (a tied head is not listed again).
        linears: (in, out) of each linear layer but the LM head: what LoRA's ``all-linear`` adapts.
    """

    source: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    max_positions: int
    experts: int
    parameters: tuple[Parameter, ...]
    linears: tuple[tuple[int, int], ...]

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters."""
        return sum(parameter.count for parameter in self.parameters)

    @property
    def num_layer_parameters(self) -> int:
        """Elements of the largest decoder layer."""
        per_layer: dict[str, int] = {}
        for parameter in self.parameters:
            if match := re.search(r"\blayers\.(\d+)\.", parameter.name):
                per_layer[match[1]] = per_layer.get(match[1], 0) + parameter.count
        return max(per_layer.values(), default=0)

    @property
    def num_head_parameters(self) -> int:
        """Elements of the LM head, also where it is tied to the embedding."""
        return self.vocab * self.hidden

    def lora_parameters(self, rank: int) -> tuple[Parameter, ...]:
        """The adapters of ``target_modules=all-linear``: A (rank, in) and B (out, rank), for each linear layer."""
        return tuple(
            Parameter(f"lora.{i}.{which}", shape)
            for i, (size_in, size_out) in enumerate(self.linears)
            for which, shape in (("A", (rank, size_in)), ("B", (size_out, rank)))
        )


def built_in_names() -> list[str]:
    """The shapes that this install ships, for planning on a machine that cannot reach a model."""
    return sorted(path.stem for path in BUILT_IN_DIR.glob("*.json"))


def find_model_shape(path: str | None, model_config: str | None = None, trust_remote_code: bool = False) -> ModelShape:
    """Find the sizes of the model that a run names.

    The places are tried in this order: ``model_config`` (a file, a folder with a ``config.json``, or a built-in name);
    the local folder ``path``; the built-in shape whose name ``path`` ends in; the hub.

    Raises:
        EntropyForkError: none of them can be read; with what to write instead.
    """
    if model_config is not None:
        name = model_config.lower()
        if name in built_in_names():
            return _built_in(name, model_config)
        file = Path(model_config).expanduser()
        file = file / "config.json" if file.is_dir() else file
        if not file.is_file():
            raise EntropyForkError(
                f"--model-config {model_config}: there is no such file, no config.json in such a folder, and it is "
                f"none of the built-in shapes {', '.join(built_in_names())}"
            )
        return shape_of_config(_read(file), str(file))
    instead = (
        f"write --model-config PATH of a config.json, or one of the built-in shapes: --model-config "
        f"{'|'.join(built_in_names())}"
    )
    if path is None:
        raise EntropyForkError(f"actor_rollout_ref.model.path is not set; to plan without it, {instead}")
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise EntropyForkError(f"actor_rollout_ref.model.path={path} is a folder without a config.json")
        return shape_of_config(_auto_config(str(folder), trust_remote_code), str(folder / "config.json"))
    if (like := _named_like(path)) is not None:
        return _built_in(like, path)
    if path.startswith(("/", "~", ".")) or "://" in path:
        raise EntropyForkError(f"actor_rollout_ref.model.path={path} is not on this machine; {instead}")
    try:
        config = _auto_config(path, trust_remote_code)
    except Exception as error:  # the hub's client has many
        raise EntropyForkError(
            f"actor_rollout_ref.model.path={path} is not a folder on this machine, and could not be read from the hub "
            f"({type(error).__name__}); {instead}"
        ) from None
    return shape_of_config(config, f"{path} on the hub")


def shape_of_config(config: Any, source: str) -> ModelShape:
    """Build the model of a transformers config on the meta device and read its parameters.

    Raises:
        EntropyForkError: the config describes no causal language model that transformers can build.
    """
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    try:
        with torch.device("meta"):
            # sdpa: flash attention is asked for by the training, and is not needed for shapes
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        heads = text.num_attention_heads
        experts = next(
            (n for key in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(text, key, 0))), 0
        )
        intermediate = text.intermediate_size
        if experts:
            intermediate = getattr(text, "moe_intermediate_size", intermediate) * text.num_experts_per_tok
        return ModelShape(
            source=source,
            hidden=text.hidden_size,
            layers=text.num_hidden_layers,
            intermediate=intermediate,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            vocab=text.vocab_size,
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            max_positions=text.max_position_embeddings,
            experts=experts,
            parameters=tuple(Parameter(name, tuple(weight.shape)) for name, weight in model.named_parameters()),
            linears=tuple(
                (module.in_features, module.out_features)
                for module in model.modules()
                if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
            ),
        )
    except (ValueError, AttributeError, TypeError) as error:
        raise EntropyForkError(
            f"{source} is not the config of a causal language model that transformers can build: "
            f"{str(error).splitlines()[0]}"
        ) from None


def _named_like(path: str) -> str | None:
    """The built-in shape that a path or a hub id names: ``Qwen/Qwen3-14B-Base``, ``/models/qwen3-14b``."""
    last = re.split(r"[/\\]", path.rstrip("/\\"))[-1].lower().removesuffix("-base")
    return last if last in built_in_names() else None


def _built_in(name: str, asked: str) -> ModelShape:
    config = _read(BUILT_IN_DIR / f"{name}.json")
    if asked.rstrip("/").lower().endswith("-base"):
        config.max_position_embeddings = QWEN3_BASE_POSITIONS
    return shape_of_config(config, f"the built-in shape {name}")


def _read(file: Path) -> Any:
    from transformers import AutoConfig

    try:
        values = json.loads(file.read_text())
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EntropyForkError(f"{file} is not a model's config.json: {type(error).__name__}: {error}") from None


def _auto_config(path: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
