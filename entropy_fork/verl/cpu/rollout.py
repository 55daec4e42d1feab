"""A rollout for machines without an accelerator, or without vLLM: transformers behind verl's server interface.

Hooks: ``RolloutReplicaRegistry`` (servers) and verl's table of rollout adapters (training workers), both under the
name ``transformers``; see ``cpu_platform.py``. verl sends requests one by one to a server actor. The server collects
them and answers them as one batch (``entropy_fork/sampling/generation.py``).

It computes on the CPU, or on the GPU of the training worker if the config says so: see :class:`LightRollout`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.plugin.platform import get_platform
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput
from verl.workers.rollout.utils import ensure_async_iterator

from entropy_fork.common.cores import share_cores
from entropy_fork.common.errors import EntropyForkError, process_name
from entropy_fork.sampling.generation import Answer, Request, generate

#: a batch starts when no request has arrived for this long (verl dispatches a batch's requests within milliseconds)
SETTLE_SECONDS = 0.03


@dataclass(frozen=True)
class LightRollout:
    """Where and how exactly a server computes.

    Attributes:
        device: ``cpu`` or ``cuda``.
        dtype: of its weights. Always float32 on a CPU; on a GPU verl's ``rollout.dtype``.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, config: Any) -> LightRollout:
        """Read it from verl's rollout config: ``engine_kwargs.transformers.device``, which is the CPU if not set.

        Raises:
            EntropyForkError: ``engine_kwargs.transformers`` has another key, or names another device.
        """
        asked: Mapping[str, Any] = (config.engine_kwargs or {}).get("transformers") or {}
        device = asked.get("device", "cpu")
        if set(asked) - {"device"} or device not in ("cpu", "cuda"):
            raise EntropyForkError(
                f"actor_rollout_ref.rollout.engine_kwargs.transformers={dict(asked)}: its only key is device, and that "
                f"is cpu or cuda."
            )
        return cls(device, PrecisionType.to_dtype(config.dtype) if device == "cuda" else torch.float32)

    def free(self) -> None:
        """Give the memory of finished answers back to the device, where the trainer needs it next."""
        if self.device == "cuda":
            torch.cuda.empty_cache()


def _server_name(replica_rank: int) -> str:
    return f"transformers_server_{replica_rank}"


async def in_buckets(
    weights: Generator[tuple[str, torch.Tensor], None, None] | AsyncGenerator[tuple[str, torch.Tensor], None],
    limit: int,
) -> AsyncGenerator[list[tuple[str, torch.Tensor]], None]:
    """Group weights of any shape into buckets, each of at least one tensor and else at most ``limit`` bytes."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    async for name, tensor in ensure_async_iterator(weights):
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor.detach().cpu()))
        size += tensor.nbytes
    if bucket:
        yield bucket


class TransformersServer:
    """The actor that holds one copy of the model and answers requests in batches."""

    def __init__(self, config: Any, model_config: Any, num_replicas_here: int):
        from transformers import AutoModelForCausalLM

        from entropy_fork.sampling.grouped_attention import share_keys

        self.config = config
        hf_config = omega_conf_to_dataclass(model_config).hf_config
        share_cores(num_replicas_here)
        self.light = LightRollout.of(config)
        # Only the architecture: the weights arrive with the first sync, before the first request.
        with torch.device(self.light.device):
            model = AutoModelForCausalLM.from_config(hf_config, dtype=self.light.dtype, attn_implementation="sdpa")
        self.model = share_keys(model)
        self.model.eval().requires_grad_(False)
        end_ids = self.model.generation_config.eos_token_id
        end_ids = hf_config.eos_token_id if end_ids is None else end_ids
        self.end_ids = list(end_ids) if isinstance(end_ids, (list, tuple)) else [end_ids]
        self.global_steps: int | None = None
        self._not_yet_loaded: set[str] = set()
        self._waiting: list[tuple[Request, asyncio.Future[Answer]]] = []
        self._arrived = asyncio.Event()
        self._open = asyncio.Event()
        self._open.set()
        self._aborting = False
        self._rejecting = False
        self._computing = asyncio.Lock()
        self._serving: asyncio.Task[None] | None = None

    async def ready(self) -> bool:
        """True. An actor answers this once its model is built."""
        return True

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **media: Any
    ) -> TokenOutput:
        """Answer one prompt, tokens in and tokens out, in the form of verl's LLMServerClient.

        Raises:
            EntropyForkError: the request has images or audio, or no weights have arrived yet.
        """
        if any(value is not None for value in media.values()):
            raise EntropyForkError("rollout.name=transformers answers text only; use rollout.name=vllm for media")
        if self.global_steps is None:
            raise EntropyForkError(f"a request arrived before the first weights, in {process_name()}")
        if self._rejecting:  # the client asks another server
            return self._output(Answer(), sampling_params)
        room = self.config.prompt_length + self.config.response_length - len(prompt_ids)
        limit = sampling_params.get("max_tokens", sampling_params.get("max_new_tokens", self.config.response_length))
        request = Request(
            prompt_ids=prompt_ids,
            # Another agent loop than ours sends no seed. Its answers still get different random numbers.
            seed=sampling_params.get("seed", int.from_bytes(request_id.encode()[-7:], "big")),
            max_tokens=max(1, min(limit, room)),
            temperature=sampling_params.get("temperature", 1.0),
            top_p=sampling_params.get("top_p", 1.0),
            top_k=sampling_params.get("top_k", -1),
        )
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self._arrived.set()
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve())
        return self._output(await future, sampling_params)

    def _output(self, answer: Answer, sampling_params: dict[str, Any]) -> TokenOutput:
        return TokenOutput(
            token_ids=answer.token_ids,
            log_probs=answer.log_probs if sampling_params.get("logprobs") else None,
            stop_reason=answer.stop_reason,
            num_preempted=0,
            extra_fields={"global_steps": self.global_steps},
        )

    async def _serve(self) -> None:
        while True:
            await self._arrived.wait()
            await self._open.wait()
            await self._until_settled()
            batch = self._waiting[: self.config.max_num_seqs]
            self._waiting = self._waiting[len(batch) :]
            if not self._waiting:
                self._arrived.clear()
            if not batch:
                continue
            try:
                # Sort, so that the order of arrival does not matter, not even for the row of an answer in the batch.
                batch.sort(key=lambda item: (item[0].seed, tuple(item[0].prompt_ids)))
                async with self._computing:
                    answers = await asyncio.to_thread(
                        generate,
                        self.model,
                        [request for request, _ in batch],
                        self.end_ids,
                        self.config.prompt_length,
                        lambda: self._aborting,
                    )
                    self.light.free()
                for (_, future), answer in zip(batch, answers, strict=True):
                    if not future.done():  # the client may have stopped waiting
                        future.set_result(answer)
            except Exception as error:  # each waiting request gets the error, and the server goes on
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)

    async def _until_settled(self) -> None:
        seen = -1
        while seen < len(self._waiting) < self.config.max_num_seqs:
            seen = len(self._waiting)
            await asyncio.sleep(SETTLE_SECONDS)

    async def load_weights(self, named_tensors: list[tuple[str, torch.Tensor]], is_first: bool, is_last: bool) -> None:
        """Load one bucket of a weight sync.

        Raises:
            EntropyForkError: a name or a shape does not fit the model, or the sync has left out a parameter.
        """
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        if is_first:
            self._not_yet_loaded = {name for name, _ in self.model.named_parameters()}
        for name, tensor in named_tensors:
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise EntropyForkError(f"weight sync: {name} {tuple(tensor.shape)} does not fit the rollout's model")
            parameters[name].data.copy_(tensor)
            self._not_yet_loaded.discard(name)
        if is_last and self._not_yet_loaded:
            raise EntropyForkError(f"weight sync left out {sorted(self._not_yet_loaded)} in {process_name()}")

    async def set_global_steps(self, global_steps: int) -> None:
        """Set the training step of the weights, for the metadata of answers."""
        self.global_steps = global_steps

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        """End all answers as they are. Then hold new requests until :meth:`resume_generation`, or reject them.

        Returns when the server has stopped computing tokens, because verl often sends new weights next.
        """
        self._open.clear()
        self._aborting, self._rejecting = True, reject_request
        aborted, self._waiting = self._waiting, []
        for _, future in aborted:
            future.set_result(Answer())
        async with self._computing:
            pass
        return {"aborted_count": len(aborted)}

    async def resume_generation(self) -> None:
        """Take requests again."""
        self._aborting = self._rejecting = False
        self._open.set()

    # The weights stay where they are, no cache outlives a batch, and there is no profiler.
    async def wake_up(self, **_: Any) -> None:
        """Nothing to do."""

    async def sleep(self, **_: Any) -> None:
        """Nothing to do."""

    async def clear_kv_cache(self) -> None:
        """Nothing to do."""

    async def release_kv_cache(self) -> None:
        """Nothing to do."""

    async def resume_kv_cache(self) -> None:
        """Nothing to do."""

    async def start_profile(self, **_: Any) -> None:
        """Nothing to do."""

    async def stop_profile(self) -> None:
        """Nothing to do."""


class TransformersReplica(RolloutReplica):
    """One server, beside a training worker or (``separate_async``) beside a worker that only receives weights."""

    async def launch_servers(self) -> None:
        """Start the server beside its worker, as verl's replicas do.

        Raises:
            EntropyForkError: the config wants several processes per replica.
        """
        if self.world_size != 1:
            raise EntropyForkError(
                "rollout.name=transformers has one process per replica: write "
                "actor_rollout_ref.rollout.tensor_model_parallel_size=1, data_parallel_size=1."
            )
        node_id = ray.get_runtime_context().get_node_id()
        if self.workers:
            node_id = await self.workers[0].__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
        variables = {}
        if LightRollout.of(self.config).device == "cuda":
            devices = await self.workers[0].__ray_call__.remote(lambda _: _accelerators_here())
            variables = _sees_devices(devices)
        server = (
            ray.remote(TransformersServer)
            .options(
                name=_server_name(self.replica_rank),
                num_cpus=0,
                max_concurrency=self.max_concurrency,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
                **({"runtime_env": {"env_vars": variables}} if variables else {}),
            )
            .remote(self.config, self.model_config, num_replicas_here=max(1, self.gpus_per_node))
        )
        await server.ready.remote()
        self.servers = [server]
        self._server_handle = server
        self._server_address = _server_name(self.replica_rank)


def _accelerators_here() -> list[str]:
    """The accelerators that Ray gave to the worker that calls this."""
    ids = ray.get_runtime_context().get_accelerator_ids()[get_platform().ray_resource_name()]
    return [str(number) for number in ids]


def _sees_devices(devices: list[str]) -> dict[str, str]:
    """The environment of a server that takes no accelerator from Ray, and still sees the one of its training worker."""
    platform = get_platform()
    return {**dict.fromkeys(platform.ray_noset_envvars(), "1"), platform.visible_devices_envvar(): ",".join(devices)}


class TransformersAdapter(BaseRollout):
    """The rollout's part in each of these workers: it sends the weights to the server."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1):
        super().__init__(config, model_config, device_mesh)
        self.replica_rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank
        self._server: Any = None

    async def resume(self, tags: list[str]) -> None:
        """Nothing to do."""

    async def release(self) -> None:
        """Nothing to do."""

    async def update_weights(
        self,
        weights: Generator[tuple[str, torch.Tensor], None, None],
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        peft_config: Any = None,
        **_: Any,
    ) -> None:
        """Send all weights, of any shape, to this rank's server, in buckets.

        Every rank draws all weights from the generator, because gathering a sharded parameter is a collective.

        Raises:
            EntropyForkError: the weights are not whole, such as LoRA's.
        """
        if wire_format != "named_tensors" or peft_config is not None:
            raise EntropyForkError(
                "rollout.name=transformers takes whole weights: with LoRA write actor_rollout_ref.model.lora.merge=True"
            )
        if self._server is None:
            self._server = ray.get_actor(_server_name(self.replica_rank))
        is_first = True
        async for bucket in in_buckets(weights, self.config.checkpoint_engine.update_weights_bucket_megabytes << 20):
            await self._server.load_weights.remote(bucket, is_first, False)
            is_first = False
        await self._server.load_weights.remote([], is_first, True)
        await self._server.set_global_steps.remote(0 if global_steps is None else global_steps)
