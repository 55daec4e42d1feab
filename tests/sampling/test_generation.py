"""The light rollout: right log-probs, the right distribution, and answers that depend on their own seed only."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from entropy_fork.core.randomness import uniform_numbers
from entropy_fork.evaluation.engines import SamplingSettings, TransformersEngine
from entropy_fork.sampling.generation import Answer, Request, generate
from entropy_fork.sampling.grouped_attention import share_keys

VOCABULARY, END = 50, 7


def made_model(shares_keys: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        head_dim=16, intermediate_size=64, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    made = Qwen3ForCausalLM(config).eval()
    return share_keys(made) if shares_keys else made


@pytest.fixture(scope="module", params=[False, True], ids=["sdpa", "grouped"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return made_model(request.param)


def requests(count: int, **settings: float) -> list[Request]:
    numbers = random.Random(5)
    return [
        Request([numbers.randrange(8, VOCABULARY) for _ in range(numbers.randrange(3, 20))], seed, 12, **settings)  # type: ignore[arg-type]
        for seed in range(count)
    ]


def restated_log_probs(model: PreTrainedModel, request: Request, answer: Answer) -> torch.Tensor:
    """Log-probs of one row, without padding and without a cache."""
    ids = torch.tensor([[*request.prompt_ids, *answer.token_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1] / (request.temperature or 1.0)
    return logits.log_softmax(-1).gather(1, torch.tensor(answer.token_ids)[:, None]).squeeze(1)


def test_grouped_attention_gives_the_same_answers() -> None:
    """The heads of a group see the same keys, without a copy of them. Only the order of sums differs."""
    plain, grouped = (generate(made_model(shares), requests(20), [END]) for shares in (False, True))
    assert [answer.token_ids for answer in plain] == [answer.token_ids for answer in grouped]
    for one, other in zip(plain, grouped, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


def test_grouped_attention_copies_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the prompt, each call gets the cache's keys as they are, once for each group of heads."""
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, *rest: Any, **settings: Any) -> torch.Tensor:
        seen.append((tuple(query.shape[1:3]), key.shape[1]))
        return original(query, key, *rest, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    generate(made_model(True), requests(3), [])
    width = max(len(request.prompt_ids) for request in requests(3))
    assert set(seen) == {((6, width), 6), ((2, 3), 2)}


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_log_probs_are_those_of_a_plain_forward_pass(model: PreTrainedModel, temperature: float) -> None:
    batch = requests(20, temperature=temperature)
    for request, answer in zip(batch, generate(model, batch, [END]), strict=True):
        expected = restated_log_probs(model, request, answer)
        torch.testing.assert_close(torch.tensor(answer.log_probs), expected, atol=2e-5, rtol=1e-4)


def test_greedy_is_transformers_greedy(model: PreTrainedModel) -> None:
    batch = requests(8, temperature=0.0)
    for request, answer in zip(batch, generate(model, batch, [END]), strict=True):
        ids = torch.tensor([request.prompt_ids])
        reference = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=END, pad_token_id=0)
        assert answer.token_ids == reference[0, ids.shape[1] :].tolist()


def test_answers_do_not_depend_on_their_company(model: PreTrainedModel) -> None:
    """In any order and in any batch, the same seed gives the same tokens."""
    batch = requests(24)
    expected = [answer.token_ids for answer in generate(model, batch, [END], prompt_length=20)]
    order = list(range(24))
    random.Random(1).shuffle(order)
    for part in (order[:1], order[1:6], order[6:]):
        for index, answer in zip(part, generate(model, [batch[i] for i in part], [END], 20), strict=True):
            assert answer.token_ids == expected[index]


def test_an_interrupted_answer_goes_on_as_if_it_had_not_been(model: PreTrainedModel) -> None:
    request = next(
        r for r, a in zip(requests(9), generate(model, requests(9), [END]), strict=True) if len(a.token_ids) > 6
    )
    whole = generate(model, [request], [END])[0]
    steps = iter([False] * 4 + [True])
    part = generate(model, [request], [END], interrupted=lambda: next(steps))[0]
    assert (part.stop_reason, len(part.token_ids)) == ("aborted", 4)
    resumed = Request([*request.prompt_ids, *part.token_ids], request.seed, request.max_tokens - 4)
    assert part.token_ids + generate(model, [resumed], [END])[0].token_ids == whole.token_ids


def test_stop_reasons(model: PreTrainedModel) -> None:
    for answer in generate(model, requests(40), [END]):
        if answer.stop_reason == "completed":
            assert answer.token_ids.index(END) == len(answer.token_ids) - 1
        else:
            assert (answer.stop_reason, len(answer.token_ids)) == ("length", 12)
            assert END not in answer.token_ids


def test_tokens_are_drawn_from_the_distribution(model: PreTrainedModel) -> None:
    """4,000 seeds on one prompt, compared with the exact probabilities of its next token."""
    prompt = [9, 10, 11]
    answers = generate(model, [Request(prompt, seed, 1) for seed in range(4000)], [END])
    drawn = torch.bincount(torch.tensor([a.token_ids[0] for a in answers]), minlength=VOCABULARY) / 4000
    with torch.no_grad():
        exact = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    standard_error = (exact * (1 - exact) / 4000).sqrt()
    assert ((drawn - exact).abs() < 5 * standard_error + 1e-3).all()


@pytest.mark.parametrize(("settings", "size"), [({"top_k": 3}, 3), ({"top_p": 1e-6}, 1)])
def test_truncation(model: PreTrainedModel, settings: dict[str, float], size: int) -> None:
    prompt = [9, 10, 11]
    answers = generate(model, [Request(prompt, seed, 1, **settings) for seed in range(300)], [END])  # type: ignore[arg-type]
    with torch.no_grad():
        likeliest = model(torch.tensor([prompt])).logits[0, -1].topk(size)
    assert {answer.token_ids[0] for answer in answers} == set(likeliest.indices.tolist())
    renormalised = likeliest.values.log_softmax(-1)
    expected = dict(zip(likeliest.indices.tolist(), renormalised.tolist(), strict=True))
    for answer in answers:
        assert answer.log_probs[0] == pytest.approx(expected[answer.token_ids[0]], abs=1e-5)


def test_uniform_numbers_are_uniform_and_independent() -> None:
    seeds, counters = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(300, dtype=np.uint64))
    numbers = uniform_numbers(seeds, counters)
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    share = np.histogram(numbers, bins=20, range=(0, 1))[0] / numbers.size
    assert np.abs(share - 0.05).max() < 0.003
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.02


def test_a_model_that_sdpa_would_compute_wrongly_is_refused(tmp_path: Path) -> None:
    """gpt-oss has attention sinks, which neither sdpa nor its grouped form knows."""
    config = GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, intermediate_size=32, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"],
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    settings = SamplingSettings(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=4, seed=0)
    with pytest.raises(ValueError, match="does not support an attention implementation"):
        TransformersEngine(tmp_path, settings, "float32", [END], 4)
