"""Send the weights from the trainer to rollout servers in other processes, without an accelerator.

Hook: verl's ``CheckpointEngineRegistry``, under the name ``ray``, for ``trainer.v1.trainer_mode=separate_async``.
verl's own engines move buckets of weights between GPUs (cupy, NCCL, RDMA). This one puts a bucket into Ray's object
store, and its reference into a short queue to each rollout worker. The queue is short so that only a few buckets exist
at once.
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
    """One end of the transfer: rank 0 of the trainer sends, and each rollout worker receives from its own queue.

    Args:
        bucket_size: in bytes.
        is_master: in a trainer, whether it is rank 0. None in a rollout worker, to which verl does not pass it.
    """

    def __init__(self, bucket_size: int, is_master: bool | None = None):
        self.bucket_size = bucket_size
        self.inbox = Queue(BUCKETS_AHEAD, actor_options={"num_cpus": 0}) if is_master is None else None
        self.outboxes: list[Queue] = []

    def prepare(self) -> Queue | None:
        """The queue from which this process receives weights; None in a trainer. verl tells it to all processes."""
        return self.inbox

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Queue | None]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Give all queues to rank 0 of the trainer. The trainer's other ranks and the receivers send to no queue."""
        inboxes = metadata[actor_wg_world_size:]
        nobody: list[Queue] = []
        return (
            {"outboxes": [inboxes] + [nobody] * (actor_wg_world_size - 1)},
            {"outboxes": [nobody] * rollout_world_size},
        )

    def init_process_group(self, outboxes: list[Queue]) -> None:
        """verl calls this before a sync, with the queues that :meth:`build_topology` gives this process."""
        self.outboxes = outboxes

    def finalize(self) -> None:
        """verl calls this after a sync."""
        self.outboxes = []

    async def send_weights(
        self, weights: Generator[tuple[str, torch.Tensor], None, None], global_steps: int | None = None
    ) -> None:
        """Send all weights, of any shape.

        A rank that sends to no queue still draws all weights from the generator, because gathering a sharded weight is
        a collective.
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
            await outbox.put_async([reference])  # in a list: else Ray would send the bucket itself through the queue

    async def receive_weights(self, global_steps: int | None = None) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """Yield the weights as they arrive, with their shapes, until the empty bucket that marks the end."""
        assert self.inbox is not None
        while bucket := await (await self.inbox.get_async())[0]:
            for name, tensor in bucket:
                yield name, tensor


CheckpointEngineRegistry.register(CHECKPOINT_BACKEND)(RayCheckpointEngine)
