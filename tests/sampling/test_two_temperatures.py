"""Eq. 5 row by row: the function, the light sampler with it, and the input for vLLM, without vLLM."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from entropy_fork.core.entropy import entropies
from entropy_fork.sampling import vllm_processor
from entropy_fork.sampling.generation import Request, generate
from entropy_fork.sampling.sampler import Decoding, Sampler
from entropy_fork.sampling.two_temperatures import PAPER_TEMPERATURES, TwoTemperatures, scaled, two_temperatures
from entropy_fork.sampling.vllm_processor import TwoTemperaturesProcessor, extra_args, parse

VOCABULARY, END = 50, 7


# ---- the function, against Eq. 5 written out with Python's floats


def restated_probabilities(row: list[float], temperature: float) -> list[float]:
    if temperature == 0:
        likeliest = row.index(max(row))
        return [float(token == likeliest) for token in range(len(row))]
    highest = max(row)
    weights = [math.exp((logit - highest) / temperature) for logit in row]
    return [weight / sum(weights) for weight in weights]


def restated_entropy(row: list[float], temperature: float) -> float:
    return -sum(p * math.log(p) for p in restated_probabilities(row, temperature) if p > 0)


@st.composite
def batches(draw: st.DrawFn) -> list[list[float]]:
    size = draw(st.integers(2, 6))
    logit = st.floats(-20, 20, width=16) | st.just(-math.inf)
    row = st.lists(logit, min_size=size, max_size=size).filter(lambda row: max(row) > -math.inf)
    return draw(st.lists(row, min_size=1, max_size=5))


@given(
    batches(),
    st.floats(0.3, 2),
    st.sampled_from(PAPER_TEMPERATURES),
    st.sampled_from(PAPER_TEMPERATURES),
    st.floats(0, 2),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
@settings(max_examples=200)
def test_restated(
    batch: list[list[float]], temperature: float, high: float, low: float, threshold: float, dtype: torch.dtype
) -> None:
    logits = torch.tensor(batch, dtype=dtype)
    batch = logits.double().tolist()  # rounded to 16 bits
    entropy = entropies(logits, temperature)
    chosen = two_temperatures(entropy, high, low, threshold)
    probabilities = scaled(logits, chosen).softmax(-1)
    assert entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (entropy >= 0).all()
    for number, row in enumerate(batch):
        expected = restated_entropy(row, temperature)
        assume(abs(expected - threshold) > 1e-5)
        assert entropy[number].item() == pytest.approx(expected, abs=2e-6)
        own = high if expected > threshold else low
        assert chosen[number].item() == pytest.approx(own)
        assert probabilities[number].tolist() == pytest.approx(restated_probabilities(row, own), abs=3e-5)


def test_a_temperature_of_its_own_for_each_row() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 30)
    temperatures = torch.tensor([0.5, 1.0, 2.0, 1.0])
    each = torch.cat([entropies(logits[i : i + 1], float(temperatures[i])) for i in range(4)])
    torch.testing.assert_close(entropies(logits, temperatures), each)
    high, low, threshold = torch.tensor([0.0, 2, 3, 5]), torch.tensor([1.0, 0, 1, 1]), torch.tensor([0.0, 9, 0, 9])
    assert two_temperatures(each, high, low, threshold).tolist() == [0, 0, 3, 1]


def test_the_ends_of_the_threshold() -> None:
    """With τ = 0 every position with any entropy is above it, a certain one is not. With an infinite τ none is."""
    certain, fork = [0.0, -math.inf, -math.inf], [0.0, 0.0, -math.inf]
    entropy = entropies(torch.tensor([certain, fork]))
    assert entropy.tolist() == [0.0, pytest.approx(math.log(2))]
    assert two_temperatures(entropy, 2.0, 0.5, 0.0).tolist() == [0.5, 2.0]
    assert two_temperatures(entropy, 2.0, 0.5, math.inf).tolist() == [0.5, 0.5]
    assert two_temperatures(entropy, 2.0, 0.5, entropy[1]).tolist() == [0.5, 0.5], "above, not at"


@pytest.mark.parametrize("company", [1, 3, 200])
def test_entropies_do_not_depend_on_the_rest_of_the_batch(company: int) -> None:
    torch.manual_seed(1)
    rows, others = 4 * torch.randn(5, 1000), 50 * torch.randn(company, 1000)
    alone = entropies(rows)
    torch.testing.assert_close(entropies(torch.cat([rows, others]))[:5], alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(entropies(torch.cat([others, rows]))[-5:], alone, atol=1e-6, rtol=0)
    impossible = torch.full((5, 24), -torch.inf)  # a vocabulary whose size was rounded up
    torch.testing.assert_close(entropies(torch.cat([rows, impossible], dim=1)), alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("high", "low", "threshold"), [(-1, 1, 1), (1, math.inf, 1), (1, math.nan, 1), (1, 1, -0.1)])
def test_values_without_a_meaning(high: float, low: float, threshold: float) -> None:
    with pytest.raises(ValueError, match=r"T_high is|T_low is|the threshold is"):
        TwoTemperatures(high, low, threshold)
    with pytest.raises(ValueError, match="temperature above 0"):
        Decoding(1, temperature=0.0, two_temperatures=TwoTemperatures(1, 1))


# ---- the light sampler


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, intermediate_size=64, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


#: about half of this model's entropies are above this threshold
MIDDLE = 2.3


def requests(count: int, **changes: Any) -> list[Request]:
    numbers = random.Random(5)
    prompts = [[numbers.randrange(8, VOCABULARY) for _ in range(numbers.randrange(3, 20))] for _ in range(count)]
    return [Request(prompt, seed, 12, **changes) for seed, prompt in enumerate(prompts)]


def test_log_probs_and_entropies_are_those_of_a_plain_forward_pass(model: PreTrainedModel) -> None:
    pair = TwoTemperatures(0.4, 1.5, MIDDLE)
    batch = requests(20, temperature=0.8, two_temperatures=pair)
    drawn_at = Counter()
    for request, answer in zip(batch, generate(model, batch, [END]), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*request.prompt_ids, *answer.token_ids]])).logits[0]
        for step, token in enumerate(answer.token_ids):
            row = logits[len(request.prompt_ids) - 1 + step].tolist()
            entropy = restated_entropy(row, 0.8)
            assert answer.entropies[step] == pytest.approx(entropy, abs=2e-5)
            own = pair.high if entropy > pair.threshold else pair.low
            drawn_at[own] += 1
            assert answer.log_probs[step] == pytest.approx(math.log(restated_probabilities(row, own)[token]), abs=1e-4)
    assert min(drawn_at.values()) > 40, drawn_at


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.9, "top_k": 12}])
def test_equal_temperatures_are_ordinary_sampling(
    model: PreTrainedModel, temperature: float, truncation: dict[str, Any]
) -> None:
    plain = generate(model, requests(24, temperature=temperature, **truncation), [END])
    for pair in (
        TwoTemperatures(temperature, temperature, MIDDLE),
        TwoTemperatures(temperature, 5.0, 0.0),
        TwoTemperatures(5.0, temperature, math.inf),
    ):
        batch = requests(24, temperature=temperature, two_temperatures=pair, **truncation)
        for answer, expected in zip(generate(model, batch, [END]), plain, strict=True):
            assert len(answer.entropies) == len(answer.token_ids)
            assert replace(answer, entropies=[]) == expected


def test_zero_takes_the_likeliest_token(model: PreTrainedModel) -> None:
    greedy = [answer.token_ids for answer in generate(model, requests(20, temperature=0.0), [END])]
    both = generate(model, requests(20, two_temperatures=TwoTemperatures(0, 0, MIDDLE)), [END])
    assert [answer.token_ids for answer in both] == greedy
    batch = requests(20, two_temperatures=TwoTemperatures(3.0, 0, MIDDLE))
    likeliest = Counter()
    for request, answer in zip(batch, generate(model, batch, [END]), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*request.prompt_ids, *answer.token_ids]])).logits[0]
        best = logits[len(request.prompt_ids) - 1 : -1].argmax(-1).tolist()
        for entropy, token, expected in zip(answer.entropies, answer.token_ids, best, strict=True):
            likeliest[entropy > MIDDLE, token == expected] += 1
    assert likeliest[False, False] == 0 < likeliest[False, True]
    assert likeliest[True, False] > 20


def test_a_mixed_batch_and_an_interruption(model: PreTrainedModel) -> None:
    """Rows with two temperatures, with one, and greedy rows in one batch: each is as it is alone."""
    pair = TwoTemperatures(2.0, 0.3, MIDDLE)
    kinds: list[dict[str, Any]] = [{}, {"two_temperatures": pair}, {"temperature": 0.0}, {"temperature": 0.7}]
    batch = [replace(request, **kinds[i % 4]) for i, request in enumerate(requests(24))]
    together = generate(model, batch, [END], prompt_length=20)
    for request, answer in zip(batch, together, strict=True):
        assert generate(model, [request], [END], prompt_length=20)[0].token_ids == answer.token_ids
        assert bool(answer.entropies) == (request.two_temperatures is not None)

    request, whole = next((r, a) for r, a in zip(batch[1::4], together[1::4], strict=True) if len(a.token_ids) > 6)
    steps = iter([False] * 4 + [True])
    part = generate(model, [request], [END], 20, interrupted=lambda: next(steps))[0]
    resumed = replace(request, prompt_ids=[*request.prompt_ids, *part.token_ids], max_tokens=8)
    rest = generate(model, [resumed], [END], 20)[0]
    assert part.token_ids + rest.token_ids == whole.token_ids
    assert part.entropies + rest.entropies == pytest.approx(whole.entropies, abs=1e-5)


# ---- what vLLM is given


class Direction(Enum):
    UNIDIRECTIONAL = 0
    SWAP = 1


def sampling_params(**changes: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": None, "extra_args": None, "min_p": 0.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
    }  # fmt: skip
    return SimpleNamespace(**(values | changes))


def update(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"removed": [], "added": [], "moved": []} | changes))


def processor() -> TwoTemperaturesProcessor:
    return TwoTemperaturesProcessor(None, torch.device("cpu"), False)


def test_the_processor_follows_requests_through_vllms_batch() -> None:
    """Requests of three kinds come, go and move. At any time each row is treated by its own request."""
    numbers = random.Random(3)
    torch.manual_seed(3)
    pairs = [TwoTemperatures(2.0, 0.3, 1.5), TwoTemperatures(0.0, 1.0, 2.5), TwoTemperatures(1.0, 0.0, 2.0)]
    subject = processor()
    batch: list[SimpleNamespace] = []
    seen = Counter()

    def new(number: int) -> SimpleNamespace:
        kind = numbers.choice(["plain", "seeded", "free"])
        pair = numbers.choice(pairs)
        params = sampling_params(
            temperature=numbers.choice([1.0, 0.7]),
            seed=number if kind == "seeded" else None,
            extra_args={"other": 1} if kind == "plain" else extra_args(pair),
            top_p=numbers.choice([1.0, 0.9]),
            top_k=numbers.choice([0, 8]),
        )
        return SimpleNamespace(kind=kind, pair=pair, params=params, prompt=[1] * numbers.randrange(1, 9), output=[])

    for step in range(120):
        kept = [request for request in batch if numbers.random() > 0.2]
        removed = [index for index, request in enumerate(batch) if request not in kept]
        arrivals = [new(1000 * step + i) for i in range(numbers.randrange(0, 5))]
        # As in vLLM: new requests fill the holes, then the last rows move into the holes that are left.
        rows: dict[int, SimpleNamespace] = {i: request for i, request in enumerate(batch) if request in kept}
        added, moved, holes = [], [], list(removed)
        for request in arrivals:
            index = holes.pop(0) if holes else len(rows)
            rows[index] = request
            added.append((index, request.params, request.prompt, request.output))
        for hole in holes:
            last = max(rows, default=-1)
            if last > hole:
                rows[hole] = rows.pop(last)
                moved.append((last, hole, Direction.UNIDIRECTIONAL))
        if len(rows) > 2 and numbers.random() < 0.5:
            a, b = numbers.sample(sorted(rows), 2)
            rows[a], rows[b] = rows[b], rows[a]
            moved.append((a, b, Direction.SWAP))
        batch = [rows[index] for index in range(len(rows))]
        changed = bool(removed or added or moved)
        # If a new request takes a removed row, vLLM reports the row as added only, not as removed.
        filled = {index for index, *_ in added}
        gone = [index for index in removed if index not in filled]
        subject.update_state(update(removed=gone, added=added, moved=moved) if changed else None)

        logits = 2 * torch.randn(len(batch), 40)
        processed = subject.apply(logits.clone())
        for row, result, request in zip(logits, processed, batch, strict=True):
            params, pair = request.params, request.pair
            if request.kind == "plain":
                assert torch.equal(row, result)
            elif request.kind == "free":
                own = pair.high if restated_entropy(row.tolist(), params.temperature) > pair.threshold else pair.low
                assert (result / params.temperature).softmax(-1).tolist() == pytest.approx(
                    restated_probabilities(row.tolist(), own), abs=1e-5
                )
            else:
                decoding = Decoding(params.seed, params.temperature, params.top_p, params.top_k, pair)
                position = np.array([len(request.prompt) + len(request.output)], dtype=np.uint64)
                token, _, entropy = Sampler([decoding], row.device).draw(row[None], position)
                assert entropy is not None
                assert torch.isfinite(result).nonzero().flatten().tolist() == token.tolist()
                left = result[token] / params.temperature
                torch.testing.assert_close(left, entropy, atol=1e-6, rtol=1e-6)
            seen[request.kind] += 1
            request.output.append(0)
    assert min(seen.values()) > 100, seen


def test_more_rows_than_a_chunk() -> None:
    torch.manual_seed(0)
    count = 2 * vllm_processor.CHUNK + 3
    params = [sampling_params(seed=i, extra_args=extra_args(TwoTemperatures(2.0, 0.5, 2.0))) for i in range(count)]
    subject = processor()
    subject.update_state(update(added=[(i, params[i], [1, 2], []) for i in range(count)]))
    logits = 2 * torch.randn(count, 30)
    tokens = subject.apply(logits.clone()).isfinite().nonzero()[:, 1]
    decodings = [Decoding(i, two_temperatures=TwoTemperatures(2.0, 0.5, 2.0)) for i in range(count)]
    expected, _, _ = Sampler(decodings, logits.device).draw(logits, np.full(count, 2, dtype=np.uint64))
    assert torch.equal(tokens, expected)


def test_the_processor_draws_what_the_light_sampler_draws(model: PreTrainedModel) -> None:
    """Both use the same model; one side has no cache."""
    pair = TwoTemperatures(1.7, 0.4, MIDDLE)
    batch = requests(12, temperature=0.9, two_temperatures=pair, top_p=0.95)
    expected = generate(model, batch, [END])
    subject = processor()
    outputs: list[list[int]] = [[] for _ in batch]
    params = [
        sampling_params(temperature=0.9, top_p=0.95, seed=request.seed, extra_args=extra_args(pair))
        for request in batch
    ]
    added = [(i, params[i], list(request.prompt_ids), outputs[i]) for i, request in enumerate(batch)]
    subject.update_state(update(added=added))
    for _ in range(12):
        with torch.no_grad():
            texts = [[*request.prompt_ids, *output] for request, output in zip(batch, outputs, strict=True)]
            logits = torch.stack([model(torch.tensor([text])).logits[0, -1] for text in texts])
        for output, row in zip(outputs, subject.apply(logits), strict=True):
            output.append(int(row.argmax()))
        subject.update_state(None)
    for output, answer in zip(outputs, expected, strict=True):
        assert output[: len(answer.token_ids)] == answer.token_ids


def test_requests_that_are_refused() -> None:
    good = extra_args(TwoTemperatures(1.0, 0.5, 0.672))
    assert parse(sampling_params(extra_args=good)) == TwoTemperatures(1.0, 0.5, 0.672)
    assert parse(sampling_params(extra_args={"mine": 3})) is None
    for changes, message in (
        ({"extra_args": {"temperature_low": 1.0}}, "need temperature_high, entropy_threshold in extra_args"),
        ({"extra_args": good | {"temperature_high": "hot"}}, "'temperature_high'.* is 'hot', and must be a number"),
        ({"extra_args": good | {"temperature_high": -1}}, "T_high is -1"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"min_p": 0.1}, "min_p and penalties"),
        ({"repetition_penalty": 1.1}, "min_p and penalties"),
    ):
        with pytest.raises(ValueError, match=message):
            TwoTemperaturesProcessor.validate_params(sampling_params(**({"extra_args": good} | changes)))
