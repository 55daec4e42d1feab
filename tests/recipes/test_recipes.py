"""The paper's runs: every recipe has the values of the paper's table, and passes all checks on every cluster."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from transformers import PreTrainedTokenizerFast

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.recipes import preset_names, recipes_dir
from entropy_fork.verl.checks import check_before_training, check_complete
from entropy_fork.verl.config import selection_name

RECIPES = [f"qwen3_{size}_{length}" for length in ("20k", "29k") for size in ("8b", "14b", "32b")]
PRESETS = ["official", "global", "off", "bottom80", "random20"]
CLUSTERS = ["paper_16x8", "node_8", "megatron", "cpu_smoke"]
PAIRS = [(recipe, cluster) for recipe in RECIPES for cluster in CLUSTERS]
PAIRS += [(recipe, "small_4") for recipe in RECIPES if "_8b_" in recipe]

RESPONSE_LENGTH = {"20k": 20480, "29k": 29696}
BASE_MODEL = {"8b": "Qwen/Qwen3-8B-Base", "14b": "Qwen/Qwen3-14B-Base"}

#: the paper's hyper-parameters; if the paper gives none, those of the authors' script
TABLE = {
    "algorithm.adv_estimator": "grpo",
    "algorithm.use_kl_in_reward": False,
    "algorithm.filter_groups.enable": True,
    "algorithm.filter_groups.metric": "acc",
    "algorithm.filter_groups.max_inflight_gen_batches": 3,
    "data.train_batch_size": 512,
    "data.max_prompt_length": 2048,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 32,
    "actor_rollout_ref.actor.ppo_epochs": 1,
    "actor_rollout_ref.actor.clip_ratio_low": 0.2,
    "actor_rollout_ref.actor.clip_ratio_high": 0.28,
    "actor_rollout_ref.actor.clip_ratio_c": 10.0,
    "actor_rollout_ref.actor.policy_loss.loss_mode": "vanilla",
    "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
    "actor_rollout_ref.actor.entropy_coeff": 0,
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.optim.lr": 1e-6,
    "actor_rollout_ref.actor.optim.lr_warmup_steps": 0,
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": 0.0,
    "actor_rollout_ref.actor.optim.weight_decay": 0.1,
    "actor_rollout_ref.actor.optim.clip_grad": 1.0,
    "actor_rollout_ref.rollout.n": 16,
    "actor_rollout_ref.rollout.temperature": 1.0,
    "actor_rollout_ref.rollout.top_p": 1.0,
    "actor_rollout_ref.rollout.top_k": -1,
    "actor_rollout_ref.rollout.val_kwargs.do_sample": True,
    "actor_rollout_ref.rollout.val_kwargs.n": 16,
    "actor_rollout_ref.rollout.val_kwargs.temperature": 1.0,
    "actor_rollout_ref.rollout.val_kwargs.top_p": 0.7,
    "reward.reward_manager.name": "dapo",
    "reward.custom_reward_function.path": "pkg://entropy_fork.reward",
    "reward.reward_kwargs.overlong_buffer_cfg.enable": True,
    "reward.reward_kwargs.overlong_buffer_cfg.len": 4096,
    "reward.reward_kwargs.overlong_buffer_cfg.penalty_factor": 1.0,
    "trainer.test_freq": 5,
    "trainer.save_freq": 5,
    "trainer.total_training_steps": 85,
    "entropy_fork.enabled": True,
    "entropy_fork.top_ratio": 0.2,
    "entropy_fork.select": "top",
    "entropy_fork.entropy": "current",
    "entropy_fork.pool": "micro_batch",
    "entropy_fork.denominator": "kept",
}

#: the keys that keep their values when a recipe is shrunk
ALGORITHM = [
    key
    for key in TABLE
    if key.startswith(("algorithm.", "actor_rollout_ref.actor.", "reward.", "entropy_fork."))
    and not key.endswith(("ppo_mini_batch_size", "optim.lr", "overlong_buffer_cfg.len"))
]


@functools.cache
def composed(*overrides: str) -> Any:
    """verl's config as main_ppo composes it. That takes half a second, so each config is made once."""
    import verl.trainer.main_ppo as main_ppo

    with initialize_config_dir(str(Path(main_ppo.__file__).parent / "config"), version_base=None):
        return hydra_compose("ppo_trainer", overrides=list(overrides))


@functools.cache
def recipe_on(recipe: str, cluster: str) -> Any:
    return composed(f"+recipe={recipe}", f"+cluster={cluster}")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    row = {
        "prompt": [{"role": "user", "content": "1+1"}],
        "data_source": "x",
        "reward_model": {"style": "rule", "ground_truth": "2"},
    }
    for name in ("train", "test"):
        pq.write_table(pa.Table.from_pylist([row]), folder / f"{name}.parquet")
    return folder


def complete(recipe: str, cluster: str, data: Path) -> Any:
    """A new config, with every key that the command line must set."""
    config = copy.deepcopy(recipe_on(recipe, cluster))
    with open_dict(config):
        config.data.train_files, config.data.val_files = (str(data / f"{name}.parquet") for name in ("train", "test"))
        config.actor_rollout_ref.model.path = config.actor_rollout_ref.model.path or "MERGED"
    return config


@pytest.mark.parametrize(("recipe", "cluster"), [pair for pair in PAIRS if pair[1] != "cpu_smoke"])
def test_a_recipe_is_the_papers_run_on_every_cluster(recipe: str, cluster: str) -> None:
    """No cluster changes what is trained. Only LoRA has another learning rate."""
    config = recipe_on(recipe, cluster)
    wanted = dict(TABLE)
    if cluster == "small_4":
        wanted["actor_rollout_ref.actor.optim.lr"] = 1e-5
    assert {key: OmegaConf.select(config, key) for key in wanted} == wanted

    assert config.data.train_batch_size // config.actor_rollout_ref.actor.ppo_mini_batch_size == 16
    _, size, length = recipe.split("_")
    assert config.data.max_response_length == RESPONSE_LENGTH[length]
    assert config.reward.reward_kwargs.max_resp_len == RESPONSE_LENGTH[length]
    model = None if length == "29k" else BASE_MODEL.get(size)
    assert config.actor_rollout_ref.model.path == model
    assert config.data.train_files is config.data.val_files is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_smallest_cluster_shrinks_sizes_and_leaves_the_algorithm(recipe: str) -> None:
    large, small = recipe_on(recipe, "paper_16x8"), recipe_on(recipe, "cpu_smoke")
    assert {key: OmegaConf.select(small, key) for key in ALGORITHM} == {key: TABLE[key] for key in ALGORITHM}
    template = "actor_rollout_ref.model.custom_chat_template"
    assert OmegaConf.select(small, template) == OmegaConf.select(large, template)
    assert small.data.max_response_length == small.reward.reward_kwargs.max_resp_len == 48
    assert small.data.train_batch_size == 2 * small.actor_rollout_ref.actor.ppo_mini_batch_size == 8
    assert small.actor_rollout_ref.rollout.name == "transformers"


@pytest.mark.parametrize(("recipe", "cluster"), PAIRS)
def test_a_recipe_passes_all_checks_on_every_cluster_with_every_preset(recipe: str, cluster: str, data: Path) -> None:
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    config = complete(recipe, cluster, data)
    check_complete(config)
    # verl's own function, without what this package adds for this machine (a CPU)
    validate_config.__wrapped__(config, need_reference_policy(config), need_critic(config))
    assert not need_reference_policy(config)
    assert not need_critic(config)
    # Convert the config as verl's workers do. There, an unknown key would end the run minutes later.
    for node in (config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.algorithm):
        omega_conf_to_dataclass(node)

    for preset in PRESETS:
        with open_dict(config):
            config.entropy_fork = copy.deepcopy(composed(f"+entropy_fork={preset}").entropy_fork)
        if (cluster, preset) == ("megatron", "official"):
            with pytest.raises(EntropyForkError, match=r"actor.strategy=megatron.*entropy_fork=global"):
                check_before_training(config)
        else:
            check_before_training(config)


@pytest.mark.parametrize(("recipe", "cluster"), PAIRS)
def test_batches_divide_and_the_longest_sequence_fits(recipe: str, cluster: str) -> None:
    """verl would notice this only in a worker."""
    config = recipe_on(recipe, cluster)
    actor, rollout, trainer = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.trainer
    num_gpus = trainer.nnodes * trainer.n_gpus_per_node
    megatron = actor.strategy == "megatron"
    one_model = actor.megatron.tensor_model_parallel_size if megatron else actor.ulysses_sequence_parallel_size
    assert num_gpus % one_model == 0
    assert actor.ppo_mini_batch_size * rollout.n % (num_gpus // one_model) == 0
    assert trainer.n_gpus_per_node % rollout.tensor_model_parallel_size == 0
    # attention heads of Qwen3's 8B, 14B and 32B, and their 8 key-value heads
    assert all(
        heads % split == 0 for heads in (32, 40, 64, 8) for split in (one_model, rollout.tensor_model_parallel_size)
    )

    longest = config.data.max_prompt_length + config.data.max_response_length
    tokens_per_micro_batch = actor.ppo_max_token_len_per_gpu * (1 if megatron else one_model)
    assert tokens_per_micro_batch >= longest
    assert rollout.log_prob_max_token_len_per_gpu == actor.ppo_max_token_len_per_gpu
    assert longest <= 32768  # the positions of Qwen3's base models


def test_all_that_ships_is_tested_here() -> None:
    assert set(preset_names("recipe")) == {*RECIPES, "dapo", "demo_cpu", "ladder_cpu", "smollm2_cpu", "sorting_cpu"}
    assert set(preset_names("cluster")) == {*CLUSTERS, "small_4", "cpu", "gpu_light"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_what_it_runs_and_how(recipe: str) -> None:
    comment = "\n".join(
        line for line in (recipes_dir() / "recipe" / f"{recipe}.yaml").read_text().splitlines() if line.startswith("#")
    )
    for word in (f"main_ppo +recipe={recipe} +cluster=paper_16x8", "data.train_files=", "GPUs", "memory", "paper  "):
        assert word in comment


def test_what_is_missing_is_said_with_what_to_write() -> None:
    with pytest.raises(EntropyForkError) as error:
        check_complete(composed("+recipe=qwen3_32b_29k"))
    for word in (
        "data.train_files=FILE",
        "data.val_files=FILE",
        "actor_rollout_ref.model.path=MODEL",
        "+cluster=NAME",
        "paper_16x8",
    ):
        assert word in str(error.value)
    # no longer missing once a cluster is named
    with pytest.raises(EntropyForkError) as error:
        check_complete(recipe_on("qwen3_8b_20k", "node_8"))
    assert "+cluster" not in str(error.value)
    assert "model.path" not in str(error.value)


def test_a_cluster_before_its_recipe_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Hydra the recipe would undo it. A config that was not composed by a Hydra application has no order."""
    config = complete("qwen3_8b_20k", "node_8", data)
    check_complete(config)

    def application(*task: str) -> SimpleNamespace:
        return SimpleNamespace(overrides=SimpleNamespace(task=list(task)))

    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: application("+recipe=qwen3_8b_20k", "x=1", "+cluster=node_8"))
    check_complete(config)
    monkeypatch.setattr(HydraConfig, "get", lambda: application("+cluster=node_8", "x=1", "+recipe=qwen3_8b_20k"))
    with pytest.raises(EntropyForkError, match=r"Write \+recipe=… \+cluster=…"):
        check_complete(config)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["+entropy_fork=off"], "off"),
        ([], "off"),
        (["+entropy_fork=global"], "top0.2"),
        (["+entropy_fork=global", "entropy_fork.top_ratio=0.05"], "top0.05"),
        (["+entropy_fork=official"], "top0.2-current-micro_batch"),
        (["+entropy_fork=paper_v1"], "top0.2-current-micro_batch-all"),
        (["+entropy_fork=bottom80"], "bottom0.8"),
        (["+entropy_fork=random20", "entropy_fork.seed=3"], "random0.2-seed3"),
    ],
)
def test_runs_that_select_differently_have_different_names(overrides: list[str], name: str) -> None:
    assert selection_name(composed(*overrides)) == name


def test_a_baseline_does_not_resume_from_the_masked_run() -> None:
    """verl resumes from any checkpoint in the folder of the run's name."""
    masked, baseline = recipe_on("qwen3_8b_20k", "node_8"), composed("+recipe=qwen3_8b_20k", "entropy_fork=off")
    assert masked.trainer.default_local_dir.endswith("/qwen3_8b_20k-top0.2-current-micro_batch")
    assert baseline.trainer.default_local_dir.endswith("/qwen3_8b_20k-off")


# --- the prompt -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_prompt_is_the_papers(recipe: str, tokenizer: PreTrainedTokenizerFast) -> None:
    template = recipe_on(recipe, "paper_16x8").actor_rollout_ref.model.custom_chat_template
    question = "What is 1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}."
    prompt = [{"role": "user", "content": question}]
    render = functools.partial(tokenizer.apply_chat_template, chat_template=template, tokenize=False)
    assert render(prompt, add_generation_prompt=True) == (
        "User:\nWhat is 1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}.\n\nAssistant:\n"
    )
    answered = render([*prompt, {"role": "assistant", "content": "2"}])
    assert answered.endswith("\n\nAssistant:\n2<|endoftext|>")


def test_verl_asks_for_the_prompt_in_this_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """verl's trainer and agent loops give this key to their tokenizer."""
    from transformers import Qwen3Config
    from verl.utils.config import omega_conf_to_dataclass

    tokenizer.save_pretrained(tmp_path)
    Qwen3Config(architectures=["Qwen3ForCausalLM"], num_hidden_layers=1).save_pretrained(tmp_path)
    node = copy.deepcopy(recipe_on("qwen3_8b_20k", "cpu_smoke").actor_rollout_ref.model)
    node.path = str(tmp_path)
    model = omega_conf_to_dataclass(node)
    assert model.tokenizer.chat_template == node.custom_chat_template
    assert model.hf_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_another_template_on_the_command_line() -> None:
    assert composed("+recipe=qwen3_8b_20k", "template=chat").actor_rollout_ref.model.custom_chat_template is None
