"""Show that the tokens of highest entropy are the choices in the chain of thought."""

from __future__ import annotations

import typer

from examples.cpu_demo.world import ChoiceKind, find_choices
from examples.tiny_forks import command

if __name__ == "__main__":
    typer.run(command(find_choices, list(ChoiceKind)))
