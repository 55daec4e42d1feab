"""A rule refuses wrong values by itself; and which rows share a pool."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from entropy_fork.core.responses import pool_of_responses
from entropy_fork.core.rule import POOLS, Rule, Selector


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"entropy": "typo"}, "entropy must be one of .+, got 'typo'"),
        ({"pool": "epoch"}, "pool must be one of .+, got 'epoch'"),
        ({"denominator": "some"}, "denominator must be one of .+, got 'some'"),
        ({"weight": "fuzzy"}, "weight must be one of .+, got 'fuzzy'"),
        ({"loss_agg_mode": "mean"}, "loss_agg_mode must be one of token-mean, seq-mean-token-mean, .*got 'mean'"),
        ({"entropy": "current", "pool": "batch"}, "no pool=batch: .*Write pool=mini_batch, or entropy=old"),
        ({"entropy": "current", "selector": Selector(0.2, "random")}, "does not use entropy; write entropy=old"),
    ],
)
def test_a_rule_without_meaning_is_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Rule(**{"selector": Selector(0.2), **settings})


#: eight rows, by mini-batch and by micro-batch
MINI_BATCH, MICRO_BATCH = [0, 0, 1, 1, 0, 0, 1, 1], [0, 1, 2, 2, 1, 1, 3, 3]

#: for each value of ``pool``, restated: the rows that share a pool
SHARING = {
    "response": [[0], [1], [2], [3], [4], [5], [6], [7]],
    "micro_batch": [[0], [1, 4, 5], [2, 3], [6, 7]],
    "mini_batch": [[0, 1, 4, 5], [2, 3, 6, 7]],
    "batch": [[0, 1, 2, 3, 4, 5, 6, 7]],
}


@pytest.mark.parametrize("pool", POOLS)
def test_which_rows_share_a_pool(pool: str) -> None:
    """A new value of ``pool`` needs a line in ``SHARING``."""
    assert pool in SHARING, f"say in SHARING which rows share a pool with pool={pool}"
    pool_of_row = pool_of_responses(pool, torch.tensor(MINI_BATCH), torch.tensor(MICRO_BATCH)).tolist()
    sharing = [[row for row in range(8) if pool_of_row[row] == number] for number in dict.fromkeys(pool_of_row)]
    assert sharing == SHARING[pool]
