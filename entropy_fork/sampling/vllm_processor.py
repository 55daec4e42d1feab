"""Two temperatures in vLLM (2506.01939, Eq. 5), and for requests with a seed the same draws as the light sampler's.

Hook: vLLM's custom logits processors (``vllm.v1.sample.logits_processor.LogitsProcessor``; V1 engine, "V1" model
runner, which vLLM chooses by itself if there are such processors; no speculative decoding). Run with 0.30.0.

    LLM(…, logits_processors=[vllm_temperatures.NAME])
    SamplingParams(temperature=1.0, seed=7, extra_args=vllm_temperatures.extra_args(TwoTemperatures(1.0, 0.6, 0.672)))

Entropies are measured at the request's ``temperature`` T. vLLM gives its processors float32 logits, and divides by T
afterwards. Therefore:

- Without a seed, the processor returns z_t · T / T'_t, and vLLM draws (with its own top-p and top-k) from
  softmax(z_t / T'_t).
- With a seed, the processor draws the token itself (``sampler.py``, top-p and top-k included) and makes all others
  impossible. vLLM's own seeded draws depend on its version and its device, and start again when an interrupted answer
  is resumed. Ours depend only on the logits, the seed and the position. The logit of the drawn token is replaced by its
  entropy H_t, times T because vLLM divides by it. ``LLM(logprobs_mode="processed_logits")`` with
  ``SamplingParams(logprobs=0)`` returns H_t in the place of the log-prob: so an evaluation knows the share of tokens
  above the threshold.

Requests without these arguments stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entropy_fork.core.entropy import entropies
from entropy_fork.sampling.sampler import Decoding, Sampler
from entropy_fork.sampling.two_temperatures import TwoTemperatures, scaled, two_temperatures

try:
    from vllm.v1.sample.logits_processor import LogitsProcessor
except ImportError:  # the tests run without vLLM, and nothing below needs it
    LogitsProcessor = object

#: the path by which vLLM imports the processor in its own processes
NAME = "entropy_fork.vllm_temperatures:TwoTemperaturesProcessor"

KEYS = {"high": "temperature_high", "low": "temperature_low", "threshold": "entropy_threshold"}

#: rows at once: they need a few tensors of 64 × 151,936 × 8 bytes (78 MB), for which vLLM reserves no memory
CHUNK = 64


def extra_args(pair: TwoTemperatures) -> dict[str, float]:
    """The two temperatures as ``SamplingParams.extra_args``."""
    return {key: float(getattr(pair, name)) for name, key in KEYS.items()}


def parse(params: Any) -> TwoTemperatures | None:
    """The two temperatures of a request, or None if it has none.

    Args:
        params: vLLM's ``SamplingParams``.

    Raises:
        ValueError: an argument is missing or has no meaning, or another setting would undo the two temperatures.
    """
    given = {key: value for key, value in (params.extra_args or {}).items() if key in KEYS.values()}
    if not given:
        return None
    if missing := [key for key in KEYS.values() if key not in given]:
        raise ValueError(f"two temperatures need {', '.join(missing)} in extra_args as well as {', '.join(given)}")
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"extra_args[{key!r}] is {value!r}, and must be a number")
    if not params.temperature > 0:
        raise ValueError(
            "temperature is 0, and entropies are measured at it: write temperature=1.0, and "
            "temperature_high=0 and temperature_low=0 for the likeliest tokens"
        )
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty - 1.0, params.min_p)
    if any(penalties):
        raise ValueError("min_p and penalties are applied after two temperatures, and would undo them: leave them out")
    return TwoTemperatures(**{name: given[key] for name, key in KEYS.items()})


@dataclass(frozen=True)
class _Row:
    """A request: its decoding, whether it has a seed, and its tokens so far (vLLM appends to ``output``)."""

    decoding: Decoding
    has_seed: bool
    prompt_length: int
    output: list[int]


class TwoTemperaturesProcessor(LogitsProcessor):
    """vLLM's interface for a logits processor. vLLM keeps one per worker."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self.device = device
        self.rows: dict[int, _Row] = {}
        self.chunks: list[tuple[Tensor, list[_Row], Sampler]] = []

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Check the arguments of a request, in vLLM's front end. An error becomes that of the request."""
        parse(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """False: the processor can change which token is the likeliest, since it draws a token itself."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests to their rows. None means that the rows are those of the last step."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            pair = parse(params)
            if pair is None:
                self.rows.pop(index, None)
                continue
            seed = 0 if params.seed is None else params.seed % 2**64
            decoding = Decoding(seed, params.temperature, params.top_p, params.top_k, pair)
            self.rows[index] = _Row(decoding, params.seed is not None, len(prompt or ()), output)
        for source, target, direction in batch_update.moved:
            moved, replaced = self.rows.pop(source, None), self.rows.pop(target, None)
            if moved is not None:
                self.rows[target] = moved
            if replaced is not None and direction.name == "SWAP":
                self.rows[source] = replaced
        self.chunks = [
            (torch.tensor(indices, device=self.device), rows, Sampler([row.decoding for row in rows], self.device))
            for has_seed in (True, False)
            for indices, rows in self._in_chunks(has_seed)
        ]

    def _in_chunks(self, has_seed: bool) -> list[tuple[list[int], list[_Row]]]:
        indices = sorted(index for index, row in self.rows.items() if row.has_seed == has_seed)
        parts = [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]
        return [(part, [self.rows[index] for index in part]) for part in parts]

    def apply(self, logits: Tensor) -> Tensor:
        """Change the logits of one step, shape (rows, vocabulary), in place."""
        for indices, rows, sampler in self.chunks:
            change = _drawn if rows[0].has_seed else _scaled
            logits[indices] = change(logits[indices], rows, sampler).to(logits.dtype)
        return logits


def _drawn(logits: Tensor, rows: list[_Row], sampler: Sampler) -> Tensor:
    positions = np.array([row.prompt_length + len(row.output) for row in rows], dtype=np.uint64)
    tokens, _, entropy = sampler.draw(logits.float(), positions)
    assert entropy is not None, "every row here has two temperatures"
    return torch.full_like(logits, -torch.inf).scatter_(
        1, tokens[:, None], (entropy[:, None] * sampler.temperature).to(logits.dtype)
    )


def _scaled(logits: Tensor, rows: list[_Row], sampler: Sampler) -> Tensor:
    entropy = entropies(logits, sampler.temperature)[:, None]
    return scaled(logits, two_temperatures(entropy, sampler.high, sampler.low, sampler.threshold)) * sampler.temperature
