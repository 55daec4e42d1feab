"""Wait, between two jobs of a sweep, until an existing Ray cluster has freed what the last job held.

When a driver has ended, Ray ends its actors and removes its placement groups, but not at once. A job that starts too
early finds fewer GPUs than there are, or attaches to the dying TransferQueue controller, which it finds by its name.

A short-lived process asks the cluster (``python -m entropy_fork.sweep.ray_cluster``): a connection in the process that
starts the jobs would leave threads there, and those do not go together with ``fork``. Only Ray's public interface is
used, except to find out which cluster ``ray.init`` would connect to.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from entropy_fork.common.errors import EntropyForkError

#: the resources that verl reserves
RESOURCES = ("CPU", "GPU", "NPU")

#: seconds to start Python, connect and get an answer
CONNECT_SECONDS = 120.0


@dataclass(frozen=True)
class Usage:
    """A cluster at one moment.

    Attributes:
        free: how much of each resource is not reserved.
        actors: the named actors that are alive, as ``namespace/name``.
    """

    free: dict[str, float]
    actors: list[str]

    def difference(self, before: Usage) -> str:
        """What differs from before: resources that are held, and named actors that are alive. Empty if nothing does."""
        held = [
            f"{self.free.get(name, 0):g} of {amount:g} {name} free"
            for name, amount in before.free.items()
            if self.free.get(name, 0) < amount - 1e-6
        ]
        alive = [name for name in self.actors if name not in before.actors]
        return "; ".join(held + ([f"still there: {', '.join(alive)}"] if alive else []))


def find_cluster(ray_init: Mapping[str, Any]) -> str | None:
    """The address of the cluster that ``ray.init(**ray_init)`` connects to; None if it starts one itself."""
    address = ray_init.get("address") or None
    chosen = os.environ.get("RAY_ADDRESS") or address if address in (None, "auto") else address
    if chosen is not None and "://" in chosen:  # an address of Ray's client, or of a provider
        return chosen
    from ray._private.services import canonicalize_bootstrap_address

    found: str | None = canonicalize_bootstrap_address(address, ray_init.get("_temp_dir"))
    return found


def usage(address: str) -> Usage:
    """What is free on the cluster, and which named actors live there.

    Raises:
        EntropyForkError: the cluster cannot be reached.
    """
    return Usage(**_ask(address, timeout_s=CONNECT_SECONDS))


def wait_until_free(address: str, before: Usage, accelerators: float, patience_s: float) -> str | None:
    """Wait until the resources of a job are free again and its named actors are gone.

    Args:
        address: address of the cluster.
        before: the cluster as it was before that job.
        accelerators: how many the next job needs.
        patience_s: how long to wait, in seconds.

    Returns:
        None if all is as before. Else what is missing, if enough accelerators are free for the next job all the same:
        others may have taken something meanwhile.

    Raises:
        EntropyForkError: the next job cannot start; the message says what is in its way.
    """
    now = Usage(**_ask(address, json.dumps([asdict(before), patience_s]), timeout_s=CONNECT_SECONDS + patience_s))
    if not (missing := now.difference(before)):
        return None
    free = max(now.free.get(name, 0) for name in RESOURCES if name != "CPU")
    leftover = [name for name in now.actors if name not in before.actors]
    if free >= accelerators and not leftover:
        return missing
    raise EntropyForkError(
        f"the Ray cluster {address} is not free {patience_s:g} s after the job before: {missing}; needed: "
        f"{accelerators:g} accelerators. 'ray status' and 'ray list actors' show who holds them. To wait longer: "
        f"hydra.launcher.patience_s=SECONDS"
    )


def _ask(address: str, *arguments: str, timeout_s: float) -> dict[str, Any]:
    asking = [sys.executable, "-m", "entropy_fork.sweep.ray_cluster", address, *arguments]
    try:
        answer = subprocess.run(asking, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise EntropyForkError(f"the Ray cluster {address} does not answer within {timeout_s:g} s") from None
    lines = (answer.stdout if answer.returncode == 0 else answer.stderr).strip().splitlines() or ["no answer"]
    if answer.returncode != 0:
        raise EntropyForkError(f"the Ray cluster {address} cannot be reached: {lines[-1]}")
    reply: dict[str, Any] = json.loads(lines[-1])
    return reply


def _answer(address: str, before: Usage | None = None, patience_s: float = 0.0) -> Usage:
    """Runs in the process that asks: connect, and look until nothing is missing."""
    import ray
    from ray.util import list_named_actors

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    deadline = time.monotonic() + patience_s
    while True:
        available = ray.available_resources()
        now = Usage(
            {name: available.get(name, 0.0) for name in RESOURCES if name in ray.cluster_resources()},
            sorted(f"{actor['namespace']}/{actor['name']}" for actor in list_named_actors(all_namespaces=True)),
        )
        if before is None or not now.difference(before) or time.monotonic() > deadline:
            return now
        time.sleep(1)


if __name__ == "__main__":
    before, patience_s = json.loads(sys.argv[2]) if len(sys.argv) > 2 else (None, 0.0)
    try:
        print(json.dumps(asdict(_answer(sys.argv[1], Usage(**before) if before else None, patience_s))))
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:  # Ray wraps the reason: a wrong address, no authentication, another version
            root = root.__cause__
        # only its last line: Ray puts whole tracebacks into its messages
        sys.exit(f"{type(error).__name__}: {error}: {str(root).strip().splitlines()[-1]}".replace("\n", " "))
