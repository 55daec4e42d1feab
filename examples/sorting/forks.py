"""Show how many tokens of an answer are choices, and their entropies."""

from __future__ import annotations

import typer

from examples.sorting.world import ChoiceKind, find_choices
from examples.tiny_forks import command

if __name__ == "__main__":
    typer.run(command(find_choices, list(ChoiceKind)))
