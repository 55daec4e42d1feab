"""All rules of matching, in the order in which they are asked."""

from __future__ import annotations

from entropy_fork.reward.match_lists import cases, choices, lists, matrices, same_text, texts
from entropy_fork.reward.match_numbers import (
    bases,
    clocks,
    formulas,
    numbers,
    percentages,
    quantities,
    ratios,
    residues,
)
from entropy_fork.reward.match_relations import names, relations, sets
from entropy_fork.reward.matching import Rule

#: the first that knows the two kinds decides
RULES: tuple[Rule, ...] = (
    same_text, choices, numbers, residues, sets, names, percentages, quantities, bases, clocks, ratios, relations,
    lists, matrices, cases, formulas, texts,
)  # fmt: skip
