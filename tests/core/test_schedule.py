"""ρ over the steps."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropy_fork.core.schedule import ratio_at

RATIOS = st.floats(0.01, 1.0)


@given(st.integers(1, 10_000), RATIOS)
def test_constant(step: int, ratio: float) -> None:
    assert ratio_at(step, ratio, "constant", 1.0, 0) == ratio


@given(st.sampled_from(["linear", "cosine"]), RATIOS, RATIOS, st.integers(2, 500))
def test_both_ends_are_exact_and_the_way_is_monotone(schedule: str, first: float, last: float, steps: int) -> None:
    way = [ratio_at(step, first, schedule, last, steps) for step in range(1, steps + 3)]
    assert way[0] == first
    assert way[steps - 1] == way[-1] == last
    rising = 1 if last >= first else -1
    assert all(rising * (after - before) >= -1e-12 for before, after in pairwise(way))


def test_halfway() -> None:
    assert ratio_at(51, 0.2, "linear", 1.0, 101) == pytest.approx(0.6)
    assert ratio_at(51, 0.2, "cosine", 1.0, 101) == pytest.approx(0.6)
    assert ratio_at(26, 0.2, "cosine", 1.0, 101) < ratio_at(26, 0.2, "linear", 1.0, 101)


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule must be one of"):
        ratio_at(1, 0.2, "stairs", 1.0, 10)
    with pytest.raises(ValueError, match="needs schedule_steps"):
        ratio_at(1, 0.2, "linear", 1.0, 0)
