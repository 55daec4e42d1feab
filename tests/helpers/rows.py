"""Random rows of a batch, whole or dealt out to ranks. It imports nothing of verl, so that ranks start fast."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from entropy_fork.core.ranks import Ranks, choose_over_ranks
from entropy_fork.core.responses import Responses
from entropy_fork.core.rule import SELECTS, Rule, Selector
from entropy_fork.core.tally import Pool
from entropy_fork.core.weighting import Counts, token_weights

TOP20 = Selector(0.2)
#: every way to select, and some ratios
SELECTORS = st.sampled_from(
    [
        *(Selector(0.4, select, band_from=0.1 if select == "band" else 0.0) for select in SELECTS),
        Selector(1.0),
        Selector(0.03),
        Selector(0.2, ties="threshold"),
    ]
)


def make_rows(seed: int, num_rows: int, eligible: float = 0.8) -> Responses:
    """Random rows with few distinct entropies, so that ties are common, and with very different lengths."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 25, (num_rows,), generator=random)
    total = int(lengths.sum())
    return Responses(
        entropy=(torch.rand(total, generator=random) * 6).round() / 3,
        eligible=(torch.rand(total, generator=random) < eligible).long(),
        lengths=lengths,
        order=torch.randperm(num_rows, generator=random),
        seeds=torch.randint(0, 2**62, (num_rows,), generator=random),
    )


def jagged(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Flat values in the form of verl's batches: one nested tensor with a row each."""
    return torch.nested.as_nested_tensor(list(values.split(lengths.tolist())), layout=torch.jagged)


def take(responses: Responses, members: list[int]) -> Responses:
    """Some of the rows, in the order given."""
    entropy, eligible = (values.split(responses.lengths.tolist()) for values in (responses.entropy, responses.eligible))
    index = torch.tensor(members, dtype=torch.int64)
    return Responses(
        torch.cat([entropy[row] for row in members]),
        torch.cat([eligible[row] for row in members]),
        responses.lengths[index],
        responses.order[index],
        responses.seeds[index],
    )


def with_padding_rows(responses: Responses, number: int, entropy: float = 9.0) -> Responses:
    """Add padding rows as verl does: each has one token outside the mask, with any entropy."""
    return Responses(
        torch.cat([responses.entropy, torch.full((number,), entropy)]),
        torch.cat([responses.eligible, torch.zeros(number, dtype=torch.int64)]),
        torch.cat([responses.lengths, torch.ones(number, dtype=torch.int64)]),
        torch.cat([responses.order, torch.arange(100, 100 + number)]),
        torch.cat([responses.seeds, torch.arange(number)]),
    )


def weights_on_rank(_: dict, responses: Responses, rule: Rule) -> tuple[list[torch.Tensor], Pool]:
    """Do a rank's work on its rows. Returns the weights of each row, and the pool over all ranks."""
    ranks = Ranks(torch.distributed.group.WORLD)
    choice = choose_over_ranks(responses, rule, ranks)
    soft = responses.entropy if rule.weight == "soft" else None
    counts = ranks.sum_counts(Counts.of(choice.kept, responses.eligible, soft))
    weights = token_weights(
        choice.kept, responses.eligible, responses.lengths, rule.loss_agg_mode, rule.denominator, soft, counts
    )
    return list(weights.split(responses.lengths.tolist())), choice.pools[0]
