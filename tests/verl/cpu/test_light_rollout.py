"""The light rollout off the CPU: who may have it, what its server sees, and what it computes with."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.verl.cpu import cpu_platform, rollout
from entropy_fork.verl.cpu.rollout import LightRollout, TransformersReplica, TransformersServer

Compose = Callable[..., Any]
LIGHT = ("+recipe=dapo", "+cluster=gpu_light")
DEVICE = "actor_rollout_ref.rollout.engine_kwargs.transformers.device"


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("actor_rollout_ref.rollout.name=transformers",), r"VERL_PLATFORM=cpu python -m .*\+cluster=gpu_light"),
        ((*LIGHT, "trainer.device=cpu"), r"device=cuda with trainer.device=cpu.*Write cuda for both"),
        ((*LIGHT, f"{DEVICE}=npu"), r"device=npu with trainer.device=cuda.*Write cuda for both"),
        ((*LIGHT, f"~{DEVICE}"), r"without vLLM and sglang, write \+cluster=gpu_light"),
        ((*LIGHT, "trainer.v1.trainer_mode=separate_async"), r"beside its trainer only.*trainer_mode=sync"),
    ],
)
def test_the_light_rollout_on_a_gpu_must_be_asked_for(compose: Compose, overrides: tuple[str, ...], match: str) -> None:
    cpu_platform.check_light_rollout(compose(*LIGHT))
    with pytest.raises(EntropyForkError, match=match):
        cpu_platform.check_light_rollout(compose(*overrides))


def test_other_rollouts_are_not_looked_at(compose: Compose) -> None:
    cpu_platform.check_light_rollout(compose("+recipe=dapo", "+cluster=node_8", "trainer.device=cpu"))


def test_it_needs_the_modules_that_come_with_vllm(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else name)
    with pytest.raises(EntropyForkError, match=r"light rollout needs the modules fastapi.*\[cpu\]"):
        cpu_platform.check_light_rollout(compose(*LIGHT))


def test_a_demo_of_the_cpu_takes_the_gpus_cluster_in_place_of_its_own(compose: Compose) -> None:
    config = compose("+recipe=demo_cpu", "cluster=gpu_light")
    cpu_platform.check_light_rollout(config)
    assert config.trainer.device == "cuda"
    assert config.actor_rollout_ref.actor.fsdp_config.model_dtype == "fp32"
    assert "mixed_precision" not in config.actor_rollout_ref.actor.fsdp_config, "verl computes in bf16"
    assert "cpu_platform" not in config


def test_the_run_says_what_it_is_for(compose: Compose, capsys: pytest.CaptureFixture[str]) -> None:
    cpu_platform.say_light_rollout(compose(*LIGHT, "actor_rollout_ref.rollout.name=vllm"))
    assert capsys.readouterr().out == ""
    cpu_platform.say_light_rollout(compose(*LIGHT))
    assert "many times slower than vLLM" in capsys.readouterr().out


def test_where_it_computes() -> None:
    asked: Callable[..., Any] = lambda **kwargs: SimpleNamespace(engine_kwargs=kwargs, dtype="bfloat16")  # noqa: E731
    assert LightRollout.of(asked()) == LightRollout("cpu", torch.float32)
    assert LightRollout.of(asked(transformers={"device": "cuda"})) == LightRollout("cuda", torch.bfloat16)
    for wrong in ({"device": "npu"}, {"devise": "cuda"}):
        with pytest.raises(EntropyForkError, match="its only key is device"):
            LightRollout.of(asked(transformers=wrong))


def test_verl_finds_it_without_the_platform_of_a_cpu(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    script = """
import verl.workers.rollout.replica
from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
from verl.workers.rollout.base import get_rollout_class
from verl.workers.rollout.replica import RolloutReplicaRegistry
print("FOUND", get_rollout_class("transformers").__name__, RolloutReplicaRegistry.get("transformers").__name__,
      "seeded_single_turn" in _agent_loop_registry)
"""
    child = python("-c", script, VERL_PLATFORM="")
    assert "FOUND TransformersAdapter TransformersReplica True" in child.stdout, child.stderr[-3000:]


class Worker:
    """A training worker as Ray hands it out. Ray runs the function in the worker; here it runs where it is called."""

    def __init__(self) -> None:
        self.__ray_call__ = SimpleNamespace(remote=self._call)

    async def _call(self, function: Callable[[Any], Any]) -> Any:
        return function(self)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_its_server_sees_the_gpu_of_its_worker_and_takes_none_of_rays(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Ray hides every GPU from an actor that asked for none, unless it is told not to."""
    options: dict[str, Any] = {}

    class Remote:
        def options(self, **given: Any) -> Remote:
            options.update(given)
            return self

        def remote(self, *_: Any, **__: Any) -> Any:
            async def ready() -> bool:
                return True

            return SimpleNamespace(ready=SimpleNamespace(remote=ready))

    context = SimpleNamespace(get_node_id=lambda: "0" * 56, get_accelerator_ids=lambda: {"GPU": ["5"]})
    monkeypatch.setattr(rollout.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(rollout.ray, "remote", lambda _: Remote())
    replica = TransformersReplica.__new__(TransformersReplica)
    replica.world_size, replica.replica_rank, replica.gpus_per_node = 1, 0, 1
    replica.model_config, replica.workers = None, [Worker()]
    kwargs = {"transformers": {"device": "cuda"}} if device == "cuda" else {}
    replica.config = SimpleNamespace(engine_kwargs=kwargs, dtype="bfloat16", max_num_seqs=4)
    monkeypatch.setattr(TransformersReplica, "max_concurrency", 1, raising=False)
    asyncio.run(replica.launch_servers())
    variables = options.get("runtime_env", {}).get("env_vars", {})
    if device == "cpu":
        assert variables == {}
    else:
        assert variables == {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "5"}
    assert "num_gpus" not in options


def test_a_server_in_16_bits_answers_with_the_trainers_weights_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's server computes, on a CPU: fp32 weights arrive, and the same answer comes as from rounded ones."""
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, eos_token_id=0, initializer_range=0.4,
    )  # fmt: skip
    torch.manual_seed(0)
    trained = Qwen3ForCausalLM(config)
    freed: list[str] = []
    monkeypatch.setattr(LightRollout, "of", classmethod(lambda cls, _: cls("cpu", torch.bfloat16)))
    monkeypatch.setattr(LightRollout, "free", lambda self: freed.append(self.device))
    monkeypatch.setattr(rollout, "omega_conf_to_dataclass", lambda _: SimpleNamespace(hf_config=config))
    settings = SimpleNamespace(prompt_length=4, response_length=8, max_num_seqs=4)

    async def answer() -> Any:
        server = TransformersServer(settings, None, 1)
        weights = [(name, parameter.detach()) for name, parameter in trained.named_parameters()]
        await server.load_weights(weights, True, True)
        await server.set_global_steps(0)
        assert server.model.dtype == torch.bfloat16
        for name, parameter in server.model.named_parameters():
            torch.testing.assert_close(parameter, dict(weights)[name].bfloat16(), rtol=0, atol=0)
        return await server.generate([3, 4, 5], {"temperature": 0.0, "logprobs": True}, "request")

    output = asyncio.run(answer())
    assert freed == ["cpu"], "the caches of finished answers stay on the device"
    rounded = trained.bfloat16().eval()
    tokens = [3, 4, 5]
    for token in output.token_ids:
        with torch.no_grad():
            assert int(rounded(torch.tensor([tokens])).logits[0, -1].float().argmax()) == token
        tokens.append(token)
