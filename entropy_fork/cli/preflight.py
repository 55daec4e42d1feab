"""``entropy-fork plan`` and ``doctor``: the checks before a run."""

from __future__ import annotations

from typing import Annotated

import typer

from entropy_fork.cli.at_work import at_work, print_json

#: for typer: what it does not know is an override for Hydra, passed on as it is
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

ConfigName = Annotated[str, typer.Option("--config-name", "-cn", help="verl's config, as main_ppo's --config-name")]
ConfigDir = Annotated[
    str | None, typer.Option("--config-dir", "-cd", help="a folder with configs of yours, as main_ppo's --config-dir")
]
Json = Annotated[bool, typer.Option("--json", help="print everything as JSON, for a program")]


def _line(context: typer.Context, overrides: list[str] | None) -> list[str]:
    """The overrides of a command line.

    Raises:
        EntropyForkError: an option that the command does not have.
    """
    from entropy_fork.common.close_names import did_you_mean
    from entropy_fork.common.errors import EntropyForkError

    line = [*(overrides or []), *context.args]
    known = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
    for word in line:
        name = word.split("=")[0]
        if name.startswith("-") and name not in ("-m", "--multirun"):
            raise EntropyForkError(
                f"'{context.info_name}' has no option {name}.{did_you_mean(name, known)} Its options: "
                f"{', '.join(known)}. Everything else is an override of main_ppo: key=value."
            )
    return line


def plan(
    context: typer.Context,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="what you would write after 'python -m verl.trainer.main_ppo'")
    ] = None,
    config_name: ConfigName = "ppo_trainer",
    config_dir: ConfigDir = None,
    model_config: Annotated[
        str | None,
        typer.Option(help="a config.json, or a shape that we ship (qwen3-8b, …), if the model is not on this machine"),
    ] = None,
    gpu_memory_gib: Annotated[float, typer.Option(help="memory of one accelerator, in GiB")] = 80.0,
    flash_attention: Annotated[
        bool,
        typer.Option(help="whether flash-attn is installed where it runs: its cross entropy needs less memory"),
    ] = True,
    json: Json = False,
) -> None:
    """Show what a run would do to a cluster: what would stop it, tokens and memory per GPU. Starts nothing.

    entropy-fork plan +recipe=qwen3_14b_20k +cluster=paper_16x8 entropy_fork.top_ratio=0.1
    """
    with at_work("plan"):
        from entropy_fork.preflight import plan as planning

        line = _line(context, overrides)
        made = planning.make_plan(line, config_name, model_config, gpu_memory_gib, config_dir, flash_attention)
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
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """Check that this process and a Ray worker have what a run needs. Exit status 1 means that something is wrong.

    entropy-fork doctor +recipe=qwen3_14b_20k entropy_fork.top_ratio=0.1
    """
    with at_work("doctor"):
        from entropy_fork.preflight.doctor import diagnose

        found = diagnose(_line(context, overrides), address, config_name, config_dir)
    if json:
        print_json(found.to_json())
    else:
        from entropy_fork.preflight.doctor_tables import print_diagnosis

        print_diagnosis(found)
    raise typer.Exit(code=1 if found.problems else 0)
