"""Keys that verl counts with: a value such as ``64.0`` or ``20k`` raises deep in a worker."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from entropy_fork.common.problem import IN_RAY, Problem

ROLLOUT, ACTOR = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"

#: keys that must be whole numbers, with their least value. ``64.0`` is not one: verl makes ranges and slices of them.
COUNTS: dict[str, int] = {
    "data.train_batch_size": 1,
    "data.gen_batch_size": 1,
    "data.max_prompt_length": 1,
    "data.max_response_length": 1,
    f"{ACTOR}.ppo_mini_batch_size": 1,
    f"{ACTOR}.ppo_epochs": 0,
    f"{ROLLOUT}.n": 1,
    f"{ROLLOUT}.val_kwargs.n": 1,
    f"{ROLLOUT}.tensor_model_parallel_size": 1,
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 1,
}

#: keys that must be whole numbers, and for which ``85.0`` does as well
NUMBERS: dict[str, int] = {
    "data.train_max_samples": -1,
    "data.val_max_samples": -1,
    "trainer.total_epochs": 0,
    "trainer.total_training_steps": 1,
    "trainer.save_freq": -1,
    "trainer.test_freq": -1,
    f"{ACTOR}.ppo_max_token_len_per_gpu": 1,
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": 1,
}


def check_numbers(config: DictConfig) -> Iterator[Problem]:
    """Each key that must be a whole number is one. A key that copies another is left out: the other one is named."""
    for key, least in {**COUNTS, **NUMBERS}.items():
        group, _, name = key.rpartition(".")
        node = OmegaConf.select(config, group, default=None)
        if not isinstance(node, DictConfig) or name not in node or OmegaConf.is_missing(node, name):
            continue
        if OmegaConf.is_interpolation(node, name) or node[name] is None:
            continue
        if complaint := complaint_about(key, node[name], least, exact=key in COUNTS):
            yield Problem(complaint, IN_RAY)


def complaint_about(key: str, value: Any, least: int | None = None, exact: bool = False) -> str | None:
    """What is wrong with a value that must be a whole number, and what to write; None where nothing is.

    Args:
        key: the dotted key.
        value: as the config has it.
        least: the least value that makes sense.
        exact: whether a number such as ``64.0`` is wrong too.
    """
    if isinstance(value, float) and value.is_integer() and (least is None or value >= least):
        return f"{key}={value} is not a whole number. Write {key}={int(value)}." if exact else None
    if isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least):
        return None
    kind = "a whole number" if least is None else f"a whole number of at least {least}"
    way = f"{key}={'NUMBER' if least is None else f'{least} or more'}"
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+)\s*k", value.strip(), re.IGNORECASE)):
        way = f"{key}={int(match[1]) * 1024} or {key}={int(match[1]) * 1000}"
    return f"{key}={value} is not {kind}. Write {way}."
