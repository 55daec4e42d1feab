"""Stop a run that waits for answers which can never come.

Hook: none. verl's driver asks the TransferQueue again and again whether the prompts of a batch are finished
(``replay_buffer.py``). It has no time limit, and does not check the processes that must finish them. So there are
three ways to wait for ever:

- An agent-loop worker dies, or a reward never returns: the driver asks for ever.
- A rollout server dies under an asynchronous trainer: the driver drops the failed prompts and sends new ones for ever.
- The TransferQueue's controller dies: the driver waits for ever for the answer to one question.

All these loops call one method, ``_sync_metadata_from_transfer_queue``. If the config has the guard ``waiting``, that
method is wrapped, on the trainer's own buffer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from textwrap import shorten
from threading import Thread
from typing import TYPE_CHECKING, Any

import ray
import transfer_queue.interface
from ray.exceptions import ActorUnavailableError, RayActorError

from entropy_fork.common.asked_for import GUARDS
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.verl_types import StockTrainer
from entropy_fork.verl.config import read_guards

if TYPE_CHECKING:
    Base = StockTrainer
else:
    Base = object  # trainer.py puts the mixin in front of verl's own methods

#: seconds between two checks that every actor is alive
LOOK_SECONDS = 2.0

#: seconds that an actor has to show that it is alive, after prompts have failed
ANSWER_SECONDS = 10.0


class WatchedWaiting(Base):
    """Mixin below verl's V1 trainers; see ``trainer.py: install``."""

    __slots__ = ()

    def _build_replay_buffer(self) -> Any:
        buffer = super()._build_replay_buffer()
        guards = read_guards(self.config)
        if guards.waiting:
            ask, watch = buffer._sync_metadata_from_transfer_queue, Watch(self, guards.patience_s)

            def watched_ask() -> None:
                watch.before_asking()
                watch.while_asking(ask)
                watch.after_asking(buffer)

            buffer._sync_metadata_from_transfer_queue = watched_ask
        return buffer


class Watch:
    """Watches whether the actors are alive, and how long no answer has come.

    Args:
        trainer: verl's trainer.
        patience_s: ``entropy_fork_guards.patience_s``.
    """

    def __init__(self, trainer: StockTrainer, patience_s: float):
        self.trainer, self.patience_s = trainer, patience_s
        self._asked: dict[str, Any] = {}  # by an actor's name: the result of its __ray_ready__, which comes or fails
        self._next_look = 0.0
        self._failed: set[str] = set()
        self._answers: set[str] = set()
        self._waited, self._asked_at = 0.0, time.monotonic()

    def before_asking(self) -> None:
        """Raise an EntropyForkError if an actor has died."""
        if time.monotonic() >= self._next_look:
            self._check_alive(0.0)
            self._next_look = time.monotonic() + LOOK_SECONDS

    def while_asking(self, ask: Callable[[], None]) -> None:
        """Ask in a thread, and check the actors meanwhile: without its controller, the TransferQueue never answers.

        Raises:
            EntropyForkError: an actor has died. The thread still waits, and ends with the process.
        """
        answer: Future[None] = Future()

        def run() -> None:
            try:
                ask()
                answer.set_result(None)
            except BaseException as error:
                answer.set_exception(error)

        Thread(target=run, daemon=True).start()
        while not wait([answer], timeout=LOOK_SECONDS).done:
            self._check_alive(0.0)
        answer.result()

    def after_asking(self, buffer: Any) -> None:
        """Raise an EntropyForkError if no answer came for ``patience_s``, or if prompts failed and an actor died."""
        failed = set().union(*buffer.failure_keys.values())
        if failed - self._failed:  # check now, because verl may next train on the rest of the batch
            self._asked.clear()
            self._check_alive(ANSWER_SECONDS)
        self._failed = failed
        self._check_progress(buffer, time.monotonic())

    def _check_alive(self, patience_s: float) -> None:
        for name, actor in _actors(self.trainer):
            if name not in self._asked:
                self._asked[name] = actor.__ray_ready__.remote()
        names = {answer: name for name, answer in self._asked.items()}
        answered, _ = ray.wait(list(names), num_returns=len(names), timeout=patience_s) if names else ([], [])
        for answer in answered:
            del self._asked[names[answer]]
            try:
                ray.get(answer)
            except ActorUnavailableError:  # the network, perhaps: ask again
                continue
            except RayActorError as error:
                *_, reason = str(error).strip().splitlines() or [type(error).__name__]
                raise EntropyForkError(
                    f"{names[answer]} has died, and the run was waiting for its answers "
                    f"({shorten(reason, 200, placeholder=' …')}). Ray's logs have its last output. The same command "
                    f"resumes from the last checkpoint in {self.trainer.config.trainer.default_local_dir}."
                ) from error

    def _check_progress(self, buffer: Any, now: float) -> None:
        answers = {key for of_partition in buffer.partitions.values() for key in of_partition}
        # Only time spent asking counts: between two batches, the driver trains.
        self._waited += min(now - self._asked_at, 2 * LOOK_SECONDS)
        self._asked_at = now
        if answers - self._answers:
            self._waited = 0.0
        self._answers = answers
        if 0 < self.patience_s < self._waited:
            pending, running = (sum(map(len, keys.values())) for keys in (buffer.pending_keys, buffer.running_keys))
            raise EntropyForkError(
                f"no answer has come for {self.patience_s:g} s: {pending + running} prompts are not finished, "
                f"{running} of them begun. Either a reward, a tool or a rollout server hangs ('py-spy dump --pid PID' "
                f"shows where), or an answer takes longer: write {GUARDS}.patience_s=SECONDS, or 0 to wait for ever."
            )


def _actors(trainer: StockTrainer) -> Iterator[tuple[str, Any]]:
    """The actors that answers depend on, by name. Actors that this trainer does not have are left out."""
    for name, owner, attribute in (
        ("training worker", "actor_rollout_wg", "workers"),
        ("rollout server", "llm_server_manager", "server_handles"),
        ("separate rollout server", "standalone_server_manager", "server_handles"),
        ("agent-loop worker", "agent_loop_manager", "agent_loop_workers"),
        ("reward worker", "reward_loop_manager", "reward_loop_workers"),
    ):
        for number, actor in enumerate(getattr(getattr(trainer, owner, None), attribute, None) or []):
            yield f"{name} {number}", actor
    if (queue := getattr(transfer_queue.interface, "_TQ_CONTROLLER", None)) is not None:
        yield "the TransferQueue's controller", queue
