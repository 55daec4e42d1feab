"""Turn the checkpoint of a training run into a folder that transformers and vLLM load.

verl saves a checkpoint as ``global_step_N/actor`` with one file per rank. Its own merger (``verl.model_merger``) makes
a Hugging Face folder of it and rounds every weight to bfloat16, as verl's rollouts do by default. We run it in a
process of its own, so that its memory is free again before an engine starts. That process reads only weights from
FSDP's shards: they are pickles, and a pickle may run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.output_folder import UNFINISHED, write_whole

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
#: the file in a merged folder that says which checkpoint it was made from
MERGED_FROM = "merged_from.json"

_WHOLE_BYTES, _NUM_BLOCKS, _BLOCK_BYTES = 4 << 20, 64, 64 << 10


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        path: the folder with its files.
        backend: ``huggingface`` (loads as it is), or the kind of its shards, ``fsdp`` or ``megatron``.
    """

    path: Path
    backend: str

    @classmethod
    def find(cls, path: Path) -> Checkpoint:
        """Find out what a folder is: a Hugging Face folder, ``global_step_N/actor``, or ``global_step_N``.

        Raises:
            EntropyForkError: nothing there can be evaluated; the message says what to name instead.
        """
        path = path.absolute()
        if not path.is_dir():
            raise EntropyForkError(f"no folder {path}: name a Hugging Face folder, or verl's …/global_step_N/actor")
        if steps := sorted(path.glob("global_step_*"), key=_step_of):
            raise EntropyForkError(f"{path} holds {len(steps)} checkpoints: name one of them, for example {steps[-1]}")
        if path.name != "actor" and (path / "actor").is_dir():
            path = path / "actor"
        if (path.parent / UNFINISHED).is_file():
            raise EntropyForkError(
                f"{path.parent} is not finished (it has the file '{UNFINISHED}'): a run is writing it, or ended too "
                f"early. Name another checkpoint"
            )
        # With checkpoint.save_contents=[…,hf_model] verl has already written a whole model.
        for folder in (path, path / "huggingface", path / "model" / "huggingface"):
            if (folder / "config.json").is_file() and _has_weights(folder):
                return cls(folder, "huggingface")
        if (path / "fsdp_config.json").is_file():
            _check_shards(path)
            return cls(path, "fsdp")
        if (path / "model" / "dist_ckpt").is_dir():
            return cls(path, "megatron")
        raise EntropyForkError(
            f"{path} is neither a Hugging Face folder (config.json and *.safetensors) nor a checkpoint of verl's actor "
            f"(fsdp_config.json and model_world_size_*_rank_*.pt, or model/dist_ckpt)"
        )

    def fingerprint(self) -> str:
        """A checksum of all files that decide what the model says, without reading all of the weights.

        Of a large file only its size and some blocks are read, evenly spaced from its beginning to its end. That is
        enough: a step of training changes every tensor, so every block of another checkpoint differs.
        """
        digest = hashlib.sha256()
        for file in self._files():
            digest.update(f"{file.relative_to(self.path)} {file.stat().st_size}\n".encode())
            for block in _sampled(file):
                digest.update(block)
        return digest.hexdigest()

    def _files(self) -> list[Path]:
        kinds = {
            "huggingface": ["*.json", "*.jinja", "*.txt", "*.model", *WEIGHTS],
            "fsdp": ["model_world_size_*.pt", "huggingface/*", "lora_train_meta.json"],
            "megatron": ["model/**/*"],
        }[self.backend]
        found = {file for kind in kinds for file in self.path.glob(kind) if file.is_file()}
        return sorted(found - {self.path / MERGED_FROM})

    def merge(self, target: Path) -> Path:
        """The Hugging Face folder of this checkpoint, made at ``target`` if it does not exist yet.

        Raises:
            EntropyForkError: ``target`` holds something else, or verl's merger failed.
        """
        if self.backend == "huggingface":
            return self.path
        source = {"checkpoint": str(self.path), "fingerprint": self.fingerprint()}
        if target.exists():
            marker = target / MERGED_FROM
            if marker.is_file() and json.loads(marker.read_text())["fingerprint"] == source["fingerprint"]:
                return target
            raise EntropyForkError(f"{target} was not merged from {self.path}: choose another folder with --merged")
        unfinished = target.with_name(f".{target.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            self._run_merger(unfinished)
            fold_adapter(unfinished)
            write_whole(unfinished / MERGED_FROM, json.dumps(source, indent=2) + "\n")
            unfinished.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return target

    def _run_merger(self, target: Path) -> None:
        command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", self.backend]
        command += ["--local_dir", str(self.path), "--target_dir", str(target)]
        if self.backend == "megatron":
            config = json.loads((self.path / "model" / "huggingface" / "config.json").read_text())
            command += ["--tie-word-embedding"] if config.get("tie_word_embeddings") else []
        environment = dict(os.environ)
        if self.backend == "fsdp":  # the merger asks torch.load for weights_only=False; Megatron's own loader needs it
            environment.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
            environment["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
        )
        if done.returncode != 0 or not _has_weights(target):
            if "Weights only load failed" in done.stdout:
                raise EntropyForkError(
                    f"a shard of {self.path} has {_refused(done.stdout)} in it, which could run code and was not "
                    f"loaded: do you trust who made it?"
                )
            end = "\n".join(done.stdout.splitlines()[-15:])
            raise EntropyForkError(f"verl's merger could not read {self.path}. The end of its output:\n{end}")


@contextmanager
def code_refused(folder: Path) -> Iterator[None]:
    """Wrap calls of transformers with ``trust_remote_code=False``: one clear error if a model would run code.

    Without that argument transformers would ask on the terminal whether to run the classes that a model brings.

    Raises:
        EntropyForkError: the model would run code: its own classes, or what its ``*.bin`` has beside weights.
    """
    try:
        yield
    except UnpicklingError as error:
        raise EntropyForkError(
            f"a *.bin of {folder} has {_refused(str(error))} in it, which could run code and was not loaded: do you "
            f"trust who made it?"
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise EntropyForkError(
            f"{folder} brings Python code of its own (auto_map in one of its JSON files), which is not run: name a "
            f"model whose classes are in transformers, or let vLLM run the code with --vllm trust_remote_code=true"
        ) from error


def _refused(said: str) -> str:
    """What torch found in a pickle that is not a weight."""
    found = re.search(r"unsupported .*?GLOBAL (\S+)", said, re.IGNORECASE)
    return found[1] if found else "more than weights"


def fold_adapter(folder: Path) -> None:
    """Add a LoRA adapter to the weights. verl's merger leaves it beside the base model.

    Raises:
        EntropyForkError: the adapter's scale is not known, so the base model would be evaluated without it.
    """
    adapter = folder / "lora_adapter"
    if not adapter.is_dir():
        return
    if not json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"]:
        raise EntropyForkError(
            "the checkpoint has a LoRA adapter but no lora_train_meta.json with its lora_alpha, without which the "
            "adapter has no effect: copy the file from another checkpoint of the same run"
        )
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    # In fp32, so that the sum is rounded once.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    whole = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    for kind in WEIGHTS:
        for file in folder.glob(kind):
            file.unlink()
    whole.to(torch.bfloat16).save_pretrained(folder)
    shutil.rmtree(adapter)


def _has_weights(folder: Path) -> bool:
    return any(next(folder.glob(kind), None) for kind in WEIGHTS)


def _step_of(folder: Path) -> int:
    found = re.search(r"\d+$", folder.name)
    return int(found[0]) if found else -1


def _check_shards(path: Path) -> None:
    config = json.loads((path / "fsdp_config.json").read_text())
    size = config.get("world_size") if isinstance(config, dict) else None
    if not isinstance(size, int) or not 0 < size < 1 << 20:
        raise EntropyForkError(f"{path / 'fsdp_config.json'} has no valid number of ranks: world_size is {size!r}")
    missing = [rank for rank in range(size) if not (path / f"model_world_size_{size}_rank_{rank}.pt").is_file()]
    if missing:
        raise EntropyForkError(
            f"{path} lacks the shards of ranks {', '.join(map(str, missing[:8]))}{'…' if len(missing) > 8 else ''} of "
            f"{size}: each node keeps its own shards unless the folder is shared. Copy those of the other nodes here"
        )


def _sampled(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as content:
        if size <= _WHOLE_BYTES:
            yield content.read()
            return
        for block in range(_NUM_BLOCKS):
            content.seek(block * (size - _BLOCK_BYTES) // (_NUM_BLOCKS - 1))
            yield content.read(_BLOCK_BYTES)
