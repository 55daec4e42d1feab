"""Batched sampling with transformers, in which an answer depends on its own seed and not on the other answers.

This is for small models where verl's rollout engines do not run or are too heavy: on a CPU, or on a GPU without vLLM.
Tokens are drawn without a random generator (``sampler.py``), so it does not matter which answers share a batch, in
which order they came, or whether an answer was interrupted and resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from entropy_fork.sampling.sampler import Decoding, Sampler
from entropy_fork.sampling.two_temperatures import TwoTemperatures


@dataclass(frozen=True)
class Request:
    """One answer that is wanted.

    Attributes:
        prompt_ids: token ids of the prompt, and of what was already generated if the answer is resumed.
        seed: non-negative; decides all random draws of this answer.
        max_tokens: at most this many tokens, the end token included.
        temperature: T; 0 takes the likeliest token.
        top_p, top_k: nucleus and top-k truncation; 1.0 and -1 leave the distribution as it is.
        two_temperatures: draws with these instead of T. Entropies are then measured at T, which must be above 0.
    """

    prompt_ids: Sequence[int]
    seed: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    two_temperatures: TwoTemperatures | None = None

    @property
    def decoding(self) -> Decoding:
        """How the tokens of this answer are drawn."""
        return Decoding(self.seed, self.temperature, self.top_p, self.top_k, self.two_temperatures)


@dataclass
class Answer:
    """The answer to a request: ids, log-probs (nats, of the distribution drawn from), and why it ended.

    If the request has two temperatures, also the entropies (nats, at its temperature T) that chose between them.
    """

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    stop_reason: str = "aborted"  # "completed" at an end token, "length", or "aborted" when interrupted


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    requests: Sequence[Request],
    end_ids: Sequence[int],
    prompt_length: int = 0,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Answer]:
    """Answer all requests in one batch.

    Args:
        model: a causal language model in eval mode, on any device.
        requests: at least one.
        end_ids: the token ids that end an answer; the end token is part of the answer.
        prompt_length: prompts are padded on the left to at least this many tokens. With a fixed number each row has the
            same layout, and so the same order of its sums, whatever else is in the batch.
        interrupted: called before each token; True ends all unfinished answers as "aborted".

    Returns:
        The answers in the order of the requests.
    """
    device = model.device
    width = max(prompt_length, *(len(request.prompt_ids) for request in requests))
    num_steps = max(request.max_tokens for request in requests)
    input_ids, visible = _left_padded(requests, width, num_steps, device)
    start = torch.tensor([width - len(request.prompt_ids) for request in requests], device=device)
    sampler = Sampler([request.decoding for request in requests], device)
    lengths = np.array([len(request.prompt_ids) for request in requests], dtype=np.uint64)
    answers = [Answer() for _ in requests]
    open_rows = np.ones(len(requests), dtype=bool)

    cache = StaticCache(config=model.config, max_cache_len=width + num_steps)
    causal = torch.ones(width, width + num_steps, dtype=torch.bool, device=device).tril()
    mask = visible[:, None, None, :] & causal
    # A padding position must see something, because a softmax over nothing fails. Nobody uses its result.
    mask |= torch.eye(width, width + num_steps, dtype=torch.bool, device=device)
    position = (torch.arange(width, device=device) - start[:, None]).clamp(min=0)
    for step in range(num_steps):
        if interrupted():
            break
        output = model(
            input_ids=input_ids, attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1
        )
        tokens, log_probs, entropies = sampler.draw(output.logits[:, -1].float(), lengths + np.uint64(step))
        if entropies is not None:
            _append_entropies(answers, open_rows, requests, entropies.tolist())
        _append(answers, open_rows, requests, tokens.tolist(), log_probs.tolist(), end_ids)
        if not open_rows.any():
            break
        visible[:, width + step] = True
        input_ids, mask, position = tokens[:, None], visible[:, None, None, :], position[:, -1:] + 1
    return answers


def _left_padded(
    requests: Sequence[Request], width: int, num_steps: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids (rows, width), and which positions of the cache attention may see (rows, width + num_steps)."""
    input_ids = torch.zeros(len(requests), width, dtype=torch.long)
    visible = torch.zeros(len(requests), width + num_steps, dtype=torch.bool)
    for row, request in enumerate(requests):
        input_ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        visible[row, width - len(request.prompt_ids) : width] = True
    return input_ids.to(device), visible.to(device)


def _append(
    answers: list[Answer],
    open_rows: np.ndarray,
    requests: Sequence[Request],
    tokens: list[int],
    log_probs: list[float],
    end_ids: Sequence[int],
) -> None:
    for row in np.flatnonzero(open_rows).tolist():
        answer = answers[row]
        answer.token_ids.append(tokens[row])
        answer.log_probs.append(log_probs[row])
        if tokens[row] in end_ids:
            answer.stop_reason = "completed"
        elif len(answer.token_ids) >= requests[row].max_tokens:
            answer.stop_reason = "length"
        else:
            continue
        open_rows[row] = False


def _append_entropies(
    answers: list[Answer], open_rows: np.ndarray, requests: Sequence[Request], entropies: list[float]
) -> None:
    for row in np.flatnonzero(open_rows).tolist():
        if requests[row].two_temperatures is not None:
            answers[row].entropies.append(entropies[row])
