"""A rule says itself what it cannot mean, whoever makes it."""

from __future__ import annotations

from typing import Any

import pytest

from entropy_fork.core.rule import Rule, Selector


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"entropy": "typo"}, "entropy must be one of .+, got 'typo'"),
        ({"pool": "epoch"}, "pool must be one of .+, got 'epoch'"),
        ({"denominator": "some"}, "denominator must be one of .+, got 'some'"),
        ({"weight": "fuzzy"}, "weight must be one of .+, got 'fuzzy'"),
        ({"loss_agg_mode": "mean"}, "loss_agg_mode must be one of token-mean, seq-mean-token-mean, .*got 'mean'"),
        ({"entropy": "current", "pool": "batch"}, "no pool=batch: .*Write pool=mini_batch, or entropy=old"),
        ({"entropy": "current", "selector": Selector(0.2, "random")}, "looks at no entropy; write entropy=old"),
    ],
)
def test_a_rule_without_meaning_is_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Rule(**{"selector": Selector(0.2), **settings})
