"""Sends :func:`~entropy_fork.preflight.probe.probe` to a Ray worker of each node, and collects the answers."""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from entropy_fork.preflight import probe as probe_module
from entropy_fork.preflight.probe import Answer, probe

#: how long a worker may take to answer. The first worker of a Ray that has just been started imports verl.
ANSWER_SECONDS = 120.0


@dataclass
class Workers:
    """What came back from the workers.

    Attributes:
        answers: by the worker's name.
        problems: workers that did not answer, or that Ray could not start; a sentence each.
        notes: what was asked in another way than planned; a sentence each.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def ask_workers(address: str | None, config: DictConfig | None, on_cpu: bool) -> Workers:
    """Ask a worker on each node, in the environment that main_ppo gives to its workers.

    Args:
        address: of a running cluster. None starts a Ray in a temporary folder, and ends it.
        config: of the run; None without one.
        on_cpu: whether this process is told to train on a CPU, so that workers are asked without a GPU.
    """
    import ray
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    workers = Workers()
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
        _ask_nodes(workers, address, on_cpu)
    except Exception as error:  # Ray has many
        if address is None:
            workers.problems.append(f"Ray does not start here: {type(error).__name__}: {_first_line(error)}")
        else:
            workers.problems.append(
                f"--address {address}: {type(error).__name__}: {_first_line(error)}. 'ray start --head' starts a "
                "cluster; without --address a Ray is started for this check."
            )
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return workers


def _ask_nodes(workers: Workers, address: str | None, on_cpu: bool) -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(probe_module)
    try:
        remote = ray.remote(probe)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        # a hundredth of a GPU, so that the worker sees one
        shares = [0.01 if node["Resources"].get("GPU") and not on_cpu else 0 for node in nodes]
        tasks = [_task_on(remote, node, share) for node, share in zip(nodes, shares, strict=True)]
        for node, share, asked in zip(nodes, shares, tasks, strict=True):
            name = "a Ray worker" if address is None else f"a Ray worker on {node['NodeManagerHostname']}"
            try:
                workers.answers[name] = _wait(remote, node, share, asked, name, workers)
            except ray.exceptions.GetTimeoutError:
                workers.problems.append(
                    f"{name} did not answer in {ANSWER_SECONDS:.0f} s. Look at 'ray status' and at the node's logs."
                )
            except ray.exceptions.RayError as error:
                workers.problems.append(f"{name} failed: {_first_line(error)}")
    finally:
        ray.cloudpickle.unregister_pickle_by_value(probe_module)


def _task_on(remote: Any, node: dict[str, Any], gpus: float) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return remote.options(num_cpus=0, num_gpus=gpus, max_retries=0, scheduling_strategy=here).remote()


def _wait(remote: Any, node: dict[str, Any], share: float, asked: Any, name: str, workers: Workers) -> Answer:
    """The worker's answer. Where a node's GPUs are all taken, that of a worker without one."""
    import ray

    try:
        return ray.get(asked, timeout=ANSWER_SECONDS)
    except ray.exceptions.GetTimeoutError:
        if not share:
            raise
        ray.cancel(asked)
        workers.notes.append(f"{name}: no answer with a GPU (all taken?), so it was asked without one")
        return ray.get(_task_on(remote, node, 0), timeout=ANSWER_SECONDS)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
