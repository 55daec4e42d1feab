"""The way of the weights from the trainer to rollout servers that do not share its processes, without an accelerator.

Hook: verl's ``CheckpointEngineRegistry``, under the name ``ray``, for ``trainer.v1.trainer_mode=separate_async``. The
engines that verl ships move buckets between GPUs (cupy, NCCL, RDMA). Here a bucket goes through Ray's object store, and
its reference through a short queue to each rollout worker, so that no more than a few buckets are in flight.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any

import ray
import torch
from ray.util.queue import Queue
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from entropy_fork.verl.cpu.cpu_platform import CHECKPOINT_BACKEND
from entropy_fork.verl.cpu.rollout import in_buckets

#: how many buckets a trainer may be ahead of the slowest rollout worker
BUCKETS_AHEAD = 2


class RayCheckpointEngine(CheckpointEngine):
    """One end of the way: rank 0 of the trainer sends, each rollout worker receives from a queue of its own.

    Args:
        bucket_size: in bytes.
        is_master: whether this is rank 0 of the trainer; verl tells trainers only, so None is a rollout worker.
    """

    def __init__(self, bucket_size: int, is_master: bool | None = None):
        self.bucket_size = bucket_size
        self.inbox = Queue(BUCKETS_AHEAD, actor_options={"num_cpus": 0}) if is_master is None else None
        self.outboxes: list[Queue] = []

    def prepare(self) -> Queue | None:
        """Where this process receives weights: sent to all others by verl."""
        return self.inbox

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Queue | None]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """All queues to rank 0 of the trainer; its other ranks, and the receivers, send to nobody."""
        inboxes = metadata[actor_wg_world_size:]
        nobody: list[Queue] = []
        return (
            {"outboxes": [inboxes] + [nobody] * (actor_wg_world_size - 1)},
            {"outboxes": [nobody] * rollout_world_size},
        )

    def init_process_group(self, outboxes: list[Queue]) -> None:
        """Called before a sync, with what :meth:`build_topology` says for this process."""
        self.outboxes = outboxes

    def finalize(self) -> None:
        """Called after a sync."""
        self.outboxes = []

    async def send_weights(
        self, weights: Generator[tuple[str, torch.Tensor], None, None], global_steps: int | None = None
    ) -> None:
        """Send all weights, of any shape.

        Whoever sends to nobody still asks for them: gathering a sharded one is a collective.
        """
        if not self.outboxes:
            for _ in weights:
                continue
            return
        async for bucket in in_buckets(weights, self.bucket_size):
            await self._send(bucket)
        await self._send([])

    async def _send(self, bucket: list[tuple[str, torch.Tensor]]) -> None:
        reference = ray.put(bucket)
        for outbox in self.outboxes:
            await outbox.put_async([reference])  # in a list, or the queue would be sent the bucket itself

    async def receive_weights(self, global_steps: int | None = None) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """Yield the weights as they come, of the shapes they were sent in, until the empty bucket that ends them."""
        assert self.inbox is not None
        while bucket := await (await self.inbox.get_async())[0]:
            for name, tensor in bucket:
                yield name, tensor


CheckpointEngineRegistry.register(CHECKPOINT_BACKEND)(RayCheckpointEngine)
