"""``entropy-fork plan`` and ``doctor``: the checks before a run."""

from __future__ import annotations

from typing import Annotated

import typer

from entropy_fork.cli.at_work import at_work, print_json

#: for typer: what it does not know is an override for Hydra, passed on as it is
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

ConfigName = Annotated[str, typer.Option(help="verl's config, as main_ppo's --config-name")]
Json = Annotated[bool, typer.Option("--json", help="print everything as JSON, for a program")]


def plan(
    context: typer.Context,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="what you would write after 'python -m verl.trainer.main_ppo'")
    ] = None,
    config_name: ConfigName = "ppo_trainer",
    model_config: Annotated[
        str | None,
        typer.Option(help="a config.json, or a shape that we ship (qwen3-8b, …), if the model is not on this machine"),
    ] = None,
    gpu_memory_gib: Annotated[float, typer.Option(help="memory of one accelerator, in GiB")] = 80.0,
    json: Json = False,
) -> None:
    """Show what a run would do to a cluster: what would stop it, tokens and memory per GPU. Starts nothing.

    entropy-fork plan +recipe=qwen3_14b_20k +cluster=paper_16x8 entropy_fork.top_ratio=0.1
    """
    with at_work("plan"):
        from entropy_fork.preflight import plan as planning

        made = planning.make_plan([*(overrides or []), *context.args], config_name, model_config, gpu_memory_gib)
    if json:
        print_json(made.to_json())
    else:
        from entropy_fork.preflight.tables import print_plan

        print_plan(made)
    raise typer.Exit(code=1 if made.errors else 0)


def doctor(
    context: typer.Context,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="a command line of main_ppo; doctor says what it would mask")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="a running Ray cluster ('auto', 'HOST:6379'): one worker per node is asked")
    ] = None,
    config_name: ConfigName = "ppo_trainer",
    json: Json = False,
) -> None:
    """Check that this process and a Ray worker have what a run needs. Exit status 1 means that something is wrong.

    entropy-fork doctor +recipe=qwen3_14b_20k entropy_fork.top_ratio=0.1
    """
    with at_work("doctor"):
        from entropy_fork.preflight.doctor import diagnose

        found = diagnose([*(overrides or []), *context.args], address, config_name)
    if json:
        print_json(found.to_json())
    else:
        from entropy_fork.preflight.doctor_tables import print_diagnosis

        print_diagnosis(found)
    raise typer.Exit(code=1 if found.problems else 0)
