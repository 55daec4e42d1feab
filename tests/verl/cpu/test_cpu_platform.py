"""verl on a CPU: what is refused before Ray starts, and the parts of verl that are wrapped."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import verl
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from verl.checkpoint_engine import CheckpointEngineRegistry
from verl.plugin.platform import get_platform
from verl.trainer.ppo.v1 import replay_buffer
from verl.utils import distributed, flops_counter, fsdp_utils
from verl.utils import model as verl_model
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.rollout import base as rollout_base
from verl.workers.rollout.replica import RolloutReplicaRegistry

from entropy_fork.common.cores import available_cores
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.installing import install_command
from entropy_fork.sampling import vllm_cpu
from entropy_fork.verl.agent_loop import answer_seed
from entropy_fork.verl.cpu import cpu_platform
from entropy_fork.verl.cpu.checkpoint_engine import RayCheckpointEngine
from entropy_fork.verl.cpu.rollout import TransformersAdapter, TransformersReplica, in_buckets
from entropy_fork.verl.engine import ForkingTokens
from entropy_fork.verl.sparse_head import SparseHead

Compose = Callable[..., Any]


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("trainer.device=cuda", r"trainer.device=cuda. Add \+cluster=cpu"),
        ("actor_rollout_ref.actor.strategy=fsdp", r"actor.strategy=fsdp does not run on a CPU.*strategy=fsdp2"),
        ("actor_rollout_ref.rollout.name=sglang", r"rollout.name=sglang does not run on a CPU.*=transformers"),
        ("actor_rollout_ref.rollout.name=vllm", rf"vLLM is not installed.*{re.escape(install_command('cpu-vllm'))}"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused(
    compose: Compose, monkeypatch: pytest.MonkeyPatch, override: str, match: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else name)
    cpu_platform.check_before_training(compose("+recipe=demo_cpu"))
    with pytest.raises(EntropyForkError, match=match):
        cpu_platform.check_before_training(compose("+recipe=demo_cpu", override))


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("actor_rollout_ref.rollout.nnodes=0", r"rollout.nnodes=0 means none.*rollout.nnodes=1"),
        ("actor_rollout_ref.rollout.checkpoint_engine.backend=naive", r"backend=naive cannot send.*backend=ray"),
        ("actor_rollout_ref.rollout.checkpoint_engine.backend=nccl", r"backend=nccl cannot send.*backend=ray"),
    ],
)
def test_what_a_separate_rollout_needs_is_named(compose: Compose, override: str, match: str) -> None:
    separate = ["+recipe=demo_cpu", "trainer.v1.trainer_mode=separate_async", "actor_rollout_ref.rollout.nnodes=1"]
    cpu_platform.check_before_training(compose(*separate))
    with pytest.raises(EntropyForkError, match=match):
        cpu_platform.check_before_training(compose(*separate, override))


def test_a_missing_extra_is_named(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("zmq", "fastapi") else name)
    with pytest.raises(EntropyForkError, match=rf"needs the modules fastapi, zmq.*{re.escape(install_command('cpu'))}"):
        cpu_platform.check_before_training(compose("+recipe=demo_cpu"))


def test_verl_finds_our_parts_in_its_registries() -> None:
    assert isinstance(get_platform(), cpu_platform.PlatformCPU)
    assert rollout_base.get_rollout_class("transformers") is TransformersAdapter
    assert RolloutReplicaRegistry.get("transformers") is TransformersReplica
    engine = EngineRegistry.get_engine_cls("language_model", "fsdp2")
    assert engine.__mro__[1:4] == (ForkingTokens, SparseHead, transformer_impl.FSDPEngineWithLMHead)
    assert EngineRegistry.get_engine_cls("value_model", "fsdp2") is transformer_impl.FSDPEngineWithValueHead
    assert CheckpointEngineRegistry.get("ray") is RayCheckpointEngine


def test_the_cpu_is_never_detected() -> None:
    assert not cpu_platform.PlatformCPU().is_platform_available(use_smi_check=True)


def test_the_places_that_are_wrapped_are_still_there() -> None:
    """Fails if verl changes one of them: then read what verl does now, and remove or adapt the wrapper."""
    named_twice = 'f"cpu:gloo,{get_device_name()}'
    assert named_twice in inspect.getsource(distributed.initialize_global_process_group_ray)
    if verl.__version__ != "0.9.0":  # here it asks for gloo only
        assert named_twice in inspect.getsource(distributed.initialize_global_process_group)
    assert "CPUOffloadPolicy(pin_memory=True)" in inspect.getsource(transformer_impl.FSDPEngine)
    assert 'attn_implementation="flash_attention_2"' in inspect.getsource(verl_model.load_valuehead_model.__wrapped__)
    assert "local_gpu_tensor.detach().cpu()" in inspect.getsource(fsdp_utils.fsdp2_sharded_save_to_cpu.__wrapped__)
    assert isinstance(rollout_base._ROLLOUT_REGISTRY, dict)
    assert "device == torch.cpu" in inspect.getsource(flops_counter)
    signature = inspect.signature(replay_buffer.ReplayBuffer.__init__.__wrapped__)
    assert signature.parameters["poll_interval"].default == 2.0


def test_the_replay_buffer_polls_faster() -> None:
    buffer = replay_buffer.ReplayBuffer("sync", {}, 1, "drop", {})
    assert buffer.poll_interval == cpu_platform.POLL_SECONDS


def test_torch_cpu_answers_what_verl_asks() -> None:
    assert torch.cpu.max_memory_allocated() == 0  # type: ignore[attr-defined]
    assert torch.cpu.empty_cache() is None  # type: ignore[attr-defined]


def test_a_process_group_of_one(tmp_path: Any) -> None:
    """Its backend has no duplicate. The process uses all cores, because there is no other to share them with."""
    torch.distributed.init_process_group(
        backend="cpu:gloo,cpu:gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        assert "gloo" in torch.distributed.get_backend()
        assert torch.get_num_threads() == available_cores()
    finally:
        torch.distributed.destroy_process_group()


def test_the_old_policy_is_kept_while_the_new_one_is_trained(tmp_path: Any) -> None:
    torch.distributed.init_process_group(backend="gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = fully_shard(torch.nn.Linear(2, 3), mesh=init_device_mesh("cpu", (1,)))
        weight = model.weight.to_local()  # type: ignore[attr-defined]
        old = weight.clone()
        kept, spec = fsdp_utils.fsdp2_sharded_save_to_cpu(model)
        with torch.no_grad():
            weight.add_(1)
        fsdp_utils.fsdp2_sharded_load_from_cpu(model, kept, spec)
        assert torch.equal(weight, old)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1, 1, 1, 1]), (3, [2, 1, 1]), (4, [3, 1]), (100, [4])])
def test_weights_travel_in_buckets(limit: int, sizes: list[int]) -> None:
    weights = [(name, torch.zeros(size, dtype=torch.uint8)) for name, size in zip("abcd", (1, 2, 1, 5), strict=True)]

    async def collect() -> list[list[tuple[str, torch.Tensor]]]:
        return [bucket async for bucket in in_buckets(iter(weights), limit)]

    buckets = asyncio.run(collect())
    assert [len(bucket) for bucket in buckets] == sizes
    assert [name for bucket in buckets for name, _ in bucket] == ["a", "b", "c", "d"]


def test_vllms_linear_layers_keep_looking_at_their_parameter() -> None:
    module, layer = SimpleNamespace(), SimpleNamespace(weight=torch.zeros(2, 3))
    vllm_cpu._keep_weights(module)
    module.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    layer.weight.copy_(torch.ones(2, 3))  # the second weight sync
    assert layer.cpu_linear(torch.ones(1, 3), layer.weight, None).tolist() == [[3.0, 3.0]]


def test_the_version_of_vllm_is_its_cpu_builds() -> None:
    versions = {"vllm-cpu": "0.29.0", "torch": "2.13.0"}
    version = vllm_cpu._answer_for_vllm(versions.__getitem__)
    assert (version("vllm"), version("torch")) == ("0.29.0+cpu", "2.13.0")


def test_the_seed_of_an_answer_is_its_identity() -> None:
    prompt = [{"role": "user", "content": "1+1"}]
    seeds = {
        answer_seed(run, step, text, index, session)
        for run in (1, 2)
        for step in (1, 2)
        for text in (prompt, [{"role": "user", "content": "1+2"}])
        for index in (0, 1)
        for session in (0, 1)
    }
    assert len(seeds) == 32
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert answer_seed(1, 2, tuple(prompt), 3, 4) == answer_seed(1, 2, prompt, 3, 4)
