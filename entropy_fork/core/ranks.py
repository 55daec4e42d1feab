"""Make the same selection on any number of ranks: exchange what the ranks of a mini-batch must know.

If each rank had its own threshold, the selection would depend on the number of ranks. So every rank gathers the
responses of all ranks, selects from the same tokens and takes its own part. A collective on tensors whose length
differs by rank hangs or reads garbage, so :meth:`Ranks.gather` pads them. A rank without an eligible token takes part
like any other.
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
        group: their process group; None if there is one process.
        device: where the group's collectives need their tensors (``cpu`` for gloo, the accelerator for nccl).
    """

    group: dist.ProcessGroup | None = None
    device: torch.device | str = "cpu"

    @property
    def size(self) -> int:
        """The number of ranks; 1 if there is one process."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """The number of this rank, from 0."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def gather(self, values: Tensor) -> list[Tensor]:
        """The tensors of all ranks, in the order of the ranks, on the CPU. All ranks must call this.

        Args:
            values: any type, shape (n, …); n may differ between ranks and may be 0. The other sizes must be equal.
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
        """The sum of the counts of all ranks. All ranks must call this."""
        parts = self.gather(torch.tensor([astuple(counts)], dtype=torch.float64))
        num_tokens, num_kept, entropy_kept = torch.cat(parts).sum(0).tolist()
        return Counts(int(num_tokens), int(num_kept), entropy_kept)

    def merge_tallies(self, tally: Tally) -> Tally:
        """The tallies of all ranks as one. All ranks must call this."""
        parts = self.gather(torch.tensor([astuple(tally)], dtype=torch.float64))
        return Tally.merged(Tally(*part[0].tolist()) for part in parts)


def select_over_ranks(responses: Responses, selector: Selector, ranks: Ranks) -> tuple[Tensor, Pool]:
    """Keep a share of one pool, which is the tokens of all ranks together.

    Args:
        responses: the responses of this rank.
        selector: what to keep; the same on all ranks.
        ranks: the ranks that take part. All must call this.

    Returns:
        bool, shape (num_tokens,): which of this rank's tokens are kept; and the counts and τ of the whole pool.

    Raises:
        ValueError: on every rank, if the entropy of an eligible token of any rank is not finite.
    """
    tokens = [ranks.gather(values) for values in (responses.entropy, responses.eligible.to(torch.uint8))]
    per_response = [ranks.gather(values) for values in (responses.lengths, responses.order, responses.seeds)]
    everything = Responses(*(torch.cat(parts) for parts in tokens + per_response))
    one_pool = torch.zeros(everything.lengths.numel(), dtype=torch.int64)
    kept, pools = select_in_pools(everything, one_pool, selector)
    return kept.split([part.numel() for part in tokens[0]])[ranks.rank], pools[0]
