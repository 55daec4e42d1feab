"""The formulas of memory.py against torch: tensors counted, in verl's own functions where they are verl's."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import verl.utils.torch_functional as verl_F
from helpers.live_bytes import LiveBytes
from helpers.places import PYTHONPATH
from helpers.processes import Processes
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.preflight import logits as logits_of
from entropy_fork.preflight import memory
from entropy_fork.preflight.logits import Head
from entropy_fork.preflight.memory import Layout
from entropy_fork.preflight.model_shape import ModelShape, built_in_names, find_model_shape, shape_of_config
from entropy_fork.verl import sparse_head
from entropy_fork.verl.sparse_head import log_probs_and_entropy, log_probs_with_gradient


def qwen3(layers: int, **sizes: Any) -> Any:
    values = {
        "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "vocab_size": 500, "tie_word_embeddings": False, "max_position_embeddings": 8192,
    } | sizes  # fmt: skip
    return AutoConfig.for_model("qwen3", num_hidden_layers=layers, architectures=["Qwen3ForCausalLM"], **values)


def shape(layers: int, **sizes: Any) -> ModelShape:
    return shape_of_config(qwen3(layers, **sizes), "a test")


def layout(**values: Any) -> Layout:
    return Layout(**{"strategy": "fsdp2", "world": 8, "shard": 8, **values})


# --- the model ---


def test_the_built_in_shapes_have_the_sizes_that_their_names_say() -> None:
    counts = {name: round(find_model_shape(name, name).num_parameters / 1e9, 2) for name in built_in_names()}
    assert counts == {"qwen3-8b": 8.19, "qwen3-14b": 14.77, "qwen3-32b": 32.76}


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_a_model_that_is_really_made(tied: bool) -> None:
    config = qwen3(3, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    counted = shape_of_config(config, "a test")
    assert counted.num_parameters == sum(p.numel() for p in model.parameters())
    assert counted.num_layer_parameters == sum(p.numel() for p in model.model.layers[1].parameters())
    assert (counted.hidden, counted.heads, counted.kv_heads, counted.tied) == (64, 4, 2, tied)


def test_adapters_are_those_that_peft_makes() -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        AutoModelForCausalLM.from_config(qwen3(2)), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert sum(p.count for p in shape(2).lora_parameters(8)) == trained


def test_where_a_model_is_looked_for(tmp_path: Path) -> None:
    qwen3(2).save_pretrained(tmp_path / "mine")
    assert find_model_shape(str(tmp_path / "mine")).layers == 2
    assert find_model_shape("/not/here", str(tmp_path / "mine")).source.endswith("config.json")
    assert find_model_shape("Qwen/Qwen3-14B-Base").max_positions == 32768
    assert find_model_shape("/models/qwen3-14b/").max_positions == 40960
    with pytest.raises(
        EntropyForkError, match=r"/not/here is not on this machine; write --model-config PATH.*qwen3-8b"
    ):
        find_model_shape("/not/here")
    with pytest.raises(EntropyForkError, match="--model-config gone: there is no such file"):
        find_model_shape("Qwen/Qwen3-14B", "gone")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "none such"}))
    with pytest.raises(EntropyForkError, match=r"is not a model's config\.json"):
        find_model_shape("x", str(tmp_path))


# --- what FSDP2 holds ---


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


def fsdp_bytes(state: dict[str, Any], vocab: int, lora_rank: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and Adam's moments on this rank, of a model wrapped as verl does it."""
    from peft import LoraConfig, get_peft_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from verl.utils.fsdp_utils import apply_fsdp2

    model = AutoModelForCausalLM.from_config(qwen3(2, vocab_size=vocab))
    if lora_rank:
        model = get_peft_model(model, LoraConfig(r=lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    apply_fsdp2(model, {"mesh": mesh, "mp_policy": policy}, type("Config", (dict,), {"forward_prefetch": False})())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(input_ids=torch.arange(6)[None]).logits.sum().backward()
    optimizer.step()

    def size(tensors: Any) -> int:
        return sum(t.to_local().numel() * t.to_local().element_size() for t in tensors)

    moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return (
        size(model.parameters()),
        size(p.grad for p in model.parameters() if p.grad is not None),
        size(moments),
    )


@pytest.mark.parametrize(("vocab", "lora_rank"), [(500, 0), (501, 0), (500, 8), (500, 3)])
def test_states_are_what_fsdp2_holds_on_real_ranks(two_ranks: Processes, vocab: int, lora_rank: int) -> None:
    measured = two_ranks(fsdp_bytes, [(vocab, lora_rank)] * 2)
    counted = memory.states(shape(2, vocab_size=vocab), layout(world=2, shard=2, lora_rank=lora_rank))
    assert (counted.weights, counted.gradients, counted.optimizer) == measured[0]


def test_what_stays_during_the_rollout() -> None:
    model, stays = shape(2), memory.resident_states
    held = memory.states(model, layout())
    assert stays(model, layout()) == held.weights + held.optimizer
    assert stays(model, layout(), after_first_update=False) == held.weights
    assert stays(model, layout(param_offload=True)) == held.optimizer
    assert stays(model, layout(param_offload=True, optimizer_offload=True)) == 0
    assert stays(model, layout(offload_policy=True)) == 0
    assert memory.host_states(model, layout(param_offload=True, optimizer_offload=True), 8) == 8 * (
        held.weights + held.optimizer
    )


# --- activations ---

SIZES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8},
    "32B": {"hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64, "num_key_value_heads": 8},
    "small": {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8},
}


def peak_of_a_pass(name: str, layers: int, tokens: int, checkpointing: bool, backward: bool) -> tuple[int, int]:
    """Peak bytes of the decoder without its head, and what is alive before the backward pass, on fake tensors."""
    config = qwen3(layers, head_dim=128, vocab_size=256, **SIZES[name])
    config._attn_implementation = "sdpa"
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        known = [*model.parameters(), *(p.grad for p in model.parameters()), *model.buffers()]
        positions = torch.arange(tokens)[None]
        live = LiveBytes(known)
        with live, contextlib.nullcontext() if backward else torch.no_grad():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model.model(input_ids=positions, position_ids=positions, use_cache=False).last_hidden_state
            saved = live.now()
            if backward:
                out.sum().backward()
    return live.peak, saved


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("checkpointing", [True, False])
def test_activations_of_an_update(name: str, checkpointing: bool) -> None:
    tokens = 4096
    model = shape(4, head_dim=128, vocab_size=256, **SIZES[name])
    measured, _ = peak_of_a_pass(name, 4, tokens, checkpointing, backward=True)
    counted = memory.activations(model, layout(checkpointing=checkpointing), tokens)
    assert counted == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("name", list(SIZES))
def test_what_a_layer_saves_is_counted_to_the_byte(name: str) -> None:
    tokens = 4096
    saved = [peak_of_a_pass(name, layers, tokens, False, backward=True)[1] for layers in (2, 4)]
    model = shape(4, head_dim=128, vocab_size=256, **SIZES[name])
    assert (saved[1] - saved[0]) / 2 / tokens == memory.layer_activations(model)


@pytest.mark.parametrize("name", list(SIZES))
def test_activations_without_a_backward_pass(name: str) -> None:
    measured, _ = peak_of_a_pass(name, 2, 4096, False, backward=False)
    model = shape(2, head_dim=128, vocab_size=256, **SIZES[name])
    assert memory.forward_activations(model, layout(), 4096) == pytest.approx(measured, rel=0.05)


# --- logits ---


def head_bytes(dtype: torch.dtype, entropy: str, backward: bool, chunk: int, tokens: int, vocab: int) -> int:
    """Peak bytes from hidden states to log-probs and back, through verl's functions as its FSDP engine calls them."""
    weight = torch.randn(vocab, 4, dtype=dtype, requires_grad=True)
    hidden = torch.randn(tokens, 4, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,))
    weight.grad, hidden.grad = torch.zeros_like(weight), torch.zeros_like(hidden)
    live = LiveBytes([weight, hidden, weight.grad, hidden.grad, labels])
    with live, contextlib.nullcontext() if backward else torch.no_grad():
        logits = hidden @ weight.t()
        entropies = None
        if entropy != "none":
            with contextlib.nullcontext() if entropy == "loss" else torch.no_grad():
                entropies = (
                    verl_F.entropy_from_logits_with_chunking(logits, chunk)
                    if chunk
                    else verl_F.entropy_from_logits(logits)
                )
        log_probs = verl_F.logprobs_from_logits(logits, labels, inplace_backward=entropy == "none")
        if backward:
            loss = log_probs.sum() + (entropies.sum() if entropy == "loss" and entropies is not None else 0)
            del logits, log_probs, entropies
            loss.backward()
    return live.peak


@pytest.mark.parametrize("entropy", ["none", "mask", "loss"])
def test_logits_of_an_update_where_the_loss_is_not_in_place(entropy: str) -> None:
    head = Head(logit_bytes=4, compiled=False, entropy_in_update=entropy, in_place_loss=False)
    measured = head_bytes(torch.float32, entropy, True, 0, 128, 4096)
    assert logits_of.update_logits(head, 128, 4096) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(("dtype", "chunk"), [(torch.float32, 0), (torch.float32, 32), (torch.bfloat16, 32)])
def test_logits_of_the_log_prob_pass(dtype: torch.dtype, chunk: int) -> None:
    head = Head(logit_bytes=dtype.itemsize, compiled=False, chunk=chunk)
    measured = head_bytes(dtype, "mask", False, chunk, 128, 4096)
    assert logits_of.forward_logits(head, 128, 4096) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("backward", [False, True])
def test_a_fused_head_holds_a_chunk(backward: bool) -> None:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    tokens, vocab = 2 * logits_of.FUSED_CHUNK, 1024
    weight = torch.randn(vocab, 4, requires_grad=backward)
    hidden = torch.randn(tokens, 4, requires_grad=backward)
    live = LiveBytes([weight, hidden])
    with live:
        log_probs, _ = FusedLinearForPPO()(hidden, weight, torch.randint(0, vocab, (tokens,)), 1.0)
        if backward:
            log_probs.sum().backward()
    function = logits_of.update_logits if backward else logits_of.forward_logits
    assert function(Head(fused=True), tokens, vocab) == pytest.approx(live.peak, rel=0.02)


def test_a_sparse_head_is_the_dense_one_on_fewer_tokens_up_to_a_limit() -> None:
    head = Head()
    assert logits_of.update_logits(logits_of.sparse(head), 200, 1000) == logits_of.update_logits(head, 1000, 1000) // 5
    limit, many = logits_of.ROWS_KEPT, logits_of.ROWS_KEPT * 3
    assert logits_of.update_logits(logits_of.sparse(head), many, 1000) == logits_of.update_logits(
        logits_of.sparse(head), limit, 1000
    )


def test_a_sparse_head_with_gradients_holds_as_many_rows_as_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times as many rows as the limit have the limit's peak, plus their log-probabilities."""
    monkeypatch.setattr(sparse_head, "ROWS_KEPT", 128)
    peaks = []
    for tokens in (128, 384):
        hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(4096, 4, requires_grad=True)
        labels = torch.randint(4096, (tokens,))
        live = LiveBytes([hidden, weight, labels])
        with live:
            log_probs_with_gradient(hidden, weight, labels, 1.0).sum().backward()
        peaks.append(live.peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [100, 2000])
def test_a_sparse_head_without_gradients_holds_a_chunk(dtype: torch.dtype, tokens: int) -> None:
    hidden, weight = torch.randn(tokens, 4, dtype=dtype), torch.randn(1024, 4, dtype=dtype)
    labels = torch.randint(1024, (tokens,))
    live = LiveBytes([hidden, weight, labels])
    with live:
        log_probs_and_entropy(hidden, weight, labels, 0.7)
    head = logits_of.sparse(Head(logit_bytes=dtype.itemsize))
    assert logits_of.forward_logits(head, tokens, 1024) == pytest.approx(live.peak, rel=0.02)


# --- a whole gradient step under FSDP2 ---

SIZES_OF_STEP = {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "head_dim": 128}

#: name → (vocabulary, tokens, whether gradients are reduced at the end alone): what makes each peak
STEPS = {
    "weights": (256, 64, False),
    "activations": (256, 4096, False),
    "head": (100_000, 64, False),
    "unsharded gradients": (256, 64, True),
}


def peaks_under_fsdp2(cases: dict[str, tuple[int, int, bool]]) -> dict[str, int]:
    """Peak bytes of two micro-batches, forward and backward, besides the weights: real FSDP2, one of 8 fake ranks."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from verl.utils.fsdp_utils import apply_fsdp2

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    mesh = init_device_mesh("cpu", (8,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=True)
    peaks = {}
    for name, (vocab, tokens, deferred) in cases.items():
        config = qwen3(6, **SIZES_OF_STEP, num_key_value_heads=8, vocab_size=vocab)
        config._attn_implementation = "sdpa"
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            apply_fsdp2(model, {"mesh": mesh, "mp_policy": policy}, type("C", (dict,), {"forward_prefetch": False})())
            positions = torch.arange(tokens)[None]
            live = LiveBytes([*(p.to_local() for p in model.parameters()), *model.buffers()])
            with live:
                for last in (False, True):
                    model.set_requires_gradient_sync(last or not deferred)
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        out = model(input_ids=positions, position_ids=positions, use_cache=False).logits
                        loss = out.sum()
                    del out
                    loss.backward()
        peaks[name] = live.peak
    return peaks


@pytest.mark.process
def test_a_gradient_step_under_fsdp2() -> None:
    """Gathered layers, and gradients that are not reduced yet. In a process of its own: the group is a fake."""
    code = f"import json, test_memory; print(json.dumps(test_memory.peaks_under_fsdp2({STEPS!r})))"
    arguments = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(
        arguments,
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    measured = json.loads(run.stdout.splitlines()[-1])
    ratios = {}
    for name, (vocab, tokens, deferred) in STEPS.items():
        model = shape(6, **SIZES_OF_STEP, num_key_value_heads=8, vocab_size=vocab)
        phase = memory.update_phase(model, layout(keeps_unsharded_gradients=deferred), Head(), tokens)
        ratios[name] = (phase.total - phase.parts["weights"] - phase.parts["optimizer"]) / measured[name]
    deferred = ratios.pop("unsharded gradients")  # too high by the reduced gradients, which come one by one
    assert 1 <= deferred < 1.25
    assert all(0.97 < ratio < 1.05 for ratio in ratios.values()), ratios
