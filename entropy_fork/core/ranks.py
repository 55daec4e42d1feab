"""The same selection on any number of ranks: what one mini-batch's ranks must tell each other.

If each rank took a threshold of its own, the selection would depend on how many ranks there are. And a collective on
tensors whose length differs by rank hangs or reads garbage. So every rank gathers the responses of all ranks, selects
from the same tokens and takes its own part. A rank without a single eligible token takes part like any other.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from entropy_fork.core.responses import Responses, select_in_pools
from entropy_fork.core.rule import Selector
from entropy_fork.core.tally import Pool, Tally
from entropy_fork.core.weighting import Counts


@dataclass(frozen=True)
class Ranks:
    """The data-parallel ranks that share a mini-batch.

    Attributes:
        group: their process group; None for a process alone.
        device: where its collectives want tensors (``cpu`` for gloo, the accelerator for nccl).
    """

    group: dist.ProcessGroup | None = None
    device: torch.device | str = "cpu"

    @property
    def size(self) -> int:
        """How many ranks there are; 1 for a process alone."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """The number of this one, from 0 on."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def gather(self, values: Tensor) -> list[Tensor]:
        """The tensors of all ranks, in their order, on the CPU. All ranks must call.

        Args:
            values: any type, shape (n, …); n may differ between ranks, and be 0, the rest may not.
        """
        if self.size == 1:
            return [values.cpu()]
        values = values.to(self.device).contiguous()
        mine = torch.tensor([values.shape[0]], device=self.device)
        sizes = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(sizes, mine, group=self.group)
        longest = max(int(size) for size in sizes)
        padded = values.new_zeros((longest, *values.shape[1:]))
        padded[: values.shape[0]] = values
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return [part[: int(size)].cpu() for part, size in zip(parts, sizes, strict=True)]

    def sum_counts(self, counts: Counts) -> Counts:
        """The counts of all ranks together. All ranks must call."""
        parts = self.gather(torch.tensor([astuple(counts)], dtype=torch.float64))
        num_tokens, num_kept, entropy_kept = torch.cat(parts).sum(0).tolist()
        return Counts(int(num_tokens), int(num_kept), entropy_kept)

    def merge_tallies(self, tally: Tally) -> Tally:
        """The tallies of all ranks as one. All ranks must call."""
        parts = self.gather(torch.tensor([astuple(tally)], dtype=torch.float64))
        return Tally.merged(Tally(*part[0].tolist()) for part in parts)


def select_over_ranks(responses: Responses, selector: Selector, ranks: Ranks) -> tuple[Tensor, Pool]:
    """Keep a share of the tokens that all ranks have together.

    Args:
        responses: this rank's.
        selector: what to keep; the same on all ranks.
        ranks: who takes part. All must call.

    Returns:
        bool, shape (num_tokens,): what is kept of this rank's tokens; and the counts and threshold of the whole pool.

    Raises:
        ValueError: on every rank, if an eligible entropy of any of them is not finite.
    """
    tokens = [ranks.gather(values) for values in (responses.entropy, responses.eligible.to(torch.uint8))]
    per_response = [ranks.gather(values) for values in (responses.lengths, responses.order, responses.seeds)]
    everything = Responses(*(torch.cat(parts) for parts in tokens + per_response))
    one_pool = torch.zeros(everything.lengths.numel(), dtype=torch.int64)
    kept, pools = select_in_pools(everything, one_pool, selector)
    return kept.split([part.numel() for part in tokens[0]])[ranks.rank], pools[0]
