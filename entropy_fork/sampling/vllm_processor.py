"""Two temperatures in vLLM (2506.01939, Eq. 5), and with a seed the very draws of the light sampler.

Hook: vLLM's custom logits processors (``vllm.v1.sample.logits_processor.LogitsProcessor``; V1 engine, "V1" model
runner, which vLLM chooses by itself where there are such processors; no speculative decoding). Run with 0.30.0.

    LLM(…, logits_processors=[vllm_temperatures.NAME])
    SamplingParams(temperature=1.0, seed=7, extra_args=vllm_temperatures.extra_args(TwoTemperatures(1.0, 0.6, 0.672)))

Entropies are measured at the request's ``temperature`` T. vLLM calls these processors on float32 logits and divides by
T afterwards, so

- without a seed, logits leave here as z_t · T / T'_t, and vLLM draws (with its own top-p and top-k) from
  softmax(z_t / T'_t);
- with a seed, the token is drawn here (``sampler.py``, top-p and top-k included) and all others become
  impossible. vLLM's own seeded draws depend on its version and its device, and begin anew when an interrupted answer is
  resumed; these depend on the logits, the seed and the position. What remains of the row is one number, the drawn
  token's: H_t (times T, which vLLM divides by). ``LLM(logprobs_mode="processed_logits")`` with
  ``SamplingParams(logprobs=0)`` returns it in the place of the log-prob, which is how an evaluation knows the share of
  tokens above the threshold.

Requests without these arguments are left alone.
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
except ImportError:  # nothing below needs it; the tests run without vLLM
    LogitsProcessor = object

#: what vLLM imports in its own processes
NAME = "entropy_fork.vllm_temperatures:TwoTemperaturesProcessor"

KEYS = {"high": "temperature_high", "low": "temperature_low", "threshold": "entropy_threshold"}

#: rows at once: a few tensors of 64 × 151,936 × 8 bytes (78 MB), which vLLM has not set memory aside for
CHUNK = 64


def extra_args(pair: TwoTemperatures) -> dict[str, float]:
    """What goes into ``SamplingParams.extra_args``."""
    return {key: float(getattr(pair, name)) for name, key in KEYS.items()}


def parse(params: Any) -> TwoTemperatures | None:
    """Eq. 5's parameters of a request, None where it has none.

    Args:
        params: vLLM's ``SamplingParams``.

    Raises:
        ValueError: some of the arguments are missing or have no meaning, or are joined by what would undo them.
    """
    given = {key: value for key, value in (params.extra_args or {}).items() if key in KEYS.values()}
    if not given:
        return None
    if missing := [key for key in KEYS.values() if key not in given]:
        raise ValueError(f"two temperatures need {', '.join(missing)} in extra_args beside {', '.join(given)}")
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
    """A request: how it is drawn, whether here, and its tokens so far (vLLM appends to ``output``)."""

    decoding: Decoding
    has_seed: bool
    prompt_length: int
    output: list[int]


class TwoTemperaturesProcessor(LogitsProcessor):
    """vLLM's interface; it keeps one of these per worker."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self.device = device
        self.rows: dict[int, _Row] = {}
        self.chunks: list[tuple[Tensor, list[_Row], Sampler]] = []

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Called in the front end for each request, whose error it becomes."""
        parse(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """No: where T' is 0 the likeliest token is taken, whatever else was to be drawn."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests to their rows; None where the rows are those of the last step."""
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
        """Logits of one step, shape (rows, vocabulary), changed in place."""
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
