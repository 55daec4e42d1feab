"""``entropy_fork.dump_every``: a training run writes the tokens of a few answers, to show how forks change.

Hook: ``trainer.py`` calls :meth:`TokenDump.write` on the driver, right after it wrote the token weights of a batch. The
selection is read back from the field that the workers will get, so the dump says what is trained on. If the workers
select, the driver does not know the selection, and the dump says null.

The folder has the layout of ``entropy_fork/tokens/store.py``: one part per dumped step, with the step as its number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from entropy_fork.common.errors import EntropyForkError, process_name
from entropy_fork.common.verl_types import BatchDescription
from entropy_fork.tokens.store import (
    MANIFEST,
    OPTIONAL,
    AnswerTokens,
    delete_part,
    parts,
    read_manifest,
    token_pieces,
    write_manifest,
    write_part,
)
from entropy_fork.verl.config import ANSWERS_PER_STEP, EntropyForkConfig, read_node
from entropy_fork.verl.gradient_step import VERLS_FIELDS
from entropy_fork.verl.masking import Masking
from entropy_fork.verl.queued_batch import QueuedBatch

#: keys of the rule that say by which score, among which tokens, for what, and whether as a control. The manifest names
#: them; null means that the run trains on every token
OF_RULE = ("score", "where", "use", "control")

#: fields with one number per token: the tokens, whether the policy wrote them, the entropies, the log-probs
PER_TOKEN = ("responses", "response_mask", "entropy", "old_log_probs")
#: fields with one number per token that a batch need not have, by their column in the dump
PER_TOKEN_IF_THERE = {name: VERLS_FIELDS[name] for name in OPTIONAL}
#: the other fields of an answer
PER_ANSWER = ("prompts", "rm_scores", "reward_model", "data_source")


class TokenDump:
    """Writes the tokens of ``dump_answers`` answers of every ``dump_every``-th step that updates the actor.

    Args:
        config: the root of verl's config.
        fork_config: ours.
        masking: makes the mask of the run; None if the run trains on every token.
    """

    def __init__(self, config: Any, fork_config: EntropyForkConfig, masking: Masking | None):
        self._config, self._fork_config, self._masking = config, fork_config, masking
        self.folder = Path(fork_config.dump_dir or Path(config.trainer.default_local_dir) / "tokens")
        self._is_first = True

    @classmethod
    def asked_for(cls, config: Any, masking: Masking | None) -> TokenDump | None:
        """The dump of a run; None if ``dump_every`` is 0. Arguments as for the class."""
        fork_config = read_node(config)
        if fork_config is None or fork_config.dump_every == 0:
            return None
        return cls(config, fork_config, masking)

    def start(self) -> None:
        """Make the folder. If it cannot be written to, the run stops before its first step.

        Raises:
            EntropyForkError: the folder cannot be written to, or holds other files.
        """
        if (self.folder / MANIFEST).exists() and read_manifest(self.folder).get("source") != "training":
            raise EntropyForkError(
                f"{self.folder} holds other tokens than those of a training run. This run's would be mixed with them: "
                f"write entropy_fork.dump_dir=FOLDER with another folder."
            )
        fork_config, model = self._fork_config, self._config.actor_rollout_ref
        manifest = {
            "source": "training",
            "model": str(model.model.path),
            "temperature": float(model.rollout.temperature),
            "top_ratio": fork_config.top_ratio if fork_config.enabled else 1.0,
            "select": fork_config.select if fork_config.enabled else "all",
            **{key: getattr(fork_config, key) if fork_config.enabled else None for key in OF_RULE},
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

    def write(self, batch: BatchDescription, step: int, tokenizer: Any) -> None:
        """Write the part of a step, if ``dump_every`` asks for this step.

        If the dump fails (a full disk), it prints the reason and the training goes on.

        Args:
            batch: verl's description of the step's batch, as the workers will get it.
            step: the training step, from 1.
            tokenizer: the model's tokenizer.
        """
        if step % self._fork_config.dump_every:
            return
        try:
            if self._is_first:
                self._delete_from(step)
            write_part(self.folder, step, self._answers(QueuedBatch(batch), step, tokenizer))
            self._is_first = False
        except OSError as error:
            print(f"entropy_fork: the tokens of step {step} could not be dumped: {error}", flush=True)

    def _delete_from(self, step: int) -> None:
        """Delete the parts from ``step`` on: an abandoned run wrote them, and this run makes these steps itself."""
        for number in parts(self.folder):
            if number >= step:
                delete_part(self.folder, number)

    def _answers(self, batch: QueuedBatch, step: int, tokenizer: Any) -> list[AnswerTokens]:
        selected_field = self._masking.selected_field if self._masking is not None else None
        if_there = {column: field for column, field in PER_TOKEN_IF_THERE.items() if field in batch}
        names = [*PER_TOKEN, *PER_ANSWER, *if_there.values(), *([selected_field] if selected_field else [])]
        columns = batch.fetch_rows(names, self._rows(batch))
        if "entropy" not in columns:
            raise EntropyForkError(
                f"entropy_fork.dump_every was asked for, but this step's batch has no entropies in {process_name()}: "
                f"verl's log-prob pass did not write them. entropy_fork.dump_every=0 trains without."
            )
        longest = self._config.data.max_response_length
        answers = []
        for number in range(len(columns["response_mask"])):
            values = {name: _as_numpy(column[number]) for name, column in columns.items()}
            ours = values["response_mask"].astype(bool)  # the policy did not write the tokens of a tool
            token_ids, prompt_ids = (values[name].astype(np.int32) for name in ("responses", "prompts"))
            selected = np.ones(len(ours)) if self._masking is None else values.get(selected_field or "")
            scores = values.get("rm_scores")
            answers.append(
                AnswerTokens(
                    prompt=tokenizer.decode(prompt_ids.tolist(), skip_special_tokens=False),
                    text=tokenizer.decode(token_ids[ours].tolist(), skip_special_tokens=True),
                    token_ids=token_ids[ours],
                    pieces=token_pieces(tokenizer, token_ids[ours]),
                    entropy=values["entropy"][ours],
                    log_prob=values["old_log_probs"][ours],
                    selected=None if selected is None else selected[ours] != 0,
                    answer=step * ANSWERS_PER_STEP + number,
                    step=step,
                    data_source=_text(values.get("data_source")),
                    ground_truth=_text((values.get("reward_model") or {}).get("ground_truth")),
                    score=None if scores is None else float(scores.sum()),
                    truncated=len(ours) >= longest and int(token_ids[-1]) != tokenizer.eos_token_id,
                    prompt_ids=prompt_ids,
                    **{column: _of_response(values.get(field), column, ours) for column, field in if_there.items()},
                )
            )
        return answers

    def _rows(self, batch: QueuedBatch) -> list[int]:
        """The rows to dump: the first answer of each prompt, then the second of each, …; the same in every run."""
        identities, is_padding = batch.identities(), batch.is_padding()
        real = [row for row in range(len(identities)) if not is_padding[row]]
        real.sort(key=lambda row: (identities[row].session, identities[row].output, identities[row]))
        return real[: self._fork_config.dump_answers]


def _of_response(values: np.ndarray | None, column: str, ours: np.ndarray) -> np.ndarray | None:
    """The values of the tokens that the policy wrote; None if there are none, or not one for each response token.

    Args:
        values: float32, of one row of the batch; None if the batch does not have the field.
        column: of the dump.
        ours: bool, shape (response tokens,): the response mask.
    """
    if (
        values is not None and column == "sum_pi_squared"
    ):  # verl writes it for whole rows, one position before the token
        values = values[-len(ours) - 1 : -1]
    return None if values is None or values.shape != ours.shape else values[ours]


def _as_numpy(value: Any) -> Any:
    """A tensor as an array, of float32 if it is of a float type; any other object as it is."""
    if isinstance(value, Tensor):
        return value.float().numpy() if value.is_floating_point() else value.numpy()
    return value


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
