"""Put the recipes on Hydra's search path, and refuse a run that asks for a mask and would not get it.

It also lets a sweep (``-m``) of main_ppo start each job in a process of its own (``launcher.py``).

Hook: Hydra imports everything in the namespace package ``hydra_plugins`` (which therefore must not have an ``__init__``
of its own) at the start of every Hydra application of the environment, whether verl's plugins were loaded or not. So
this is the one place that can notice that they were not. verl would not: it swallows an error of ours. And without our
groups on the search path, Hydra would take ``+recipe=x`` for a plain new key, and train with verl's defaults.
"""

from __future__ import annotations

import functools
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig

from entropy_fork.common.asked_for import in_config, on_command_line
from entropy_fork.common.recipes import recipes_dir


class EntropyForkSearchPath(SearchPathPlugin):
    """Adds ``recipes/`` (groups recipe, cluster, template, and the presets of our nodes) in applications of verl."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Hydra's hook: append the recipes, in a process that has imported verl.

        Raises:
            SystemExit: a recipe or a node of ours is asked for and the plugin is not active; or words of the line that
                name our nodes are wrong.
        """
        if "verl" not in sys.modules:
            _refuse_a_node_in_a_file()  # not verl's application, or one that imports verl later
            return
        if _is_active():
            _refuse_wrong_words(search_path)
            if folder := _users_folder():  # Hydra appends it later, but its files must come before ours
                search_path.append(provider="command-line", path=f"file://{folder}")
            search_path.append(provider="entropy-fork", path=f"file://{recipes_dir()}")
            if _is_main_ppo():
                from hydra_plugins.entropy_fork.launcher import make_default

                make_default()
        elif on_command_line(sys.argv[1:], _users_folder()):
            _refuse()
        else:
            _refuse_a_node_in_a_file()


def _refuse_wrong_words(search_path: ConfigSearchPath) -> None:
    """Refuse a line whose words about our nodes are wrong, with all that is wrong with the line.

    Hydra has not composed anything yet. It would stop at the first such word, and not say why.
    """
    from hydra._internal.utils import get_args_parser

    from entropy_fork.verl.config.words import check_words

    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            arguments = get_args_parser().parse_known_args(sys.argv[1:])[0]
    except SystemExit:  # the arguments are not Hydra's
        return
    if not on_command_line(arguments.overrides, None):
        return
    folders = [Path(entry.path.removeprefix("file://")) for entry in search_path.get_path() if "file://" in entry.path]
    if users := _users_folder():
        folders.append(users)
    searches = any(word.startswith("hydra.searchpath") for word in arguments.overrides)

    def has_option(group: str, option: str) -> bool:
        return searches or any((folder / group / f"{option}.yaml").is_file() for folder in folders)

    plain = _is_main_ppo() and not (arguments.config_path or arguments.config_name or users)
    if problems := check_words(arguments.overrides, has_option, plain).problems:
        if _is_main_ppo() and not arguments.multirun:
            problems = _with_all_others(arguments, problems)
        if len(problems) == 1:
            raise SystemExit(problems[0])
        lines = [f"  {number}. {problem}" for number, problem in enumerate(problems, 1)]
        raise SystemExit("\n".join([f"{len(problems)} problems, found before Ray starts:", *lines]))


def _with_all_others(arguments: Any, problems: list[str]) -> list[str]:
    """The problems of the line's words, and those of the other words and of the run: one does not hide another."""
    from entropy_fork.preflight.launcher import problems_of_line

    try:
        others = problems_of_line(arguments.overrides, arguments.config_name or "ppo_trainer", arguments.config_dir)
    except Exception:  # the words are wrong; that more could be wrong is no reason to hide it
        return problems
    return list(dict.fromkeys([*problems, *others]))


#: attribute of a function that was wrapped by :func:`_refuse_a_node_in_a_file`
CHECKS = "_checks_for_entropy_fork"


def _is_active() -> bool:
    return "entropy_fork.verl.plugin" in sys.modules and _unmasked_application() is None


def _users_folder() -> Path | None:
    """The folder of ``--config-dir``; None if the arguments are not Hydra's, as in a program that composes a config."""
    from hydra._internal.utils import get_args_parser

    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            folder = get_args_parser().parse_known_args(sys.argv[1:])[0].config_dir
    except SystemExit:
        return None
    return Path(folder).absolute() if folder else None


def _refuse() -> NoReturn:
    # SystemExit prints only the message, without a traceback through Hydra.
    reason = _why_inactive()
    raise SystemExit(f"entropy_fork was asked for, but is not active, so nothing would be masked: {reason}")


def _refuse_a_node_in_a_file() -> None:
    """Check the config itself, later. The command line has nothing of ours, but the user's config file may have.

    Hydra reads config files after this. Two functions are wrapped, once each, even if a program composes many configs:
    ``run_ppo``, the last call of main_ppo or of a program with its own task runner before Ray starts (verl 0.8 to
    0.9.1); and the pickling of a config, which every program does when it hands the config to another process.
    """
    main = sys.modules["__main__"]
    if (run_ppo := getattr(main, "run_ppo", None)) and not hasattr(run_ppo, CHECKS):

        @functools.wraps(run_ppo)
        def checking(config: Any, *args: Any, **kwargs: Any) -> Any:
            _refuse_if_inactive(config)
            return run_ppo(config, *args, **kwargs)

        setattr(checking, CHECKS, True)
        main.run_ppo = checking  # type: ignore[attr-defined]

    get_state = DictConfig.__getstate__
    if hasattr(get_state, CHECKS):
        return

    @functools.wraps(get_state)
    def checking_first(self: DictConfig) -> Any:
        _refuse_if_inactive(self)
        return get_state(self)

    setattr(checking_first, CHECKS, True)
    DictConfig.__getstate__ = checking_first  # type: ignore[assignment, method-assign]


def _refuse_if_inactive(config: Any) -> None:
    if in_config(config) and "verl" in sys.modules and not _is_active():
        _refuse()


def _why_inactive() -> str:
    if application := _unmasked_application():
        return (
            f"{application} has a trainer of its own, which would train on all tokens. Use verl.trainer.main_ppo; for "
            f"asynchronous training with trainer.v1.trainer_mode=colocate_async or separate_async."
        )
    try:
        # It was not loaded, or it raised and verl swallowed the error: import it to learn the reason.
        import entropy_fork.verl.plugin  # noqa: F401
    except Exception as error:
        return f"its import fails with {type(error).__name__}: {error}"
    return (
        "verl did not load it. VERL_USE_EXTERNAL_PLUGINS must be unset, 'auto' or a list with 'entropy_fork' in it, "
        "and 'pip show entropy-fork' must find the package."
    )


def _unmasked_application() -> str | None:
    """The file of verl that is run, if it is a program other than main_ppo (experimental trainers, SFT, …), or None."""
    verl, main = _files()
    if verl not in main.parents or _is_main_ppo():
        return None  # main_ppo, or the user's own program
    return str(main.relative_to(verl.parent))


def _is_main_ppo() -> bool:
    verl, main = _files()
    return main == verl / "trainer" / "main_ppo.py"


def _files() -> tuple[Path, Path]:
    """The folder of verl, and the program that is run."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    return Path(sys.modules["verl"].__file__ or "").resolve().parent, Path(main or "").resolve()
