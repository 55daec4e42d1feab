"""What answers the questions: vLLM, or without it the light sampler of ``entropy_fork/sampling/generation.py``.

Each answer has a seed of its own. So it does not depend on the answers that are computed with it, up to the last bits
of a sum. The light sampler goes further: its batches are fixed beforehand, so an evaluation that was interrupted gives
exactly the same answers as one that was not.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from entropy_fork.common.cores import share_cores
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.evaluation.checkpoint import code_refused
from entropy_fork.sampling import vllm_cpu, vllm_processor
from entropy_fork.sampling.two_temperatures import TwoTemperatures


@dataclass(frozen=True)
class SamplingSettings:
    """How answers are drawn.

    Attributes:
        temperature: T; 0 takes the likeliest token.
        top_p, top_k: nucleus and top-k truncation; 1.0 and -1 leave the distribution as it is.
        max_tokens: tokens of an answer at most, its end token included.
        seed: the seed of the whole evaluation.
        two_temperatures: draws with these instead of T. Entropies are then measured at T, which must be above 0.

    Raises:
        EntropyForkError: a value has no meaning.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 20480
    seed: int = 0
    two_temperatures: TwoTemperatures | None = None

    def __post_init__(self) -> None:
        for is_good, name, wanted in (
            (self.temperature >= 0, "temperature", "0 (greedy) or more"),
            (0 < self.top_p <= 1, "top_p", "in (0, 1]"),
            (self.top_k == -1 or self.top_k >= 1, "top_k", "-1 (off) or at least 1"),
            (self.max_tokens >= 1, "max_tokens", "at least 1"),
            (self.seed >= 0, "seed", "0 or more"),
        ):
            if not is_good:
                raise EntropyForkError(f"{name} is {getattr(self, name)}, and must be {wanted}")
        if self.two_temperatures is not None and self.temperature == 0:
            raise EntropyForkError("temperature is 0, and entropies are measured at it: write --temperature 1")

    @property
    def is_greedy(self) -> bool:
        """Whether all answers to a question are the same."""
        pair = self.two_temperatures
        return self.temperature == 0 if pair is None else pair.high == pair.low == 0


@dataclass(frozen=True)
class AnswerJob:
    """One answer that is wanted: question, number of the answer to it, seed, and token ids of the prompt."""

    question: int
    sample: int
    seed: int
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class Generated:
    """The answer to a job.

    Attributes:
        job: what was asked for.
        token_ids: of the answer, with its end token.
        truncated: whether the length limit ended it.
        above: with two temperatures, how many of its tokens were drawn above the threshold.
    """

    job: AnswerJob
    token_ids: list[int]
    truncated: bool
    above: int | None = None


class Engine(Protocol):
    """Answers jobs, and hands over answers as they are finished.

    Attributes:
        sampling: how answers are drawn. It may be replaced between two calls, if ``max_tokens`` stays the same and two
            temperatures are not exchanged for one, or one for two.
    """

    sampling: SamplingSettings

    def answers(self, jobs: Sequence[AnswerJob], is_wanted: Callable[[AnswerJob], bool]) -> Iterator[list[Generated]]:
        """Answer those of ``jobs`` that are wanted, in any order. An evaluation always gives the same ``jobs``."""
        ...


def choose_engine(asked: str) -> str:
    """``vllm`` or ``transformers``; ``auto`` takes vLLM where it is installed.

    Raises:
        EntropyForkError: vLLM is asked for and not installed; or ``auto`` is, and without vLLM the accelerator of this
            machine would not be used.
    """
    spec = importlib.util.find_spec("vllm")
    is_installed = spec is not None and spec.origin is not None  # a plain folder called vllm has no origin
    if asked == "vllm" and not is_installed:
        raise EntropyForkError("vLLM is not installed: pip install vllm, or write --engine transformers (on the CPU)")
    if asked != "auto":
        return asked
    if not is_installed and torch.accelerator.is_available():
        raise EntropyForkError(
            "vLLM is not installed, and the engine transformers does not use this machine's accelerator: "
            "pip install vllm, or write --engine transformers to use the CPU"
        )
    return "vllm" if is_installed else "transformers"


def parse_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """``["max_num_seqs=64"]`` as a dict; values are read as YAML.

    Raises:
        EntropyForkError: a text does not have this form.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError

    for pair in pairs:
        if "=" not in pair[1:]:
            raise EntropyForkError(f"--vllm {pair} must be KEY=VALUE, an argument of vllm.LLM")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist(list(pairs)))  # type: ignore[return-value]
    except YAMLError as error:
        raise EntropyForkError(f"--vllm {' '.join(pairs)}: a value is not YAML ({error})") from error


def above_threshold(entropies: Sequence[float], pair: TwoTemperatures | None) -> int | None:
    """How many entropies are above the threshold, in float32 as when tokens were drawn. None without a threshold."""
    if pair is None:
        return None
    return int(np.count_nonzero(np.asarray(entropies, np.float32) > np.float32(pair.threshold)))


class TransformersEngine:
    """The light sampler, on the CPU, in batches that depend only on the questions.

    Args:
        folder: the model's Hugging Face folder.
        sampling: how answers are drawn.
        dtype: name of a torch dtype.
        end_ids: the token ids that end an answer.
        batch_size: at most this many answers at once. A batch has the n-th answers to consecutive questions.
    """

    def __init__(self, folder: Path, sampling: SamplingSettings, dtype: str, end_ids: Sequence[int], batch_size: int):
        from transformers import AutoModelForCausalLM

        from entropy_fork.sampling.grouped_attention import share_keys

        if "OMP_NUM_THREADS" not in os.environ:
            share_cores()
        with code_refused(folder):
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), attn_implementation="sdpa", trust_remote_code=False
            )
        self.model = share_keys(model).eval()
        self.sampling, self.end_ids, self.batch_size = sampling, end_ids, batch_size

    def answers(self, jobs: Sequence[AnswerJob], is_wanted: Callable[[AnswerJob], bool]) -> Iterator[list[Generated]]:
        """Answer batch by batch. A batch of which only a part is wanted is drawn as a whole."""
        from entropy_fork.sampling.generation import generate

        for batch in self._batches(jobs):
            if not any(map(is_wanted, batch)):
                continue
            # As a whole: the number of rows can change the last bits of a logit.
            answers = generate(self.model, [self._request(job) for job in batch], self.end_ids)
            yield [
                Generated(
                    job,
                    answer.token_ids,
                    answer.stop_reason == "length",
                    above_threshold(answer.entropies, self.sampling.two_temperatures),
                )
                for job, answer in zip(batch, answers, strict=True)
                if is_wanted(job)
            ]

    def _batches(self, jobs: Sequence[AnswerJob]) -> Iterator[list[AnswerJob]]:
        for _, same_sample in groupby(jobs, key=lambda job: job.sample):
            rows = list(same_sample)
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size]

    def _request(self, job: AnswerJob) -> Any:
        from entropy_fork.sampling.generation import Request

        sampling = self.sampling
        return Request(
            job.prompt_ids,
            job.seed,
            sampling.max_tokens,
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.two_temperatures,
        )


class VllmEngine:
    """vLLM's own engine loop: all requests at once, and each answer as soon as it is complete.

    Args:
        folder: the model's Hugging Face folder.
        sampling: how answers are drawn.
        dtype: name of a torch dtype.
        end_ids: the token ids that end an answer.
        max_model_len: tokens of the longest prompt and answer together.
        tensor_parallel: GPUs that one copy of the model is spread over.
        arguments: further arguments of ``vllm.LLM``.
        tokenizer: a folder with the tokenizer; None takes the model's.
    """

    def __init__(
        self,
        folder: Path,
        sampling: SamplingSettings,
        dtype: str,
        end_ids: Sequence[int],
        max_model_len: int,
        tensor_parallel: int = 1,
        arguments: dict[str, Any] | None = None,
        tokenizer: Path | None = None,
    ):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        settings: dict[str, Any] = {
            "model": str(folder),
            "dtype": dtype,
            "max_model_len": max_model_len,
            "tensor_parallel_size": tensor_parallel,
            "seed": sampling.seed % 2**31,
            "use_tqdm_on_load": False,
            "generation_config": "vllm",  # only our sampling settings count; end tokens go with each request
        }
        if tokenizer is not None:
            settings["tokenizer"] = str(tokenizer)
        if vllm_cpu.is_installed():
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
            # With a prompt in parts, vLLM 0.29 sets the answer's generator back by one number, and a generator on a CPU
            # cannot do that ("CPU Generator does not use offset").
            settings |= {"enforce_eager": True, "enable_chunked_prefill": False}
            settings["max_num_batched_tokens"] = max(max_model_len, 4096)
        if sampling.two_temperatures is not None:
            settings |= {"logits_processors": [vllm_processor.NAME], "logprobs_mode": "processed_logits"}
        from vllm import LLM, SamplingParams

        self.engine = LLM(**(settings | (arguments or {}))).llm_engine
        self.sampling, self.end_ids, self.parameters = sampling, list(end_ids), SamplingParams

    def answers(self, jobs: Sequence[AnswerJob], is_wanted: Callable[[AnswerJob], bool]) -> Iterator[list[Generated]]:
        """Hand over each answer as soon as vLLM has finished it."""
        sampling = self.sampling
        pair = sampling.two_temperatures
        two: dict[str, Any] = {} if pair is None else {"logprobs": 0, "extra_args": vllm_processor.extra_args(pair)}
        waiting = {f"{job.question}-{job.sample}": job for job in jobs if is_wanted(job)}
        for name, job in waiting.items():
            parameters = self.parameters(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=sampling.max_tokens,
                seed=job.seed,
                stop_token_ids=self.end_ids,
                detokenize=False,
                **two,
            )
            self.engine.add_request(name, {"prompt_token_ids": list(job.prompt_ids)}, parameters)
        while self.engine.has_unfinished_requests():
            finished = [output for output in self.engine.step() if output.finished]
            if finished:
                yield [
                    Generated(
                        waiting[output.request_id],
                        list(output.outputs[0].token_ids),
                        output.outputs[0].finish_reason == "length",
                        None if pair is None else above_threshold(entropies_of(output.outputs[0]), pair),
                    )
                    for output in finished
                ]


def entropies_of(completion: Any) -> list[float]:
    """One entropy (nats) per token. ``sampling/vllm_processor.py`` writes it in the place of the log-prob."""
    return [step[token].logprob for token, step in zip(completion.token_ids, completion.logprobs, strict=True)]
