"""``entropy-fork plan``: finds, without a GPU, errors that would stop a run late, and counts its tokens and bytes.

It composes the config of a command line (``compose.py``), runs the launcher's checks on it (``launcher.py``), reads
the shape of the run (``read_shape.py``), looks for what would fail later (``problems.py``), and counts the step
(``step.py``) and the memory (``add_up.py``, ``fits.py``). It starts nothing and writes nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from omegaconf import DictConfig

from entropy_fork.common.errors import EntropyForkError, is_said
from entropy_fork.common.problem import AT_START, IN_MODEL, IN_RAY, Problem
from entropy_fork.common.progress import task
from entropy_fork.preflight.add_up import Engines, Logits, ModelSummary, add_up
from entropy_fork.preflight.compose import compose_most, resolve
from entropy_fork.preflight.config_values import UnreadableConfig
from entropy_fork.preflight.fits import check_fit
from entropy_fork.preflight.launcher import find_unguarded_data_problems, what_the_launcher_says
from entropy_fork.preflight.memory import GIB, Layout, Phase
from entropy_fork.preflight.model_shape import ModelShape, find_model_shape
from entropy_fork.preflight.notes import notes_on
from entropy_fork.preflight.problems import find_problems
from entropy_fork.preflight.read_shape import read_run_shape
from entropy_fork.preflight.run_shape import Model
from entropy_fork.preflight.step import Step, count_step
from entropy_fork.verl.config import read_config


@dataclass
class Plan:
    """What was found. Sizes in bytes, lengths in tokens.

    Attributes:
        command: the command line.
        problems: errors, and what runs but not as it was written.
        model: its sizes; None where the model was not found.
        layout: how the actor is cut up; None where the config could not be read, as with ``step``.
        step: what a training step has.
        phases: the moments of a step and what an accelerator holds then, in their order.
        head: the logits; None where the model was not found.
        rollout: the rollout engines; None where the model was not found, on a CPU, and for the light rollout.
        host_bytes_per_node: of a node's memory, for offloaded states.
        accelerator_bytes: memory of one accelerator, as the user gave it.
        on_cpu: whether the run trains on a CPU.
        mask: which tokens are trained on, in words.
        notes: what the numbers leave out.
    """

    command: str
    problems: list[Problem] = field(default_factory=list)
    model: ModelSummary | None = None
    layout: Layout | None = None
    step: Step | None = None
    phases: list[Phase] = field(default_factory=list)
    head: Logits | None = None
    rollout: Engines | None = None
    host_bytes_per_node: int = 0
    accelerator_bytes: int = 0
    on_cpu: bool = False
    mask: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def errors(self) -> list[Problem]:
        """The problems that would stop the run."""
        return [problem for problem in self.problems if problem.fatal]

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program. A part that is not known is empty."""
        known = {name: {} if part is None else part for name, part in asdict(self).items()}
        if self.layout is not None:
            known["layout"]["data_parallel"] = self.layout.data_parallel
        for phase, of_phase in zip(self.phases, known["phases"], strict=True):
            of_phase["total"] = phase.total
        return {"runs": not self.errors, **known}


def make_plan(
    overrides: list[str],
    config_name: str = "ppo_trainer",
    model_config: str | None = None,
    gpu_memory_gib: float = 80.0,
    config_dir: str | None = None,
    flash_attention: bool = True,
) -> Plan:
    """Compose, check and add up.

    Args:
        overrides: what follows ``python -m verl.trainer.main_ppo``.
        config_name: verl's config.
        model_config: a ``config.json`` or a built-in shape, where the model is not on this machine.
        gpu_memory_gib: memory of one accelerator.
        config_dir: main_ppo's ``--config-dir``.
        flash_attention: whether flash-attn is installed where it runs. verl then takes its cross entropy, which works
            in place on the logits, with whatever attention the model has.

    Raises:
        EntropyForkError: no config can be composed, whatever is left out of the line.
    """
    composed = compose_most(overrides, config_name, config_dir)
    config = composed.config
    plan = Plan(command=" ".join(overrides), accelerator_bytes=round(gpu_memory_gib * GIB))
    plan.problems += [Problem(problem, AT_START) for problem in composed.problems]
    with task("checks of the launcher, and of the data"):
        plan.problems += what_the_launcher_says(config)
    try:
        resolve(config)
    except EntropyForkError as error:  # verl resolves in the TaskRunner
        plan.problems.append(Problem(str(error), IN_RAY))
        return plan
    try:
        run = read_run_shape(config)
    except UnreadableConfig as error:
        known = [problem.message for problem in plan.problems]
        plan.problems += [Problem(complaint) for complaint in error.complaints if complaint not in known]
        return plan
    if not flash_attention:
        run = replace(run, head=replace(run.head, in_place_loss=False))
    model = _find_model(plan, run.model, model_config)
    plan.problems += find_problems(run, model)
    known = [problem.message for problem in plan.problems]
    unguarded = find_unguarded_data_problems(config)
    plan.problems += [problem for problem in unguarded if not is_said(problem.message, known)]
    plan.layout, plan.step, plan.mask = run.layout, count_step(run), mask_in_words(config)
    if model is None:
        return plan
    totals = add_up(run, model, plan.step, plan.accelerator_bytes)
    plan.model, plan.phases, plan.head, plan.rollout = totals.model, totals.phases, totals.head, totals.rollout
    plan.host_bytes_per_node = totals.host_bytes_per_node
    plan.on_cpu = run.machines.on_cpu
    plan.problems += check_fit(run, model, totals, plan.accelerator_bytes)
    plan.notes = notes_on(run, model)
    return plan


def _find_model(plan: Plan, model: Model, model_config: str | None) -> ModelShape | None:
    """The model's sizes; None, and a problem in the plan, where they are not found."""
    try:
        return find_model_shape(model.path, model_config, model.trusts_its_code)
    except EntropyForkError as error:
        plan.problems.append(Problem(str(error), "" if model_config else IN_MODEL))
        return None


def mask_in_words(config: DictConfig) -> str:
    """Which tokens the run would be trained on, a sentence."""
    try:
        fork_config = read_config(config)
        if fork_config is None:
            return "No mask: all response tokens are trained on (verl as it is)."
        return fork_config.rule(config.actor_rollout_ref.actor.loss_agg_mode).describe()
    except (EntropyForkError, ValueError) as error:
        return str(error)
