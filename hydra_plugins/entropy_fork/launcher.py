"""Hydra's launcher for sweeps of verl: each job has its own process and Ray session. See docs/guide/sweeps.md.

Hook: Hydra finds the class here, and its entry ``hydra/launcher=entropy_fork`` in the config store. It is the default
for main_ppo with ``-m``, if the command line asks for anything of ours (see :func:`make_default`). Hydra's own default,
``basic``, cannot run a second job of verl. All of the work is in ``entropy_fork.sweep.jobs``, which is imported when a
sweep starts, because Hydra imports this module in every application of the environment.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, setup_globals
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from entropy_fork.common.asked_for import on_command_line

if TYPE_CHECKING:
    from entropy_fork.sweep.jobs import Job, Outcome
    from entropy_fork.sweep.ray_cluster import Usage

log = logging.getLogger(__name__)

NAME = "entropy_fork"


#: ``hydra.launcher`` of a sweep. A dict, because a dataclass needs its module, and Hydra runs this file before that.
DEFAULTS = {
    "_target_": "hydra_plugins.entropy_fork.launcher.FreshProcessLauncher",
    # seconds that a job waits, on an existing Ray cluster, for the resources of the job before it
    "patience_s": 180.0,
    # seconds that a job may go on after Ctrl-C, and that its other processes may go on after its end
    "grace_s": 30.0,
}
ConfigStore.instance().store(group="hydra/launcher", name=NAME, node=DEFAULTS, provider="entropy-fork")


def make_default() -> None:
    """Make this launcher the default of a sweep whose command line asks for anything of ours.

    ``hydra/launcher=basic`` still gives Hydra's own launcher, and so does a command line without anything of ours.
    """
    from hydra._internal.utils import get_args_parser

    arguments, _ = get_args_parser().parse_known_args(sys.argv[1:])
    is_sweep = arguments.multirun or "hydra.mode=MULTIRUN" in arguments.overrides
    users_folder = Path(arguments.config_dir).absolute() if arguments.config_dir else None
    if is_sweep and on_command_line(sys.argv[1:], users_folder):
        config = HydraConf()
        config.defaults = [{"launcher": NAME} if entry == {"launcher": "basic"} else entry for entry in config.defaults]
        ConfigStore.instance().store(group="hydra", name="config", node=config, provider="hydra")


class JobsFailed(CompactHydraException):
    """Some jobs of a sweep failed. Hydra prints only the message, and exits with status 1."""


class FreshProcessLauncher(Launcher):
    """Runs the jobs one after another, continues if one fails, and prints a table of all jobs at the end."""

    def __init__(self, patience_s: float, grace_s: float) -> None:
        self.patience_s, self.grace_s = patience_s, grace_s
        self.outcomes: list[Outcome] = []  # of all batches that the sweeper launches
        self.before: Usage | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's hook before :meth:`launch`."""
        from entropy_fork.sweep.jobs import Places

        self.context, self.config = hydra_context, config
        self.places = Places()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs one after another, each in its own process. A sweep may call this several times.

        Raises:
            SystemExit: 130, after Ctrl-C.
        """
        from entropy_fork.sweep import jobs as sweep

        setup_globals()
        folder = Path(str(self.config.hydra.sweep.dir)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        results = folder / "results.csv"
        configs = [self._compose(overrides, initial_job_idx + i) for i, overrides in enumerate(job_overrides)]
        jobs = self._jobs(job_overrides, configs)
        log.info(f"Launching {len(jobs)} jobs, one after the other, each in a process of its own")
        first = len(self.outcomes)
        self.outcomes += [sweep.Outcome(job, sweep.NOT_RUN) for job in jobs]
        for index, (job, config) in enumerate(zip(jobs, configs, strict=True)):
            self.outcomes[first + index] = outcome = self._run(job, config)
            sweep.write_results(self.outcomes, results)
            log.info(f"#{job.number} {outcome.status} after {outcome.seconds:.0f} s")
            if outcome.status == sweep.INTERRUPTED:
                break
        sweep.print_results(self.outcomes, results)
        batch = self.outcomes[first:]
        if batch[-1].status in (sweep.INTERRUPTED, sweep.NOT_RUN):
            raise SystemExit(130)  # as a shell reports Ctrl-C
        failed = sum(outcome.status == sweep.FAILED for outcome in batch)
        message = f"{failed} of {len(batch)} jobs failed: see the table above, or {results}"
        return [_returned(*each, message) for each in zip(batch, configs, strict=True)]

    def _compose(self, overrides: Sequence[str], number: int) -> DictConfig:
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
        return config

    def _jobs(self, job_overrides: Sequence[Sequence[str]], configs: Sequence[DictConfig]) -> list[Job]:
        from entropy_fork.sweep import jobs as sweep

        typed = OmegaConf.to_container(self.config.hydra.overrides)  # unresolved: ${hydra.job.num} is the job's
        assert isinstance(typed, dict)
        swept = [sweep.swept_overrides(overrides, typed["task"]) for overrides in job_overrides]
        forms = [sweep.short_form(overrides) for overrides in swept]
        changes = self.places.own(configs, forms)
        jobs = []
        for overrides, config, form, own, differs in zip(job_overrides, configs, forms, changes, swept, strict=True):
            number = config.hydra.job.num
            with sweep.hydra_config(config):
                folder = Path(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir)).absolute()
            hydras = {"hydra.run.dir": folder, "hydra.job.num": number, "hydra.job.id": number}
            line = sweep.command(_program(), typed["hydra"], overrides, {**own, **hydras})
            name = sweep.value_of(config, sweep.NAME)
            short = sweep.value_of(config, "entropy_fork.short_output") == "True"
            jobs.append(sweep.Job(number, differs, line, folder, name, sweep.own_environment(form), short))
            log.info(f"\t#{number} : {' '.join(differs)}")
            for key, value in own.items():
                log.info(f"\t     {key}={value}")
            if checkpoint := sweep.continues_from(config):
                log.info(f"\t     goes on from {checkpoint} (trainer.resume_mode=disable starts anew)")
        return jobs

    def _run(self, job: Job, config: DictConfig) -> Outcome:
        from entropy_fork.common.errors import EntropyForkError
        from entropy_fork.sweep import jobs as sweep
        from entropy_fork.sweep import ray_cluster

        try:
            ray_init = OmegaConf.select(config, "ray_kwargs.ray_init")
            address = None if ray_init is None else ray_cluster.find_cluster(ray_init)
            if address is not None:
                if self.before is not None:
                    needed = config.trainer.nnodes * config.trainer.n_gpus_per_node
                    missing = ray_cluster.wait_until_free(address, self.before, needed, self.patience_s)
                    if missing:
                        log.warning(f"the Ray cluster {address} is not as it was before the last job: {missing}")
                self.before = ray_cluster.usage(address)
            log.info(f"#{job.number} starts" + (f" on the Ray cluster {address}" if address else ""))
            return sweep.run(job, self.grace_s)
        except EntropyForkError as error:
            return sweep.Outcome(job, sweep.FAILED, error=f"not started: {error}")
        except KeyboardInterrupt:
            return sweep.Outcome(job, sweep.INTERRUPTED, error="stopped by Ctrl-C before it was started")


def _program() -> list[str]:
    """The command up to the overrides: interpreter, ``-m verl.trainer.main_ppo``, and the flags for the config."""
    from hydra._internal.utils import get_args_parser

    started = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    arguments, _ = get_args_parser().parse_known_args(sys.argv[1:])
    flags = {name: getattr(arguments, name) for name in ("config_path", "config_dir", "config_name")}
    given = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items() if value is not None]
    return [sys.executable, *started, *given]


def _returned(outcome: Outcome, config: DictConfig, message: str) -> JobReturn:
    """A job's result in the form that Hydra's sweepers need. main_ppo returns nothing."""
    from entropy_fork.sweep import jobs as sweep

    task = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    hydra = OmegaConf.masked_copy(config, ["hydra"])
    is_finished = outcome.status == sweep.FINISHED
    returned = JobReturn(
        overrides=OmegaConf.to_container(config.hydra.overrides.task),  # type: ignore[arg-type]
        cfg=task,
        hydra_cfg=hydra,
        working_dir=os.getcwd(),
        task_name=JobRuntime.instance().get("name"),
        status=JobStatus.COMPLETED if is_finished else JobStatus.FAILED,
    )
    returned.return_value = None if is_finished else JobsFailed(message)
    return returned
