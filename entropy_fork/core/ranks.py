"""Make the same selection on any number of ranks: exchange what the ranks of a mini-batch must know.

If each rank had its own threshold, the selection would depend on the number of ranks. So every rank gathers the
responses of all ranks, selects from the same tokens and takes its own part. A collective on tensors whose length
differs by rank hangs or reads garbage, so :meth:`Ranks.gather` pads them. A rank without an eligible token takes part
like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from entropy_fork.core.responses import Choice, Responses, choose
from entropy_fork.core.rule import Rule
from entropy_fork.core.scoring import Tokens
from entropy_fork.core.tally import Tally
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

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """A context for code that may fail on one rank alone: then all ranks raise, and none waits for another.

        All ranks must enter it, and the code in it must call no collective.

        Raises:
            ValueError: this rank's own, or one that names a rank that failed.
        """
        error = None
        try:
            yield
        except ValueError as raised:
            error = raised
        failed = torch.cat(self.gather(torch.tensor([error is not None], dtype=torch.uint8))).nonzero().flatten()
        if error is not None:
            raise error
        if failed.numel() > 0:
            raise ValueError(f"rank {int(failed[0])} of {self.size} has failed in this mini-batch; see its own message")

    def sum_counts(self, counts: Counts) -> Counts:
        """The sum of the counts of all ranks. All ranks must call this."""
        parts = self.gather(torch.tensor([astuple(counts)], dtype=torch.float64))
        num_tokens, num_kept, score_kept = torch.cat(parts).sum(0).tolist()
        return Counts(int(num_tokens), int(num_kept), score_kept)

    def merge_tallies(self, tally: Tally) -> Tally:
        """The tallies of all ranks as one. All ranks must call this."""
        parts = self.gather(torch.tensor([astuple(tally)], dtype=torch.float64))
        return Tally.merged(Tally(*part[0].tolist()) for part in parts)


def choose_over_ranks(responses: Responses, rule: Rule, ranks: Ranks) -> Choice:
    """Apply a rule to one pool, which is the tokens of all ranks together.

    Args:
        responses: the responses of this rank.
        rule: of one step; the same on all ranks.
        ranks: the ranks that take part. All must call this.

    Returns:
        The choice of this rank's tokens, with the counts and τ of the whole pool.

    Raises:
        ValueError: on every rank, if the score of an eligible token of any rank is not finite.
    """
    per_token = (responses.entropy, responses.eligible.to(torch.uint8), responses.score, responses.candidates)
    entropy, eligible, score, candidates = (
        None if values is None else [*ranks.gather(values.to(torch.uint8) if values.dtype == torch.bool else values)]
        for values in per_token
    )
    assert entropy is not None
    assert eligible is not None
    lengths, order, seeds = (
        torch.cat(ranks.gather(values)) for values in (responses.lengths, responses.order, responses.seeds)
    )
    everything = Responses(
        torch.cat(entropy),
        torch.cat(eligible),
        lengths,
        order,
        seeds,
        None if score is None else torch.cat(score),
        None if candidates is None else torch.cat(candidates).bool(),
    )
    choice = choose(everything, torch.zeros(lengths.numel(), dtype=torch.int64), rule)
    sizes = [part.numel() for part in entropy]

    def mine(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.split(sizes)[ranks.rank]

    return Choice(choice.kept.split(sizes)[ranks.rank], choice.pools, mine(choice.factors), mine(choice.score))


def gather_tokens(tokens: Tokens, ranks: Ranks) -> tuple[Tokens, slice]:
    """The tokens of all ranks as one mini-batch, and where this rank's are. All ranks must call this."""
    parts = {name: ranks.gather(values) for name, values in tokens.fields.items()}
    eligible = ranks.gather(tokens.eligible.to(torch.uint8))
    lengths, seeds = (torch.cat(ranks.gather(values)) for values in (tokens.lengths, tokens.seeds))
    everything = Tokens(
        {name: torch.cat(part) for name, part in parts.items()},
        torch.cat(eligible).bool(),
        lengths,
        seeds,
        torch.zeros_like(lengths),
    )
    start = sum(part.numel() for part in eligible[: ranks.rank])
    return everything, slice(start, start + eligible[ranks.rank].numel())
