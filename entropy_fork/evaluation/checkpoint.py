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
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.output_folder import LATEST, SELECTION_FILE, UNFINISHED, write_whole
from entropy_fork.core.rule import KEY_OF

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
#: the file in a merged folder that says which checkpoint it was made from
MERGED_FROM = "merged_from.json"

_WHOLE_BYTES, _NUM_BLOCKS, _BLOCK_BYTES = 4 << 20, 64, 64 << 10


@dataclass(frozen=True)
class ModelRecord:
    """Which model a result belongs to.

    Attributes:
        path: its folder, with symbolic links resolved.
        step: the training step of the checkpoint; None for a model that is no checkpoint.
        trained_on: what a run of ours wrote about the tokens it trains on: the keys of the rule with their values, or
            a sentence. None where nothing is written down.
    """

    path: str
    step: int | None = None
    trained_on: dict[str, Any] | str | None = None

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)

    @classmethod
    def of_dict(cls, values: Any) -> ModelRecord | None:
        """The record that :meth:`as_dict` wrote; None for anything else."""
        if not isinstance(values, dict) or not isinstance(path := values.get("path"), str):
            return None
        step, trained_on = values.get("step"), values.get("trained_on")
        return cls(
            path, step if isinstance(step, int) else None, trained_on if isinstance(trained_on, dict | str) else None
        )

    def step_in_words(self) -> str:
        """The step for a table."""
        return "no checkpoint of a run" if self.step is None else str(self.step)

    def trained_on_in_words(self) -> str:
        """What it was trained on for a table: ρ, the way to select, and each key that is not its default."""
        if not isinstance(self.trained_on, dict):
            return self.trained_on or "not recorded"
        said = [
            f"{key}={value}"
            for key, value in self.trained_on.items()
            if key in ("top_ratio", "select") or key not in KEY_OF or value != KEY_OF[key].default
        ]
        return " ".join(said)


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        path: the folder with its files.
        backend: ``huggingface`` (loads as it is), or the kind of its shards, ``fsdp`` or ``megatron``.
        step: the number of its ``global_step_N``; None if it is in no such folder.
        trained_on: as in :class:`ModelRecord`.
        notes: what the user should know about how it was found, a sentence each.
    """

    path: Path
    backend: str
    step: int | None = None
    trained_on: dict[str, Any] | str | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def find(cls, path: Path) -> Checkpoint:
        """Find out what a folder is.

        Args:
            path: a Hugging Face folder; ``global_step_N`` or its ``actor``; or ``trainer.default_local_dir`` of a run,
                which stands for the newest whole checkpoint in it.

        Raises:
            EntropyForkError: nothing there can be evaluated; the message says what to name instead.
        """
        path = path.absolute()
        if not path.is_dir():
            raise EntropyForkError(
                f"no folder {path}: name a Hugging Face folder, verl's …/global_step_N, or the folder of a run's "
                f"checkpoints (trainer.default_local_dir)"
            )
        notes: list[str] = []
        if steps := [folder for folder in path.glob("global_step_*") if folder.is_dir() and _step_of(folder) >= 0]:
            run, path = path, _newest_whole(path, steps, notes)
            notes.append(f"{path} is the newest whole checkpoint in {run}")
        found = cls._of_one_model(path)
        step_folder, merged_from = _step_folder(found.path), _merged_from(found.path)
        if step_folder is None and (origin := merged_from.get("checkpoint")):
            step_folder = _step_folder(Path(origin))
        trained_on = merged_from.get("trained_on")
        if trained_on is None and step_folder is not None:
            trained_on = _selection_of(step_folder / SELECTION_FILE, notes)
        step = None if step_folder is None else _step_of(step_folder)
        return cls(found.path, found.backend, step, trained_on, tuple(notes))

    @classmethod
    def _of_one_model(cls, path: Path) -> Checkpoint:
        if path.name != "actor" and (path / "actor").is_dir():
            path = path / "actor"
        whole = _step_folder(path) or path.parent
        if (whole / UNFINISHED).is_file():
            raise EntropyForkError(
                f"{whole} is not finished (it has the file '{UNFINISHED}'): a run is writing it, or ended too "
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

    @property
    def record(self) -> ModelRecord:
        """Which model this is, for the results."""
        return ModelRecord(str(self.path.resolve()), self.step, self.trained_on)

    @property
    def tokenizer_folder(self) -> Path:
        """Where its tokenizer lies before shards are merged, if it has one."""
        inside = {"huggingface": ".", "fsdp": "huggingface", "megatron": "model/huggingface"}
        return self.path / inside[self.backend]

    def fingerprint(self) -> str:
        """A checksum of all files that decide what the model says, without reading all of the weights.

        Reads only the size of a large file and some of its blocks, evenly spaced from its beginning to its end. That is
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
        source: dict[str, Any] = {"checkpoint": str(self.path), "fingerprint": self.fingerprint()}
        source["trained_on"] = self.trained_on
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
    """N of ``global_step_N``; -1 for another name."""
    found = re.fullmatch(r"global_step_([0-9]{1,18})", folder.name)
    return int(found[1]) if found else -1


def _step_folder(path: Path) -> Path | None:
    """The ``global_step_N`` that a folder is or lies in."""
    return next((folder for folder in (path, *path.parents) if _step_of(folder) >= 0), None)


def _newest_whole(run: Path, steps: list[Path], notes: list[str]) -> Path:
    """The newest checkpoint of a run that was written to its end. ``notes`` gets a sentence for each newer one.

    Raises:
        EntropyForkError: there is none.
    """
    latest = _latest(run)
    left_out: list[str] = []
    for folder in sorted(steps, key=_step_of, reverse=True):
        if latest is not None and _step_of(folder) > latest:
            why = f"{run / LATEST} names step {latest}, so no run has finished writing it, or an earlier run left it"
        elif (folder / UNFINISHED).is_file():
            why = f"it is not finished (it has the file '{UNFINISHED}'): a run is writing it, or ended too early"
        elif not (folder / "actor").is_dir():
            why = "it has no folder actor (trainer.max_actor_ckpt_to_keep removes old ones)"
        else:
            notes += left_out
            return folder
        left_out.append(f"{folder} is left out: {why}")
    raise EntropyForkError(f"{run} has no whole checkpoint:\n" + "\n".join(f"  {line}" for line in left_out))


def _latest(run: Path) -> int | None:
    """The step that verl's file names, if a checkpoint of that step is there."""
    try:
        step = int((run / LATEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return step if (run / f"global_step_{step}").is_dir() else None


def _merged_from(folder: Path) -> dict[str, Any]:
    """What :meth:`Checkpoint.merge` wrote about a folder; {} for a folder that it did not make."""
    try:
        content = json.loads((folder / MERGED_FROM).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("checkpoint"), str) else {}


def _selection_of(file: Path, notes: list[str]) -> dict[str, Any] | str | None:
    """What a checkpoint was trained on; None without a file. ``notes`` gets a sentence if it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(selection := content.get("trained_on"), dict | str):
            return selection
        reason = "it does not say what the checkpoint was trained on"
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = str(error)
    notes.append(f"{file} cannot be read ({reason}), so the results do not say what the model was trained on")
    return None


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
