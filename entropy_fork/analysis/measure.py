"""Measure entropy, log-prob and rank at every response position: one forward pass over prompt and answer.

The LM head is evaluated by ``core/lm_head.py``, as in the pass of a training step: only at response positions, a few
hundred rows of logits at once. Several answers share a pass. They are padded on the right, where causal attention keeps
the padding out of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.core.lm_head import log_probs_entropy_and_rank, padded_positions, response_positions
from entropy_fork.evaluation.checkpoint import code_refused


@dataclass(frozen=True)
class TokenIds:
    """One prompt and its answer: int32 arrays."""

    prompt: np.ndarray
    response: np.ndarray


@dataclass(frozen=True)
class Measured:
    """The values at every response token: entropy, log_prob (float32, nats), rank (int32, 0: the likeliest)."""

    entropy: np.ndarray
    log_prob: np.ndarray
    rank: np.ndarray


class Measurer:
    """A model that measures texts.

    Args:
        folder: a Hugging Face folder.
        dtype: name of a torch dtype, or ``auto`` for the type in which the weights are stored.
        temperature: T of Eq. 1, p = softmax(z/T); above 0.
        batch_tokens: tokens of one forward pass, padding included; a longer answer gets a pass of its own.

    Raises:
        EntropyForkError: the model's logits are not simply those of a linear head without a bias.
    """

    def __init__(self, folder: Path, dtype: str = "auto", temperature: float = 1.0, batch_tokens: int = 32768):
        from transformers import AutoModelForCausalLM

        chosen: Any = dtype if dtype == "auto" else getattr(torch, dtype)
        with code_refused(folder):
            self.model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=chosen, attn_implementation="sdpa", trust_remote_code=False
            ).eval()
        if torch.accelerator.is_available():
            self.model.to(torch.accelerator.current_accelerator())
        self.temperature, self.batch_tokens = temperature, batch_tokens
        self.positions = getattr(self.model.config, "max_position_embeddings", None)
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise EntropyForkError(
                f"{folder}: the LM head is not a linear layer without a bias, and no other kind can be measured"
            )
        self.weight: Tensor = head.weight
        self._check_logits(folder)

    @torch.inference_mode()
    def _check_logits(self, folder: Path) -> None:
        """Refuse a model that scales or caps its logits after the head: we would measure other entropies."""
        ids = torch.arange(min(8, self.weight.shape[0]), device=self.weight.device)[None]
        theirs = self.model(input_ids=ids, use_cache=False).logits.float()
        ours = linear(self._hidden(ids), self.weight).float()
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max())):
            raise EntropyForkError(
                f"{folder}: {type(self.model).__name__} changes its logits after the LM head (a scale or a soft cap), "
                f"which cannot be measured"
            )

    def _hidden(self, input_ids: Tensor) -> Tensor:
        return self.model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state

    def measure(self, texts: Sequence[TokenIds]) -> list[Measured]:
        """Measure the response tokens of each text, in the order of the texts.

        Raises:
            EntropyForkError: this model cannot read a text: it has no prompt, is too long, or has unknown token ids.
        """
        for text in texts:
            self._check(text)
        found: list[Measured | None] = [None] * len(texts)
        for rows in self._batches(texts):
            for row, measured in zip(rows, self._forward([texts[row] for row in rows]), strict=True):
                found[row] = measured
        return [one if one is not None else Measured(*_no_tokens()) for one in found]

    def _check(self, text: TokenIds) -> None:
        if not len(text.response):
            return
        if not len(text.prompt):
            raise EntropyForkError("an answer has an empty prompt, so nothing predicts its first token")
        length = len(text.prompt) + len(text.response)
        if self.positions is not None and length > self.positions:
            raise EntropyForkError(f"an answer has {length} tokens with its prompt, and the model {self.positions} "
                                   f"positions: measure it with a model that can read it")  # fmt: skip
        highest = max(int(text.prompt.max()), int(text.response.max()))
        if highest >= self.weight.shape[0]:
            raise EntropyForkError(f"an answer has the token id {highest}, and the model knows {self.weight.shape[0]}: "
                                   f"it was written by a model with another tokenizer")  # fmt: skip

    def _batches(self, texts: Sequence[TokenIds]) -> Iterator[list[int]]:
        """Rows of similar length together, as many as fit. Rows without a response need no pass."""
        lengths = np.array([len(text.prompt) + len(text.response) for text in texts])
        order = [row for row in np.argsort(-lengths, kind="stable").tolist() if len(texts[row].response)]
        while order:
            count = max(1, self.batch_tokens // int(lengths[order[0]]))
            yield order[:count]
            order = order[count:]

    @torch.inference_mode()
    def _forward(self, texts: Sequence[TokenIds]) -> list[Measured]:
        whole = [np.concatenate([text.prompt, text.response]) for text in texts]
        input_ids = torch.zeros(len(texts), max(map(len, whole)), dtype=torch.int64)
        for row, ids in enumerate(whole):
            input_ids[row, : len(ids)] = torch.from_numpy(ids)
        lengths = torch.tensor([len(text.response) for text in texts])
        offsets = torch.tensor([0, *(len(ids) for ids in whole)]).cumsum(0)
        places = padded_positions(response_positions(offsets, lengths), offsets, input_ids.shape[1])
        device = self.weight.device
        hidden = self._hidden(input_ids.to(device)).flatten(0, 1)[places.to(device)]
        labels = torch.from_numpy(np.concatenate([text.response for text in texts])).to(device, torch.int64)
        log_prob, entropy, rank = log_probs_entropy_and_rank(hidden, self.weight, labels, self.temperature)
        if not bool(torch.isfinite(entropy).all()):
            raise EntropyForkError("an entropy is not finite: the model's logits are broken (in float16? write --dtype "
                                   "bfloat16 or float32)")  # fmt: skip
        columns = [entropy.float().cpu(), log_prob.float().cpu(), rank.int().cpu()]
        rows = zip(*(column.split(lengths.tolist()) for column in columns), strict=True)
        return [Measured(*(column.numpy().copy() for column in row)) for row in rows]


def _no_tokens() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.zeros(0, np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32)
