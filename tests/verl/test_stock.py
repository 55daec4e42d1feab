"""If the package is installed but not asked for, main_ppo prints and does exactly what it does without the package."""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.places import PYTHONPATH, TESTS
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config

WHOLE = (
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.model.path=some/model",
    "actor_rollout_ref.actor.use_dynamic_bsz=true",
    "algorithm.adv_estimator=grpo",
    "data.train_files=train.parquet",
    "data.val_files=test.parquet",
)
FOLDER = ("--config-dir", "own")  # files that own_folder() writes

CUSTOM = ("data.custom_cls.path=mine.py", "data.custom_cls.name=Mine")
REWARD = ("+reward.reward_kwargs.top_ratio=0.2", "+reward.reward_kwargs.entropy_top_ratio=0.3")
ELSEWHERE = ("+data.top_ratio=0.2", "+trainer.recipe=dapo", "+data.template=paper")
NODES = ("+cluster.name=node_8", "+recipe.version=2", "+template.name=chat")
CRITIC = ("algorithm.adv_estimator=gae", "critic.model.path=own/model", "critic.use_dynamic_bsz=true")
ONE_ANSWER = ("algorithm.adv_estimator=reward_to_go_leave_one_out", "actor_rollout_ref.rollout.n=1")
MANAGER = "+actor_rollout_ref.rollout.agent.agent_loop_manager_class=mine.Manager"
RESUME = ("trainer.resume_mode=resume_path", "trainer.resume_from_path=global_step_1")
UNEVEN = ("actor_rollout_ref.actor.use_dynamic_bsz=false", "data.train_batch_size=3")

#: name, command line, and whether stock verl accepts it
LINES: list[tuple[str, tuple[str, ...], bool]] = [
    ("plain", WHOLE, True),
    ("critic", (*WHOLE, *CRITIC), True),
    ("kl loss", (*WHOLE, "actor_rollout_ref.actor.use_kl_loss=true", "algorithm.use_kl_in_reward=true"), True),
    ("own data set, no validation file", (*WHOLE, *CUSTOM, "data.val_files=null"), True),
    ("no validation file", (*WHOLE, "data.val_files=null"), True),
    ("no files at all", (*WHOLE, "data.train_files=null", "data.val_files=null"), True),
    ("no model", (*WHOLE, "actor_rollout_ref.model.path=null"), True),
    ("own reward keys", (*WHOLE, *REWARD), True),
    ("own keys called as ours elsewhere", (*WHOLE, *ELSEWHERE), True),
    ("own nodes called as our groups", (*WHOLE, *NODES), True),
    ("own root keys in a file", (*FOLDER, *WHOLE, "+mine=keys"), True),
    ("own groups called as ours", (*FOLDER, *WHOLE, "+cluster=cpu", "+recipe=dapo"), True),
    ("legacy trainer", (*WHOLE, "trainer.use_v1=false"), True),
    ("reinforce++", (*WHOLE, "algorithm.adv_estimator=reinforce_plus_plus"), True),
    ("rloo", (*WHOLE, "algorithm.adv_estimator=rloo", "actor_rollout_ref.rollout.n=4"), True),
    ("megatron", ("--config-name=ppo_megatron_trainer", *WHOLE), True),
    ("dynamic sampling", (*WHOLE, "algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=acc"), True),
    ("rollout correction", (*WHOLE, "algorithm.rollout_correction.rollout_is=token"), True),
    ("bypass mode", (*WHOLE, "algorithm.rollout_correction.bypass_mode=true"), True),
    ("a loss that cannot be masked", (*WHOLE, "actor_rollout_ref.actor.policy_loss.loss_mode=geo_mean"), True),
    ("own loss", (*WHOLE, "actor_rollout_ref.actor.policy_loss.loss_mode=mine"), True),
    (
        "own loss under a name of ours",
        (*WHOLE, "actor_rollout_ref.actor.policy_loss.loss_mode=reinforce", "actor_rollout_ref.actor.ppo_epochs=2"),
        True,
    ),
    ("own estimator", (*WHOLE, "algorithm.adv_estimator=mine"), True),
    ("own estimators under names of ours", (*WHOLE, "algorithm.adv_estimator=q_value"), True),
    ("one answer", (*WHOLE, *ONE_ANSWER), True),
    ("own trainer", (*WHOLE, "trainer.v1.trainer_mode=mine"), True),
    ("asynchronous", (*WHOLE, "trainer.v1.trainer_mode=separate_async"), True),
    ("distillation", (*WHOLE, "distillation.enabled=true"), True),
    ("shuffled", (*WHOLE, "actor_rollout_ref.actor.shuffle=true"), True),
    ("own agent loop manager", (*WHOLE, MANAGER), True),
    ("a checkpoint to go on from", (*WHOLE, *RESUME), True),
    ("no rollout", WHOLE[1:], True),
    ("no batch size", (*WHOLE[:2], *WHOLE[3:]), False),
    ("a batch that does not divide", (*WHOLE, *UNEVEN), False),
    ("a mistyped key", (*WHOLE, "trainer.nodes=2"), False),
    ("a mistyped group", (*WHOLE, "actor@actor_rollout_ref.actor=nothing"), False),
    ("an unknown key of the actor", (*WHOLE, "+actor_rollout_ref.actor.mine=1"), False),
]  # fmt: skip

#: the same line with `off` and without it
OFF = (*WHOLE, "+entropy_fork=off")


def own_folder(folder: Path) -> None:
    """A user's own config groups, some with the names of ours, with options that have the names of ours."""
    for name, text in {
        "mine/keys.yaml": "# @package _global_\nrecipe: mine\ncluster: node_8\ntemplate: paper\n",
        "cluster/cpu.yaml": "# @package _global_\ntrainer:\n  nnodes: 3\n",
        "recipe/dapo.yaml": "# @package _global_\ndata:\n  val_files: null\n",
    }.items():
        file = folder / "own" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    alphabet = models.BPE(vocab={letter: number for number, letter in enumerate("abc")}, merges=[])
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(alphabet)).save_pretrained(folder / "own" / "model")
    Qwen3Config(architectures=["Qwen3ForCausalLM"], num_hidden_layers=1).save_pretrained(folder / "own" / "model")


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What main_ppo says about all lines, in one process with the plugin and in one without."""
    folder = tmp_path_factory.mktemp("stock")
    own_folder(folder)
    found = {}
    for side, plugins in (("installed", "auto"), ("none", "none")):
        lines = [words for _, words, _ in LINES] + ([OFF] if side == "installed" else [])
        child = subprocess.run(
            [sys.executable, str(TESTS / "helpers" / "stock_lines.py"), json.dumps(lines)],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONWARNINGS": "ignore",
                "VERL_PLATFORM": "",
                "VERL_USE_EXTERNAL_PLUGINS": plugins,
                "VERL_USE_EXTERNAL_MODULES": "helpers.own_algorithms",
                "PYTHONPATH": PYTHONPATH,
            },
            capture_output=True,
            text=True,
            timeout=550,
        )
        (line,) = [line for line in child.stderr.splitlines() if line.startswith("VERDICTS ")] or [child.stderr[-3000:]]
        result = json.loads(line.removeprefix("VERDICTS "))
        assert result["active"] == (side == "installed")
        names = [name for name, _, _ in LINES] + ["off"]
        found[side] = dict(zip(names, result["verdicts"], strict=False))
    return found


@pytest.mark.parametrize(
    ("name", "taken"), [(name, taken) for name, _, taken in LINES], ids=[line[0] for line in LINES]
)
def test_a_line_that_names_nothing_of_ours(verdicts: dict[str, dict[str, Any]], name: str, taken: bool) -> None:
    installed, stock = verdicts["installed"][name], verdicts["none"][name]
    if "message" in installed:  # if Hydra does not find a group, it lists where it has searched
        installed["message"] = re.sub(r"\n\tprovider=entropy-fork, path=\S+", "", installed["message"])
    assert ("config" in stock) == taken, stock
    assert installed.get("message") == stock.get("message")
    texts = [verdict.get("config", "").splitlines() for verdict in (stock, installed)]
    assert list(difflib.unified_diff(*texts, lineterm="", n=0)) == []
    assert installed == stock


def test_estimators_of_the_users_own_stay_theirs(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """verl refuses a second estimator with the same name. This runs in the trainer's process, where ours register."""
    script = """
import verl.trainer.ppo.v1
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY
for name in ("mine", "q_value", "reward_to_go_leave_one_out", "td_residual"):
    print(ADV_ESTIMATOR_REGISTRY[name].__module__)
"""
    environment = {"VERL_USE_EXTERNAL_MODULES": "helpers.own_algorithms", "PYTHONPATH": PYTHONPATH}
    child = python("-c", script, VERL_PLATFORM="", **environment)
    assert child.stdout.split()[-4:] == ["helpers.own_algorithms"] * 3 + ["entropy_fork.verl.advantages"], child.stderr[
        -3000:
    ]


def test_off_is_the_node_and_nothing_else(verdicts: dict[str, dict[str, Any]]) -> None:
    off, stock = (yaml.safe_load(verdicts["installed"][name]["config"]) for name in ("off", "plain"))
    assert off.pop("entropy_fork")["enabled"] is False
    assert off == stock
    assert verdicts["installed"]["off"]["runner"] == verdicts["installed"]["plain"]["runner"]


def test_a_program_pickles_what_it_imports_of_verl(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Ray sends a task runner of ``__main__`` by value, with the functions of verl that it calls."""
    script = """
import inspect, pickle
import cloudpickle
from verl.trainer.main_ppo import run_ppo
from verl.utils.config import validate_config

class TaskRunner:
    def run(self, config):
        validate_config(config, False, False)
        run_ppo(config, TaskRunner)

for function in (run_ppo, validate_config):
    assert pickle.loads(pickle.dumps(function)) is function
    print(function.__module__, inspect.signature(function))
cloudpickle.dumps(TaskRunner)
"""
    said = [python("-c", script, VERL_PLATFORM="", VERL_USE_EXTERNAL_PLUGINS=plugins) for plugins in ("auto", "none")]
    assert [child.returncode for child in said] == [0, 0], said[0].stderr[-3000:]
    assert said[0].stdout == said[1].stdout


@pytest.mark.parametrize("plugins", ["auto", "another"])
def test_a_program_that_only_composes_a_config(
    python: Callable[..., subprocess.CompletedProcess[str]], plugins: str
) -> None:
    """It has its own arguments (``-c`` is ``--cfg`` for Hydra), and may compose a thousand configs."""
    script = """
import argparse, pickle
import verl
from hydra import compose, initialize_config_dir
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra_plugins.entropy_fork import EntropyForkSearchPath
parser = argparse.ArgumentParser()
parser.add_argument("-c")
file = parser.parse_args().c
with initialize_config_dir(verl.__path__[0] + "/trainer/config", version_base=None):
    config = compose("ppo_trainer")
for _ in range(1100):  # what Hydra does at each start
    EntropyForkSearchPath().manipulate_search_path(ConfigSearchPathImpl())
pickle.dumps(config)
print("COMPOSED", file)
"""
    composed = python("-c", script, "-c", "mine.yaml", VERL_PLATFORM="", VERL_USE_EXTERNAL_PLUGINS=plugins)
    assert "COMPOSED mine.yaml" in composed.stdout, composed.stderr[-3000:]
