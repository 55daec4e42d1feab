"""``entropy_fork.dump_every``: the training run itself writes the tokens of a few answers, to see how forks move.

Hook: ``trainer.py`` calls :meth:`TokenDump.write` on the driver right after the token weights of a batch were written.
What is selected is read back from the field that the workers will get, so the dump says what is trained on and not what
somebody believes. Where the workers select by themselves the driver does not know, and writes null.

The folder is the one of ``entropy_fork/tokens/store.py``: a part per dumped step, numbered by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transfer_queue as tq

from entropy_fork.common.errors import EntropyForkError, process_name
from entropy_fork.tokens.store import (
    MANIFEST,
    AnswerTokens,
    delete_part,
    parts,
    read_manifest,
    token_pieces,
    write_manifest,
    write_part,
)
from entropy_fork.verl.config import ANSWERS_PER_STEP, EntropyForkConfig, read_node
from entropy_fork.verl.gradient_step import KEPT


class TokenDump:
    """Writes the tokens of ``dump_answers`` answers of every ``dump_every``-th step that updates the actor."""

    def __init__(self, config: Any, fork_config: EntropyForkConfig):
        self.config, self.fork_config = config, fork_config
        self.folder = Path(fork_config.dump_dir or Path(config.trainer.default_local_dir) / "tokens")
        self.first = True

    @classmethod
    def asked_for(cls, config: Any) -> TokenDump | None:
        """The dump of a run; None where ``dump_every`` is 0."""
        fork_config = read_node(config)
        return cls(config, fork_config) if fork_config is not None and fork_config.dump_every > 0 else None

    def start(self) -> None:
        """Make the folder, so that one that cannot be written to stops the run before its first step.

        Raises:
            EntropyForkError: the folder cannot be written to, or holds something else.
        """
        if (self.folder / MANIFEST).exists() and read_manifest(self.folder).get("source") != "training":
            raise EntropyForkError(
                f"{self.folder} holds other tokens than those of a training run, which would be mixed with this run's: "
                f"write entropy_fork.dump_dir=FOLDER with another folder."
            )
        fork_config, model = self.fork_config, self.config.actor_rollout_ref
        manifest = {
            "source": "training",
            "model": str(model.model.path),
            "temperature": float(model.rollout.temperature),
            "top_ratio": fork_config.top_ratio if fork_config.enabled else 1.0,
            "select": fork_config.select if fork_config.enabled else "all",
            "entropy": fork_config.entropy,
            "pool": fork_config.pool,
            "threshold": None,  # one per step and pool: the metric entropy_fork/threshold
            "dump_every": fork_config.dump_every,
            "dump_answers": fork_config.dump_answers,
        }
        try:
            write_manifest(self.folder, manifest)
        except OSError as error:
            raise EntropyForkError(
                f"entropy_fork.dump_every={fork_config.dump_every} asks for tokens in {self.folder}, which "
                f"{process_name()} cannot write to ({error}). Write entropy_fork.dump_dir=FOLDER, or "
                f"entropy_fork.dump_every=0."
            ) from error

    def write(self, batch: Any, step: int, tokenizer: Any) -> None:
        """Write the part of a step, where it is one that is dumped.

        A dump that fails later on (a full disk) says so and does not end the training.

        Args:
            batch: verl's description of the step's batch, as the workers will get it.
            step: of training, from 1.
            tokenizer: the model's.
        """
        if step % self.fork_config.dump_every:
            return
        try:
            if self.first:
                self._forget_from(step)
            write_part(self.folder, step, self._answers(batch, step, tokenizer))
            self.first = False
        except OSError as error:
            print(f"entropy_fork: the tokens of step {step} could not be dumped: {error}", flush=True)

    def _forget_from(self, step: int) -> None:
        """A run that goes on from a checkpoint takes the steps after it once more; those of before never led here."""
        for number in parts(self.folder):
            if number >= step:
                delete_part(self.folder, number)

    def _answers(self, batch: Any, step: int, tokenizer: Any) -> list[AnswerTokens]:
        selected = self._selected_field()
        fields = ["prompts", "responses", "response_mask", "entropy", "old_log_probs", "rm_scores"]
        fields += ["reward_model", "data_source", *([selected] if selected else [])]
        data = tq.kv_batch_get(keys=self._keys(batch), partition_id=batch.partition_id, select_fields=fields)
        if "entropy" not in data:
            raise EntropyForkError(
                f"entropy_fork.dump_every was asked for, but this step's batch has no entropies in {process_name()}: "
                f"verl's log-prob pass did not write them. entropy_fork.dump_every=0 trains without."
            )
        columns = {name: _rows(data.get(name, None)) for name in fields}
        longest = self.config.data.max_response_length
        answers = []
        for row, mask in enumerate(columns["response_mask"] or []):
            ours = mask.astype(bool)  # what a tool wrote is no token of the policy's
            values = {name: _at(columns[name], row) for name in fields}
            token_ids = values["responses"][ours].astype(np.int32)
            weights = np.ones(len(mask)) if self._everything else values.get(selected or "")
            answers.append(
                AnswerTokens(
                    prompt=tokenizer.decode(values["prompts"].tolist(), skip_special_tokens=False),
                    text=tokenizer.decode(token_ids.tolist(), skip_special_tokens=True),
                    token_ids=token_ids,
                    pieces=token_pieces(tokenizer, token_ids),
                    entropy=values["entropy"][ours],
                    log_prob=values["old_log_probs"][ours],
                    selected=None if weights is None else weights[ours] != 0,
                    answer=step * ANSWERS_PER_STEP + row,
                    step=step,
                    data_source=_text(values["data_source"]),
                    ground_truth=_text((values["reward_model"] or {}).get("ground_truth")),
                    score=None if values["rm_scores"] is None else float(values["rm_scores"].sum()),
                    truncated=len(mask) >= longest and int(values["responses"][-1]) != tokenizer.eos_token_id,
                    prompt_ids=values["prompts"].astype(np.int32),
                )
            )
        return answers

    @property
    def _everything(self) -> bool:
        """Whether verl trains on every token, as it does without us."""
        return not self.fork_config.enabled

    def _selected_field(self) -> str | None:
        """The field of the batch that says what is trained on; None where there is none on the driver."""
        if self._everything:
            return None
        if not self.fork_config.in_worker(self.config.actor_rollout_ref.actor.shuffle):
            return "rollout_is_weights"
        return KEPT if self.fork_config.pool == "batch" else None

    def _keys(self, batch: Any) -> list[str]:
        """Which answers: the first of each prompt, then the second; in an order that the data gives, not the run."""
        real = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]
        index = tq.kv_batch_get(keys=real, partition_id=batch.partition_id, select_fields=["index"]).get("index", None)
        indices = [""] * len(real) if index is None else [str(value) for value in index.tolist()]

        def place(row: int) -> tuple[int, int, str, str]:
            uid, number, output = real[row].rsplit("_", 2)
            return int(number), int(output), indices[row], uid

        return [real[row] for row in sorted(range(len(real)), key=place)[: self.fork_config.dump_answers]]


def _rows(field: Any) -> Sequence[Any] | None:
    """A field of the batch, row by row: nested tensors, and what the TransferQueue makes of other values."""
    if field is None:
        return None
    if isinstance(field, torch.Tensor):
        return [row.float().numpy() if row.is_floating_point() else row.numpy() for row in field.unbind()]
    return field.tolist() if hasattr(field, "tolist") else list(field)


def _at(rows: Sequence[Any] | None, row: int) -> Any:
    return None if rows is None else rows[row]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
