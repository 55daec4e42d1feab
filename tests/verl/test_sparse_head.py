"""The LM head at some positions, compared with the head at all: gradients, log-probabilities, entropies, messages.

verl's FSDP2 engine takes the same gradient step twice, once with the dense head. In float64 they agree to 1e-10.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers.mini_batch import NUM_ROWS, VOCABULARY, Answers, make_answers, make_batch, make_engine
from helpers.processes import Processes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.engine import keep_gradients
from entropy_fork.core.entropy import entropies
from entropy_fork.core.lm_head import log_probs_entropy_and_rank, padded_positions, response_positions
from entropy_fork.verl.config import MASKABLE_LOSSES, TOKENWISE_LOSSES
from entropy_fork.verl.sparse_head import (
    AT_KEPT,
    AT_RESPONSES,
    EVERYWHERE,
    HEAD,
    RowsOfHead,
    log_probs_and_entropy,
    log_probs_with_gradient,
)

# --- positions and sums ----------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=6), pad=st.integers(0, 3))
def test_positions(lengths: list[tuple[int, int]], pad: int) -> None:
    """A response token is predicted at the position before it."""
    offsets, wanted, padded, begin = [0], [], [], 0
    width = max(p + r for p, r in lengths) + pad
    for row, (prompt, response) in enumerate(lengths):
        wanted += [begin + prompt + t - 1 for t in range(response)]
        padded += [row * width + prompt + t - 1 for t in range(response)]
        begin += prompt + response
        offsets.append(begin)
    positions = response_positions(torch.tensor(offsets), torch.tensor([r for _, r in lengths]))
    assert positions.tolist() == wanted
    assert padded_positions(positions, torch.tensor(offsets), width).tolist() == padded


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 20])
def test_log_probs_and_entropy_are_those_of_all_logits(rows: int, temperature: float) -> None:
    torch.manual_seed(rows)
    hidden, weight = torch.randn(rows, 16, dtype=torch.float64), torch.randn(50, 16, dtype=torch.float64)
    labels = torch.randint(50, (rows,))
    everything = (hidden @ weight.T / temperature).log_softmax(-1)
    log_probs, entropy, rank = log_probs_entropy_and_rank(hidden, weight, labels, temperature, chunk=8)
    of_label = everything[torch.arange(rows), labels]
    torch.testing.assert_close(log_probs, of_label, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(entropy, -(everything.exp() * everything).sum(-1), atol=1e-12, rtol=1e-12)
    assert torch.equal(rank, (everything > of_label[:, None]).sum(-1))


def test_entropies_of_16_bit_models_are_not_rounded_to_16_bits() -> None:
    """With logits around 20, as in a trained model, the error of verl's bfloat16 formula exceeds most entropies."""
    from verl.utils.torch_functional import entropy_from_logits

    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32, dtype=torch.bfloat16), 3 * torch.randn(500, 32, dtype=torch.bfloat16)
    logits = hidden @ weight.T
    right = torch.distributions.Categorical(logits=logits.double()).entropy()
    _, ours = log_probs_and_entropy(hidden, weight, torch.zeros(64, dtype=torch.int64), 1.0)
    assert float((ours - right).abs().max()) < 1e-4
    assert float((entropy_from_logits(logits) - right).abs().max()) > 0.01


def test_a_token_that_cannot_come_adds_nothing_to_an_entropy() -> None:
    """0·log 0 counts as 0. A logit is -inf if the product overflows, or in a masked vocabulary."""
    hidden, weight = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.5], [-torch.inf]])
    labels = torch.tensor([0, 1])
    expected = entropies(hidden @ weight.T, 0.7)
    assert bool(expected.isfinite().all())
    log_probs, entropy, _ = log_probs_entropy_and_rank(hidden, weight, labels, 0.7)
    of_training = log_probs_and_entropy(hidden, weight, labels, 0.7)
    for actual in (entropy, of_training[1]):
        assert torch.equal(actual, expected)
    for actual in (log_probs, of_training[0]):
        torch.testing.assert_close(actual, (hidden @ weight.T / 0.7).log_softmax(-1)[torch.arange(2), labels])


# --- a loss and the tokens that it drops -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKABLE_LOSSES)
def test_which_losses_need_the_dropped_tokens(name: str) -> None:
    """In exactly the listed losses, the log-probability of a dropped token changes neither loss nor gradient."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    policy = PolicyLossConfig(
        loss_mode=name, dro_beta=0.1, clip_cov_ratio=0.5, clip_cov_lb=-1.0, clip_cov_ub=1.0, kl_cov_ratio=0.5
    )
    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_mini_batch_size=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy
    )
    config.global_batch_info.update(dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None)

    def loss_and_gradient(log_prob: Tensor, old: Tensor, advantages: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)  # clip_cov clips random tokens
        log_prob = log_prob.clone().requires_grad_()
        loss, _ = get_policy_loss_fn(name)(
            old_log_prob=old, log_prob=log_prob, advantages=advantages, response_mask=torch.ones(4, 9),
            loss_agg_mode="seq-mean-token-mean" if name in ("gspo", "sapo") else "token-mean", config=config,
            rollout_is_weights=weights,
        )  # fmt: skip
        loss.backward()
        return loss.detach(), torch.where(weights > 0, log_prob.grad, 0)  # type: ignore[return-value, arg-type]

    is_same = []
    for seed in range(10):
        random = torch.Generator().manual_seed(seed)
        old, change, advantages = torch.randn(3, 4, 9, generator=random).unbind()
        weights = torch.where(torch.rand(4, 9, generator=random) < 0.4, 2.0, 0.0)
        new = old - 2 + change
        whole = loss_and_gradient(new, old - 2, advantages, weights)
        skipped = loss_and_gradient(torch.where(weights > 0, new, old - 2), old - 2, advantages, weights)
        is_same.append(all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(whole, skipped, strict=True)))
    assert all(is_same) == (name in TOKENWISE_LOSSES)


#: verl keeps the temperature in float32. To compare in float64, float32 must represent it exactly.
TEMPERATURE = 0.75

# --- verl's engine ---------------------------------------------------------------------------------------------------

FUSED = {"use_fused_kernels": True, "fused_kernel_options": {"impl_backend": "torch"}}

#: what differs between the engines: packed or padded rows, and the model
ENGINES: dict[str, dict[str, Any]] = {
    "packed": {"use_remove_padding": True},
    "padded, checkpointing": {"use_remove_padding": False, "enable_gradient_checkpointing": True},
    "padded, LoRA": {"use_remove_padding": False, "lora_rank": 4, "target_modules": "all-linear"},
    "packed, updated": {"use_remove_padding": True, "learning_rate": 0.01},
    "packed, bf16": {"use_remove_padding": True, "param_dtype": "bf16"},
    "packed, sequence parallel": {"use_remove_padding": True, "sequence_parallel": 2},
    "packed, fused": {"use_remove_padding": True, **FUSED},
    "padded, fused": {"use_remove_padding": False, **FUSED},
    "padded, bf16": {"use_remove_padding": False, "param_dtype": "bf16"},
    "packed, fused, bf16": {"use_remove_padding": True, "param_dtype": "bf16", **FUSED},
    "padded, fused, bf16": {"use_remove_padding": False, "param_dtype": "bf16", **FUSED},
    "packed, FSDP1": {"use_remove_padding": True, "strategy": "fsdp"},
    "padded, FSDP1, checkpointing": {
        "use_remove_padding": False, "strategy": "fsdp", "use_orig_params": True, "enable_gradient_checkpointing": True,
    },
    "packed, FSDP1, LoRA": {
        "use_remove_padding": True, "strategy": "fsdp", "use_orig_params": True, "lora_rank": 4,
        "target_modules": "all-linear",
    },
    "packed, FSDP1, bf16": {"use_remove_padding": True, "strategy": "fsdp", "param_dtype": "bf16"},
}  # fmt: skip


def engine_of(state: dict[str, Any], name: str, path: str, dtype: str) -> Any:
    """The engine, made at the first call. With fp64 all of it is float64, which verl has no name for."""
    import contextlib
    from unittest.mock import patch

    key = (name, path, dtype)
    if key not in state:
        context: Any = contextlib.nullcontext()
        if dtype == "fp64":
            context = patch("verl.utils.torch_dtypes.PrecisionType.to_dtype", staticmethod(lambda _: torch.float64))
        with context:
            state[key] = make_engine(path, **ENGINES[name])
    return state[key]


def step(
    state: dict[str, Any], name: str, path: str, dtype: str, answers: Answers, rows: list[int], where: str,
    cut: dict[str, Any], temperature: float = 1.0, rows_kept: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A gradient step, and how many numbers came out of the LM head."""
    from unittest.mock import patch

    from verl.workers.config import FSDPActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    from entropy_fork.verl import sparse_head
    from entropy_fork.verl.policy_loss import weights_written

    engine = engine_of(state, name, path, dtype)
    keep_gradients(engine, state)
    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_mini_batch_size=NUM_ROWS, ppo_micro_batch_size_per_gpu=NUM_ROWS,
        policy_loss=PolicyLossConfig(loss_mode="entropy_fork/vanilla"),
    )  # fmt: skip
    data = make_batch(answers, rows, settings_of(name, where, cut, temperature))
    numbers: list[int] = []
    head = sparse_head._causal_lm(engine.module).get_output_embeddings()

    def count(module: Any, _: Any, output: Any) -> None:
        if module is head:
            numbers.append(output.numel())

    hook = torch.nn.modules.module.register_module_forward_hook(count)  # a head with its own hook stays as it is
    limit = sparse_head.ROWS_KEPT if rows_kept is None else rows_kept
    try:
        with engine.train_mode(), weights_written(), patch.object(sparse_head, "ROWS_KEPT", limit):
            output = engine.train_batch(data, loss_function=partial(ppo_loss, config=config))
    finally:
        hook.remove()
    metrics = {key: getattr(value, "aggregate", lambda v=value: v)() for key, value in output["metrics"].items()}
    return {"gradients": state["gradients"], "numbers": numbers, "metrics": metrics}


def settings_of(name: str, where: str, cut: dict[str, Any], temperature: float) -> dict[str, Any]:
    return {
        "temperature": temperature,
        "global_batch_size": NUM_ROWS,
        "calculate_entropy": False,
        "use_fused_kernels": ENGINES[name].get("use_fused_kernels", False),
        "use_remove_padding": ENGINES[name]["use_remove_padding"],
        HEAD: where,
        **cut,
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """Folders of a model with its own head, and of a model whose head shares the embedding."""
    folders = {}
    for tied in (False, True):
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=64, initializer_range=0.4,
            tie_word_embeddings=tied,
        )  # fmt: skip
        folders[tied] = str(tmp_path_factory.mktemp("model"))
        Qwen3ForCausalLM(config).save_pretrained(folders[tied])
    return folders


@pytest.fixture(scope="module")
def fused_worlds() -> Iterator[dict[int, Processes]]:
    """Ranks for fused kernels only, because these replace the forward pass of the model's class."""
    worlds = {size: Processes(size) for size in (1, 2)}
    yield worlds
    for world in worlds.values():
        world.close()


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[int, Processes]]:
    worlds = {size: Processes(size) for size in (1, 2)}
    yield worlds
    for world in worlds.values():
        world.close()


def parts_of(world: Processes, name: str) -> list[list[int]]:
    """The rows of each rank; ranks that share sequences have the same."""
    if "sequence_parallel" in ENGINES[name]:
        return [list(range(NUM_ROWS))] * world.size
    share = NUM_ROWS // world.size
    return [list(range(rank * share, (rank + 1) * share)) for rank in range(world.size)]


def both(
    world: Processes, name: str, path: str, dtype: str, answers: Answers, cut: dict[str, Any], **more: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The step with the head at kept positions, and with the head at all positions."""
    parts = parts_of(world, name)
    return tuple(
        world(partial(step, **more), [(name, path, dtype, answers, part, where, cut) for part in parts])
        for where in (AT_KEPT, EVERYWHERE)
    )  # type: ignore[return-value]


def weighted(seed: int, ratio: float) -> Answers:
    """Answers with token weights, a share of which is not zero."""
    answers = make_answers(seed, importance=True)
    random = torch.Generator().manual_seed(seed)
    assert answers.importance is not None
    weights = [w * (torch.rand(len(w), generator=random) < ratio) for w in answers.importance]
    return replace(answers, importance=weights)


def num_kept(answers: Answers) -> int:
    assert answers.importance is not None
    return sum(int(((w != 0) & (m != 0)).sum()) for w, m in zip(answers.importance, answers.masks, strict=True))


def close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([1, 2]),
    tied=st.booleans(),
    name=st.sampled_from(
        [
            name
            for name in ENGINES
            if not any(word in name for word in ("fused", "parallel", "bf16", "updated", "FSDP1"))
        ]
    ),
    cut=st.sampled_from(
        [{"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 3}]
        + [{"use_dynamic_bsz": True, "max_token_len_per_gpu": tokens} for tokens in (20, 1000)]
    ),
    ratio=st.sampled_from([0.0, 0.02, 0.2, 0.7, 1.0]),
    temperature=st.sampled_from([1.0, TEMPERATURE]),
)
@settings(max_examples=60)
def test_the_gradient_is_the_dense_heads(
    worlds: dict[int, Processes], models: dict[bool, str], seed: int, size: int, tied: bool, name: str,
    cut: dict[str, Any], ratio: float, temperature: float,
) -> None:  # fmt: skip
    """With all weights, micro-batches, ranks and models, also if a rank keeps nothing."""
    answers = weighted(seed, ratio)
    sparse, dense = both(worlds[size], name, models[tied], "fp64", answers, cut, temperature=temperature)
    for part, whole in zip(sparse, dense, strict=True):
        close(part["gradients"], whole["gradients"], 1e-10)
        assert part["metrics"]["actor/pg_loss"] == pytest.approx(whole["metrics"]["actor/pg_loss"], rel=1e-10)
    # a number for each kept token (one where a micro-batch has none), not a vocabulary for each token
    empty = sum(len(part["numbers"]) for part in sparse)
    assert num_kept(answers) <= sum(sum(part["numbers"]) for part in sparse) <= num_kept(answers) + empty
    assert sum(sum(part["numbers"]) for part in dense) >= VOCABULARY * sum(map(len, answers.responses))


@pytest.mark.parametrize(("size", "tied"), [(1, True), (2, False)])
@pytest.mark.parametrize("name", [name for name in ENGINES if "FSDP1" in name and "bf16" not in name])
def test_the_gradient_is_the_dense_heads_under_fsdp1(
    worlds: dict[int, Processes], models: dict[bool, str], name: str, size: int, tied: bool
) -> None:
    """There the head's weight is a view into a flat parameter. Also with more rows than ``ROWS_KEPT``."""
    tied = tied and "LoRA" not in name  # with a tied head, stock verl's own step fails in torch on one rank
    answers = weighted(2, 0.3)
    cut = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 6 // size}
    for rows_kept in (None, 5):
        sparse, dense = both(worlds[size], name, models[tied], "fp64", answers, cut, rows_kept=rows_kept)
        for part, whole in zip(sparse, dense, strict=True):
            close(part["gradients"], whole["gradients"], 1e-10)
        assert num_kept(answers) <= sum(sum(part["numbers"]) for part in sparse) < num_kept(answers) + 12


def updated(
    state: dict[str, Any], path: str, answers: Answers, rows: list[int], where: str, cut: dict[str, Any]
) -> dict[str, Tensor]:
    """The parameters after an update with verl's optimizer."""
    from unittest.mock import patch

    state.clear()  # a new engine, which starts from the model's parameters
    with patch("test_sparse_head.keep_gradients", lambda *_: None):
        state["gradients"] = {}
        step(state, "packed, updated", path, "fp64", answers, rows, where, cut)
    (engine,) = [value for key, value in state.items() if isinstance(key, tuple)]
    return {n: getattr(p, "full_tensor", lambda p=p: p)().detach() for n, p in engine.module.named_parameters()}


@pytest.mark.process
@pytest.mark.parametrize("size", [1, 2])
def test_updated_parameters(models: dict[bool, str], size: int) -> None:
    answers, cut = weighted(6, 0.3), {"use_dynamic_bsz": True, "max_token_len_per_gpu": 60}
    world = Processes(size)
    try:
        parts = parts_of(world, "packed, updated")
        sparse, dense = (
            world(updated, [(models[False], answers, part, where, cut) for part in parts])
            for where in (AT_KEPT, EVERYWHERE)
        )
    finally:
        world.close()
    start = load_file(f"{models[False]}/model.safetensors")
    for part, whole in zip(sparse, dense, strict=True):
        for name, parameter in whole.items():
            torch.testing.assert_close(part[name], parameter, rtol=1e-8, atol=1e-9)
        moved = (whole["lm_head.weight"] - start["lm_head.weight"].double()).abs().max()
        assert float(moved) > 0.005, "nothing was trained"


@pytest.mark.parametrize("size", [1, 2])
def test_in_mixed_precision(worlds: dict[int, Processes], models: dict[bool, str], size: int) -> None:
    answers = weighted(4, 0.3)
    cut = {"use_dynamic_bsz": True, "max_token_len_per_gpu": 60}
    sparse, dense = both(worlds[size], "packed, bf16", models[False], "fp32", answers, cut)
    for part, whole in zip(sparse, dense, strict=True):
        close(part["gradients"], whole["gradients"], 0.01)


@pytest.mark.parametrize("ratio", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("tied", [False, True])
def test_under_sequence_parallelism(
    worlds: dict[int, Processes], models: dict[bool, str], ratio: float, tied: bool
) -> None:
    """Each rank has half of the packed sequence, and computes the kept rows of its half.

    On a CPU, attention stays within a half, in the dense step too, because Ulysses needs flash attention.
    """
    answers = weighted(11, ratio)
    cut = {"use_dynamic_bsz": True, "max_token_len_per_gpu": 25}
    sparse, dense = both(worlds[2], "packed, sequence parallel", models[tied], "fp64", answers, cut)
    for part, whole in zip(sparse, dense, strict=True):
        close(part["gradients"], whole["gradients"], 1e-10)
    assert num_kept(answers) <= sum(sum(part["numbers"]) for part in sparse) < num_kept(answers) + 20


@pytest.mark.parametrize("name", ["packed, fused", "padded, fused"])
@pytest.mark.parametrize("size", [1, 2])
def test_verls_fused_heads_get_the_kept_rows(
    fused_worlds: dict[int, Processes], models: dict[bool, str], name: str, size: int
) -> None:
    """The head is tied. FSDP2 shards an untied head separately, and they would read the shard (verl issue 5633)."""
    answers = weighted(3, 0.3)
    cut = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 3}
    sparse, dense = both(fused_worlds[size], name, models[True], "fp32", answers, cut, temperature=TEMPERATURE)
    for part, whole in zip(sparse, dense, strict=True):
        close(part["gradients"], whole["gradients"], 1e-5)
        assert part["numbers"] == [], "verl's fused path does not call the head"


def test_verls_fused_heads_cannot_read_a_head_that_fsdp2_shards(
    fused_worlds: dict[int, Processes], models: dict[bool, str]
) -> None:
    """This is stock verl's step. If this test fails, verl can do it, and 'entropy-fork plan' need not refuse it."""
    cut = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 3}
    arguments = ("packed, fused", models[False], "fp32", weighted(3, 0.3), list(range(NUM_ROWS)), EVERYWHERE, cut)
    with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
        fused_worlds[1](step, [arguments])


@pytest.mark.parametrize("tied", [False, True])
def test_more_rows_than_are_kept_are_computed_twice(
    worlds: dict[int, Processes], models: dict[bool, str], tied: bool
) -> None:
    answers = weighted(3, 0.7)
    cut = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 6}
    sparse, dense = both(worlds[1], "packed", models[tied], "fp64", answers, cut, rows_kept=10)
    close(sparse[0]["gradients"], dense[0]["gradients"], 1e-10)


@pytest.mark.process
def test_of_many_rows_the_weights_gradient_is_rounded_as_rarely_as_can_be() -> None:
    """18,000 kept rows in bfloat16. verl's fused head adds up products of 512 rows: twice the error of a dense head."""
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.torch_functional import logprobs_from_logits

    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(18_000, 32, generator=random), 0.3 * torch.randn(256, 32, generator=random)
    labels, factor = torch.randint(256, (18_000,), generator=random), torch.randn(18_000, generator=random)

    def gradient(log_probs_of: Any, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        leaf = weight.bfloat16().to(dtype, copy=True).requires_grad_()
        log_probs = log_probs_of(hidden.bfloat16().to(dtype), leaf, labels)
        (log_probs.to(torch.promote_types(dtype, torch.float32)) * factor).sum().backward()
        return leaf.grad.double()  # type: ignore[union-attr]

    exact = gradient(lambda h, w, y: (h @ w.T).log_softmax(-1)[torch.arange(len(y)), y], torch.float64)
    ours, dense, fused = (
        float((gradient(log_probs_of) - exact).norm() / exact.norm())
        for log_probs_of in (
            lambda h, w, y: log_probs_with_gradient(h, w, y, 1.0),
            lambda h, w, y: logprobs_from_logits(h @ w.T, y),
            lambda h, w, y: FusedLinearForPPO()(h, w, y, 1.0)[0],
        )
    )
    print(f"relative error: kept rows {ours:.1e}, dense {dense:.1e}, verl's fused head {fused:.1e}")
    assert ours < 1.4 * dense
    assert fused > 1.8 * dense


def test_verls_metrics_are_means_over_the_kept_tokens(worlds: dict[int, Processes], models: dict[bool, str]) -> None:
    answers = weighted(5, 0.3)
    cut = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": NUM_ROWS}
    (sparse,), (dense,) = both(worlds[1], "packed", models[False], "fp32", answers, cut)
    for name in ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"):
        assert name in dense["metrics"]
        assert name in sparse["metrics"], "a name that dashboards are built on"
    # the means over kept tokens, which the guard also counts
    sums = {name: sparse["metrics"][f"entropy_fork/{name}"] for name in ("loss_tokens", "loss_kl", "loss_clipped")}
    assert sums["loss_tokens"] == num_kept(answers)
    assert sparse["metrics"]["actor/ppo_kl"] == pytest.approx(sums["loss_kl"] / sums["loss_tokens"], rel=1e-4)
    assert sparse["metrics"]["actor/pg_clipfrac"] == pytest.approx(sums["loss_clipped"] / sums["loss_tokens"])


# --- the log-prob pass -----------------------------------------------------------------------------------------------


def log_prob_pass(
    state: dict[str, Any], name: str, path: str, dtype: str, answers: Answers, rows: list[int], where: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs and entropies of the response tokens, row by row."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import response_from_nested

    engine = engine_of(state, name, path, dtype)
    cut = {"use_dynamic_bsz": True, "max_token_len_per_gpu": 60}
    data = make_batch(answers, rows, settings_of(name, where, cut, TEMPERATURE))
    tu.assign_non_tensor(data, calculate_entropy=True, compute_loss=False)
    with engine.eval_mode():
        output = engine.infer_batch(data)["model_output"]
    mask = data["response_mask"]
    return tuple(list(response_from_nested(output[key], mask).unbind()) for key in ("log_probs", "entropy"))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (name, size)
        for name in ENGINES
        for size in (1, 2)
        if name != "packed, updated" and (size == 2 or "parallel" not in name)
    ],
)
def test_the_log_prob_pass_skips_prompts(
    worlds: dict[int, Processes], fused_worlds: dict[int, Processes], models: dict[bool, str], name: str, size: int
) -> None:
    answers = make_answers(7)
    is_fused = "fused" in name
    dtype, tolerance = ("fp32", 1e-5) if is_fused or "bf16" in name else ("fp64", 1e-10)
    parts = parts_of(worlds[size], name)
    path = models[name != "packed, FSDP1, LoRA"]
    sparse, dense = (
        (fused_worlds if is_fused else worlds)[size](
            log_prob_pass,
            [(name, path, dtype, answers, part, where) for part in parts],
        )
        for where in (AT_RESPONSES, EVERYWHERE)
    )
    for part, whole in zip(sparse, dense, strict=True):
        for mine, verls in zip(part, whole, strict=True):
            for one, other in zip(mine, verls, strict=True):
                torch.testing.assert_close(one, other.to(one.dtype), rtol=tolerance, atol=tolerance)


# --- unchanged weights -----------------------------------------------------------------------------------------------


def passes(
    state: dict[str, Any], name: str, path: str, answers: Answers, temperature: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """With unchanged weights, pairs of log-probs (from an update, from a pass before it), by stock verl and by us.

    A micro-batch has one row, and some keep a single token.
    """
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import response_from_nested

    engine = engine_of(state, name, path, "fp32")
    keep_gradients(engine, state)

    def run(where: str, update: bool, entropy: bool = False) -> Tensor:
        cut = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 1}
        data = make_batch(answers, list(range(NUM_ROWS)), settings_of(name, where, cut, temperature))
        tu.assign_non_tensor(data, calculate_entropy=entropy)
        if not update:
            with engine.eval_mode():
                log_probs = engine.infer_batch(data)["model_output"]["log_probs"]
            return response_from_nested(log_probs, data["response_mask"]).values()
        seen: list[Tensor] = []  # verl keeps the order of micro-batches of one size

        def loss(model_output: dict[str, Any], data: Any, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
            seen.append(response_from_nested(model_output["log_probs"], data["response_mask"]).values().detach())
            return model_output["log_probs"].values().sum(), {}

        with engine.train_mode():
            engine.train_batch(data, loss)
        return torch.cat(seen)

    assert answers.importance is not None
    kept = torch.cat([(w != 0) & (m != 0) for w, m in zip(answers.importance, answers.masks, strict=True)])
    dense_update, sparse_update = run(EVERYWHERE, update=True), run(AT_KEPT, update=True)
    old, reference = run(AT_RESPONSES, update=False, entropy=True), run(AT_RESPONSES, update=False)
    return {
        "stock": (dense_update, run(EVERYWHERE, update=False, entropy=True)),
        "both sparse": (sparse_update[kept], old[kept]),
        "sparse pass, dense update": (dense_update, old),
        "sparse reference, dense update": (dense_update, reference),
        "sparse reference, sparse update": (sparse_update[kept], reference[kept]),
    }


@pytest.mark.parametrize("temperature", [0.6, 0.8, 1.0, 1.2])
@pytest.mark.parametrize(
    "name",
    ["packed", "packed, bf16", "padded, checkpointing", "padded, bf16", "packed, FSDP1", "packed, FSDP1, bf16"]
    + [name for name in ENGINES if "fused" in name],
)
def test_with_unchanged_weights_the_ratio_is_one(
    worlds: dict[int, Processes], fused_worlds: dict[int, Processes], models: dict[bool, str], name: str,
    temperature: float,
) -> None:  # fmt: skip
    """The ratio is as near to 1 as stock verl's own, whichever pass is sparse; and so is the k3 KL."""
    world = (fused_worlds if "fused" in name else worlds)[1]
    answers = weighted(3, 0.2)
    answers.prompts = [prompt.repeat(3) for prompt in answers.prompts]  # stock verl computes three rows too
    (pairs,) = world(passes, [(name, models[True], answers, temperature)])
    distances = {}
    for pair, (new, old) in pairs.items():
        assert old.dtype == pairs["stock"][1].dtype, pair
        difference = (new - old).double()
        off = (difference.exp() - 1).abs()
        k3 = (-difference).exp() + difference - 1
        distances[pair] = (float(off.mean()), float(off.max()), float(k3.mean()))
    for pair, distance in distances.items():
        assert all(mine <= stocks for mine, stocks in zip(distance, distances["stock"], strict=True)), (pair, distances)


# --- what it cannot serve --------------------------------------------------------------------------------------------


class FakeQuantized(torch.nn.Linear):
    """A linear layer with rounded weights, like verl's QATLinear (verl/utils/qat/linear.py), which needs triton."""

    def forward(self, x: Tensor) -> Tensor:
        rounded = (self.weight * 4).round() / 4
        return torch.nn.functional.linear(x, self.weight + (rounded - self.weight).detach())


def refused_or_dense(state: dict[str, Any], path: str, answers: Answers, change: str) -> tuple[str, bool]:
    """What is printed (or raised) for a changed model, and whether its gradient is that of the dense head."""
    import contextlib
    import io

    from entropy_fork.verl import sparse_head

    cut = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 6}
    context: Any = contextlib.nullcontext()
    if change == "fake quantization":
        from unittest.mock import patch

        from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

        build = FSDPEngine._build_module

        def build_quantized(self: Any) -> Any:  # as verl's _apply_qat does if the patterns do not exclude the head
            model = build(self)
            model.get_output_embeddings().__class__ = FakeQuantized
            return model

        context = patch.object(FSDPEngine, "_build_module", build_quantized)
    with context:
        engine = state["packed", path, "fp32"] = make_engine(path, **ENGINES["packed"])
    model = sparse_head._causal_lm(engine.module)
    if change == "bias":
        model.get_output_embeddings().bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    elif change == "vision":
        model.config.vision_config = {}
    elif change == "soft cap":
        forward = model.forward

        def capped(*arguments: Any, **keywords: Any) -> Any:
            output = forward(*arguments, **keywords)
            output.logits = 30 * torch.tanh(output.logits / 30)
            return output

        model.forward = capped
    rows = list(range(NUM_ROWS))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            sparse = step(state, "packed", path, "fp32", answers, rows, AT_KEPT, cut)
    except sparse_head.EntropyForkError as error:
        return str(error), False
    dense = step(state, "packed", path, "fp32", answers, rows, EVERYWHERE, cut)
    of_model = [name for name in dense["gradients"] if not name.endswith("bias")]  # verl never sets that one to zero
    is_same = all(torch.equal(sparse["gradients"][name], dense["gradients"][name]) for name in of_model)
    return said.getvalue(), is_same and "actor/ppo_kl" in sparse["metrics"]


@pytest.mark.process
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("vision", "a vision model has its own forward pass"),
        ("bias", "its LM head is a .*, not a linear layer"),
        ("fake quantization", "its LM head, a FSDPFakeQuantized, has a forward pass of its own"),
    ],
)
def test_what_cannot_be_served_is_dense_and_said_once(models: dict[bool, str], change: str, reason: str) -> None:
    world = Processes(1)
    try:
        ((said, is_dense),) = world(refused_or_dense, [(models[False], weighted(1, 0.3), change)])
    finally:
        world.close()
    assert is_dense
    assert len(said.splitlines()) == 1
    import re

    assert re.search(f"the LM head sees every position in .*: {reason}", said)


def a_model(head: torch.nn.Module) -> Any:
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=8, hidden_size=4, num_hidden_layers=0, tie_word_embeddings=False))
    model.lm_head = head
    return model


def test_only_a_head_that_multiplies_by_its_weight_is_suitable() -> None:
    """Anything else that changes its input, its output or its weight would be silently left out."""
    unsuitable = RowsOfHead.unsuitable
    assert unsuitable(a_model(torch.nn.Linear(4, 8, bias=False))) is None
    assert "a forward pass of its own" in str(unsuitable(a_model(FakeQuantized(4, 8, bias=False))))
    assert "not a linear layer without a bias" in str(unsuitable(a_model(torch.nn.Linear(4, 8))))
    head = torch.nn.Linear(4, 8, bias=False)
    head.forward = lambda x: 2 * torch.nn.functional.linear(x, head.weight)  # type: ignore[method-assign]
    assert "a forward pass of its own" in str(unsuitable(a_model(head)))
    for hook in ("register_forward_hook", "register_forward_pre_hook"):
        head = torch.nn.Linear(4, 8, bias=False)
        getattr(head, hook)(lambda *_: None)
        assert "a hook" in str(unsuitable(a_model(head)))
    head = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 8, bias=False))
    assert "a parametrization" in str(unsuitable(a_model(head)))


@pytest.mark.process
def test_a_model_that_changes_its_logits_stops(models: dict[bool, str]) -> None:
    world = Processes(1)
    try:
        ((said, _),) = world(refused_or_dense, [(models[False], weighted(1, 0.3), "soft cap")])
    finally:
        world.close()
    assert "entropy_fork.sparse_head=false" in said


def test_after_an_error_in_the_model_its_head_is_idle() -> None:
    """The next call may not go through the engine, for instance in a program that caught an out-of-memory error."""
    from entropy_fork.verl.sparse_head import RowsOfHead, SparseHead

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        )
    )  # fmt: skip
    head = RowsOfHead(model)

    class Verls:
        def forward_step(self, *_: Any) -> None:
            head.rows, head.labels = torch.tensor([1, 2]), torch.tensor([2, 3])
            assert model(input_ids=torch.arange(6)[None]).logits.shape == (1, 2, 1)
            raise MemoryError

    class Engine(SparseHead, Verls):
        _rows_of_head = head

    with pytest.raises(MemoryError):
        Engine().forward_step(TensorDict({}), None, False)
    assert model(input_ids=torch.arange(6)[None]).logits.shape == (1, 6, 32)
