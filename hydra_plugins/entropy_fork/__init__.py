"""Puts the recipes on Hydra's search path, and refuses a run that asks for a mask it would not get.

And lets a sweep (``-m``) of main_ppo start each job in a process of its own (``launcher.py``).

Hook: Hydra imports whatever lies in the namespace package ``hydra_plugins`` (which therefore must not have an
``__init__`` of its own) at the start of every Hydra application of the environment, whether verl's plugins were loaded
or not. That makes this the one place that notices when they were not: verl swallows an error of ours, and without our
groups on the search path Hydra takes ``+recipe=x`` for a plain new key and trains verl's defaults.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

ASKED_FOR = re.compile(r"^\+{0,2}(recipe|cluster|template|entropy_fork)([=@.]|$)")


class EntropyForkSearchPath(SearchPathPlugin):
    """Adds ``recipes/`` (groups recipe, cluster, template, entropy_fork) in applications of verl."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Hydra's hook: append the recipes, in a process of verl's.

        Raises:
            SystemExit: one of them is asked for, and the plugin is not active.
        """
        if "verl" not in sys.modules:
            _refuse_a_node_in_a_file()  # another Hydra application of this environment, or one that imports verl later
            return
        problem = _why_inactive()
        if problem is None:
            from entropy_fork.verl.config import recipes_dir

            search_path.append(provider="entropy-fork", path=f"file://{recipes_dir()}")
            if _is_main_ppo():
                from hydra_plugins.entropy_fork.launcher import make_default

                make_default()
        elif any(ASKED_FOR.match(argument) for argument in sys.argv[1:]):
            _refuse(problem)
        else:
            _refuse_a_node_in_a_file()


def _refuse(problem: str) -> NoReturn:
    # SystemExit: the message alone, without a traceback through Hydra.
    raise SystemExit(f"entropy_fork was asked for, but is not active, so nothing would be masked: {problem}")


def _refuse_a_node_in_a_file() -> None:
    """The command line says nothing of ours, but a config file of the user's may, and Hydra reads it after this.

    ``run_ppo`` is the last that main_ppo, and a program with a task runner of its own, does before Ray starts (verl 0.8
    to 0.9.1). The program that is run is main_ppo itself, or has imported ``run_ppo`` from it by now, or will.
    """
    main = sys.modules["__main__"]
    if hasattr(main, "run_ppo"):
        _refuse_in_run_ppo(main)
    elif "verl" in sys.modules and _is_main_ppo():  # another shape of verl: who does not ask must not be stopped for it
        print(
            f"entropy_fork is not active, and a node 'entropy_fork' would do nothing: {_why_inactive()}",
            file=sys.stderr,
        )
    with contextlib.suppress(Exception):  # a broken wrapt may be why we are not active
        import wrapt

        wrapt.register_post_import_hook(_refuse_in_run_ppo, "verl.trainer.main_ppo")


def _refuse_in_run_ppo(module: Any) -> None:
    run_ppo = module.run_ppo

    @functools.wraps(run_ppo)
    def checking(config: Any, *args: Any, **kwargs: Any) -> Any:
        if "entropy_fork" in config and (problem := _why_inactive()):
            _refuse(problem)
        return run_ppo(config, *args, **kwargs)

    module.run_ppo = checking


@functools.cache  # asking imports the plugin, and a second look would find it there
def _why_inactive() -> str | None:
    if application := _unmasked_application():
        return (
            f"{application} has a trainer of its own, which would train on all tokens. Use verl.trainer.main_ppo; for "
            f"asynchronous training with trainer.v1.trainer_mode=colocate_async or separate_async."
        )
    if "entropy_fork.verl.plugin" in sys.modules:
        return None
    try:
        # Not loaded, or it raised and verl swallowed that: import it to learn the reason.
        import entropy_fork.verl.plugin  # noqa: F401
    except Exception as error:
        return f"its import fails with {type(error).__name__}: {error}"
    return (
        "verl did not load it. VERL_USE_EXTERNAL_PLUGINS must be unset, 'auto' or a list with 'entropy_fork' in it, "
        "and 'pip show entropy-fork' must find the package."
    )


def _unmasked_application() -> str | None:
    """The file of verl that is run, where it is another program than main_ppo (experimental trainers, SFT, …)."""
    verl, main = _files()
    if verl not in main.parents or _is_main_ppo():
        return None  # main_ppo, or a program of the user's own
    return str(main.relative_to(verl.parent))


def _is_main_ppo() -> bool:
    verl, main = _files()
    return main == verl / "trainer" / "main_ppo.py"


def _files() -> tuple[Path, Path]:
    """verl's folder, and the program that is run."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    return Path(sys.modules["verl"].__file__ or "").resolve().parent, Path(main or "").resolve()
