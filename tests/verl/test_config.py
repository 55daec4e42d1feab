"""Bad input gets one clear message that says what to write instead, before Ray starts."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import verl
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf, open_dict

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.recipes import preset_names
from entropy_fork.verl.checks import check_before_training
from entropy_fork.verl.config import (
    MASKABLE_LOSSES,
    EntropyForkConfig,
    GuardsConfig,
    averages_by_sequence,
    read_config,
    read_guards,
    selection_name,
)

Compose = Callable[..., Any]


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    row = {
        "prompt": [{"role": "user", "content": "1+1"}],
        "data_source": "x",
        "reward_model": {"style": "rule", "ground_truth": "2"},
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "data.parquet")
    return [f"data.{split}_files={tmp_path / 'data.parquet'}" for split in ("train", "val")]


def refused(config: Any, match: str) -> None:
    with pytest.raises(EntropyForkError, match=match):
        check_before_training(config)


def test_a_good_config_passes_and_becomes_typed(compose: Compose, data: list[str]) -> None:
    config = compose("+entropy_fork=global", "entropy_fork.top_ratio=0.1", *data)
    check_before_training(config)
    assert OmegaConf.get_type(config.entropy_fork) is EntropyForkConfig
    assert read_config(config) == EntropyForkConfig(top_ratio=0.1)
    # what a TaskRunner without this package would need to import to unpickle its argument
    assert b"entropy_fork.verl.config" in pickle.dumps(config)


def test_a_node_written_by_hand_is_typed_too(compose: Compose, data: list[str]) -> None:
    config = compose("+entropy_fork.top_ratio=0.3", *data)
    check_before_training(config)
    assert read_config(config) == EntropyForkConfig(top_ratio=0.3)
    assert OmegaConf.get_type(config.entropy_fork) is EntropyForkConfig


def test_off_and_absent_mean_stock_verl(compose: Compose, data: list[str]) -> None:
    for overrides in (["+entropy_fork=off"], []):
        config = compose(*overrides, *data, "algorithm.rollout_correction.bypass_mode=true")
        check_before_training(config)
        assert read_config(config) is None


@pytest.mark.parametrize("ratio", ["0", "1.2", "-0.5", "nan"])
def test_a_ratio_out_of_range(compose: Compose, data: list[str], ratio: str) -> None:
    config = compose("+entropy_fork=global", f"entropy_fork.top_ratio={ratio}", *data)
    refused(config, r"entropy_fork: top_ratio must be in \(0, 1\].*entropy_fork=off")


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("select=upper", "select must be one of .+"),
        ("entropy=new", "entropy must be one of .+"),
        ("pool=epoch", "pool must be one of .+"),
        ("denominator=some", "denominator must be one of .+"),
        ("weight=fuzzy", "weight must be one of .+"),
        ("ties=none", "ties must be one of .+"),
        ("schedule=stairs", "schedule must be one of .+"),
        ("schedule=linear", "needs schedule_steps"),
        ("dump_every=-1", "dump_every must be a number of steps, or 0 to dump nothing, got -1"),
        ("dump_answers=0", "dump_answers must be in .1, 100000., got 0"),
    ],
)
def test_a_value_without_meaning(compose: Compose, data: list[str], override: str, match: str) -> None:
    refused(compose("+entropy_fork=global", f"entropy_fork.{override}", *data), match)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["entropy=current", "pool=batch"], "no pool=batch: the policy changes with each mini-batch.*entropy=old"),
        (["entropy=current", "select=random"], "select=random does not use entropy; write entropy=old"),
        (["select=band", "band_from=0.3"], r"band_from must be in .0, top_ratio."),
    ],
)
def test_values_that_do_not_go_together(compose: Compose, data: list[str], overrides: list[str], match: str) -> None:
    refused(compose("+entropy_fork=global", *[f"entropy_fork.{value}" for value in overrides], *data), match)


@pytest.mark.parametrize(
    "override",
    ["entropy_fork.entropy=current", "entropy_fork.pool=micro_batch", "actor_rollout_ref.actor.shuffle=true"],
)
def test_what_the_engine_selects_needs_an_engine_of_ours(compose: Compose, data: list[str], override: str) -> None:
    megatron = "actor_rollout_ref.actor.strategy=megatron"
    check_before_training(compose("+entropy_fork=global", megatron, *data))
    check_before_training(compose("+entropy_fork=global", override, *data))
    refused(
        compose("+entropy_fork=global", override, megatron, *data),
        r"works in verl's engines fsdp, fsdp2 only, and actor.strategy=megatron. Write entropy_fork.entropy=old "
        r"entropy_fork.pool=mini_batch actor_rollout_ref.actor.shuffle=False",
    )


@pytest.mark.parametrize(
    ("preset", "meaning"),
    [
        ("global", ("old", "mini_batch", "exact", "kept")),
        ("official", ("current", "micro_batch", "exact", "kept")),
        ("paper_v1", ("current", "micro_batch", "exact", "all")),
    ],
)
def test_the_presets_say_what_they_are(compose: Compose, data: list[str], preset: str, meaning: tuple) -> None:
    config = compose(f"+entropy_fork={preset}", *data)
    check_before_training(config)
    fork_config = read_config(config)
    assert fork_config is not None
    assert (fork_config.entropy, fork_config.pool, fork_config.ties, fork_config.denominator) == meaning
    assert (fork_config.top_ratio, fork_config.select, fork_config.weight) == (0.2, "top", "hard")


def test_a_schedule_that_ends_out_of_range(compose: Compose, data: list[str]) -> None:
    schedule = ["entropy_fork.schedule=linear", "entropy_fork.schedule_steps=10", "entropy_fork.final_ratio=1.5"]
    refused(compose("+entropy_fork=global", *schedule, *data), "top_ratio must be in .0, 1., got 1.5")


@pytest.mark.parametrize(("preset", "select", "ratio"), [("bottom80", "bottom", 0.8), ("random20", "random", 0.2)])
def test_the_controls(compose: Compose, data: list[str], preset: str, select: str, ratio: float) -> None:
    config = compose("+recipe=demo_cpu", f"entropy_fork={preset}", *data)
    check_before_training(config)
    fork_config = read_config(config)
    assert fork_config is not None
    assert (fork_config.select, fork_config.top_ratio) == (select, ratio)


def test_a_mistyped_key_or_value_is_refused_by_hydra_itself(compose: Compose) -> None:
    with pytest.raises(ConfigCompositionException, match="topratio"):
        compose("+entropy_fork=global", "entropy_fork.topratio=0.1")
    with pytest.raises(ConfigCompositionException, match="top_ratio"):
        compose("+entropy_fork=global", "entropy_fork.top_ratio=many")
    with pytest.raises(Exception, match=r"entropy_fork/glbal"):
        compose("+entropy_fork=glbal")


def test_a_mistyped_key_in_a_node_written_by_hand(compose: Compose, data: list[str]) -> None:
    refused(compose("+entropy_fork.topratio=0.1", *data), "bad config node 'entropy_fork'.*Known keys: .*top_ratio")


def test_a_preset_that_arrived_as_a_plain_value(compose: Compose, data: list[str]) -> None:
    config = compose(*data)
    with open_dict(config):
        config.entropy_fork = "global"
    refused(config, r"'entropy_fork: global' arrived as a plain value.*pid \d+")
    with open_dict(config):
        config.pop("entropy_fork")
        config.recipe = "demo_cpu"
    refused(config, r"'recipe: demo_cpu' arrived as a plain key.*demo_cpu")


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("trainer.use_v1=false", r"legacy one.*trainer.use_v1=True"),
        ("algorithm.rollout_correction.bypass_mode=true", r"skips the log-prob pass.*bypass_mode=False"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=geo_mean", r"loss_mode=geo_mean takes the logarithm"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=bypass_mode", r"is not known to multiply token weights"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=mine", r"Use one of vanilla, "),
        ("distillation.enabled=true", r"replaces the policy loss"),
    ],
)
def test_what_cannot_be_masked_is_refused(compose: Compose, data: list[str], override: str, match: str) -> None:
    refused(compose("+entropy_fork=global", *data, override), match)
    check_before_training(compose("+entropy_fork=off", *data, override))


@pytest.mark.parametrize(("loss", "version"), [("gspo", "0.9.0"), ("sapo", verl.__version__)])
def test_a_loss_with_a_mean_of_its_own(
    compose: Compose, data: list[str], monkeypatch: pytest.MonkeyPatch, loss: str, version: str
) -> None:
    """verl averages this loss by sequence and ignores the config, so weights for a token mean would be wrong."""
    command = ["+entropy_fork=global", *data, f"actor_rollout_ref.actor.policy_loss.loss_mode={loss}"]
    by_sequence = "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"
    monkeypatch.setattr(verl, "__version__", version)
    refused(compose(*command), f"verl {version} averages loss_mode={loss} as.*{by_sequence}")
    check_before_training(compose(*command, by_sequence))
    check_before_training(compose(*command, "entropy_fork.denominator=all"))


@pytest.mark.parametrize("loss", MASKABLE_LOSSES)
def test_which_losses_have_a_mean_of_their_own(loss: str) -> None:
    """Test verl's code itself: whether the configured mean changes the loss."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    advantages = torch.tensor([[1.0] * 4, [-3.0] * 4])
    policy = PolicyLossConfig(
        loss_mode=loss, dro_beta=0.1, clip_cov_ratio=0.5, clip_cov_lb=-1.0, clip_cov_ub=1.0, kl_cov_ratio=0.5
    )
    config = FSDPActorConfig(strategy="fsdp2", rollout_n=1, use_dynamic_bsz=True, policy_loss=policy)
    config.global_batch_info.update(dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None)
    losses = []
    for mode in ("token-mean", "seq-mean-token-mean"):
        torch.manual_seed(0)  # clip_cov clips random tokens
        losses.append(
            get_policy_loss_fn(loss)(
                old_log_prob=torch.full((2, 4), -1.0), log_prob=torch.full((2, 4), -1.1), advantages=advantages,
                response_mask=mask, loss_agg_mode=mode, config=config,
            )[0]
        )  # fmt: skip
    assert (losses[0] == losses[1]) == averages_by_sequence(loss, verl.__version__)


def test_data_files(compose: Compose, data: list[str], tmp_path: Path) -> None:
    missing = f"data.train_files={tmp_path / 'none.parquet'}"
    refused(compose("+entropy_fork_guards=on", data[1], missing), "data.train_files: there is no file .*none.parquet")

    pq.write_table(pa.table({"question": ["1+1"], "data_source": ["x"]}), tmp_path / "columns.parquet")
    columns = f"data.val_files=[{tmp_path / 'columns.parquet'}]"
    refused(
        compose("+entropy_fork_guards=on", data[0], columns),
        r"data.val_files: .*columns.parquet lacks the column\(s\) prompt, reward_model; it has data_source, question",
    )

    (tmp_path / "broken.parquet").write_bytes(b"not parquet at all")
    broken = f"data.val_files={tmp_path / 'broken.parquet'}"
    refused(compose("+entropy_fork_guards=on", data[0], broken), "broken.parquet is not a readable parquet file")

    # Without the guard nothing is checked. A user's data set class may read other columns, or no file at all, so
    # nothing is checked for it either.
    own = ["data.custom_cls.path=mine.py", "data.custom_cls.name=Mine"]
    for asked in (["+entropy_fork=global"], ["+entropy_fork=off"], ["+entropy_fork_guards=on", *own]):
        check_before_training(compose(*asked, missing, columns))
        check_before_training(compose(*asked, missing, "data.val_files=null"))


@pytest.mark.parametrize(
    ("words", "guards"),
    [
        ([], GuardsConfig(waiting=False, checkpoints=False, data_files=False)),
        (["+entropy_fork=global"], GuardsConfig(waiting=False, checkpoints=False, data_files=False)),
        (["+entropy_fork_guards=off"], GuardsConfig(waiting=False, checkpoints=False, data_files=False)),
        (["+entropy_fork_guards=on"], GuardsConfig()),
        (["+entropy_fork_guards.patience_s=7"], GuardsConfig(patience_s=7)),
        (["+recipe=demo_cpu"], GuardsConfig()),
        (
            ["+recipe=demo_cpu", "entropy_fork=off", "entropy_fork_guards.data_files=false"],
            GuardsConfig(data_files=False),
        ),
        (
            ["+recipe=qwen3_8b_20k", "entropy_fork_guards=off"],
            GuardsConfig(waiting=False, checkpoints=False, data_files=False),
        ),
    ],
)
def test_the_guards_are_a_node_of_their_own(
    compose: Compose, data: list[str], words: list[str], guards: GuardsConfig
) -> None:
    """The mask's node does not turn the guards on: a recipe does, or their own node."""
    config = compose(*words, *data)
    assert read_guards(config) == guards
    check_before_training(config)
    assert read_guards(config) == guards
    asked = any("recipe" in word or "guards" in word for word in words)
    assert ("entropy_fork_guards" in config) == asked
    assert not asked or OmegaConf.get_type(config.entropy_fork_guards) is GuardsConfig


@pytest.mark.parametrize(
    ("word", "match"),
    [
        ("+entropy_fork_guards.patience_s=-1", "patience_s must be a number of seconds, or 0 to wait for ever, got -1"),
        ("+entropy_fork_guards.patience=1", r"bad config node 'entropy_fork_guards'.*Known keys: waiting .*patience_s"),
        ("++entropy_fork_guards=1", r"'entropy_fork_guards: 1' arrived as a plain value"),
        ("+trainer.entropy_fork_guards=on", r"'trainer.entropy_fork_guards' does nothing.*at the root"),
        (
            "+entropy_fork.patience_s=9",
            r"'entropy_fork.patience_s' is now 'entropy_fork_guards.patience_s'. Write \+ent",
        ),
    ],
)
def test_a_bad_word_about_the_guards(compose: Compose, data: list[str], word: str, match: str) -> None:
    config = compose(*data, *([] if word.startswith("++") else [word]))
    if word.startswith("++"):
        with open_dict(config):
            config.entropy_fork_guards = 1
    refused(config, match)


@pytest.mark.parametrize("key", ["entropy_top_ratio", "top_entropy_quantile", "high_entropy_token_ratio", "top_ratio"])
def test_others_names_of_the_ratio_are_refused_where_they_can_only_mean_a_mask(
    compose: Compose, data: list[str], key: str
) -> None:
    """The keys of the authors, TRL and ms-swift, LightRFT: verl accepts each silently, and trains on all tokens."""
    for node in ("actor_rollout_ref.model", "actor_rollout_ref.actor", "algorithm"):
        refused(
            compose(f"+{node}.{key}=0.3", *data),
            rf"'{node}.{key}' does nothing.*Write \+entropy_fork=global or \+entropy_fork.top_ratio=0.3",
        )
    for node in ("reward.reward_kwargs", "data", "trainer", "critic", "actor_rollout_ref.model.override_config"):
        check_before_training(compose(f"+{node}.{key}=0.3", *data))


def test_presets_of_this_install() -> None:
    assert {"global", "off", "bottom80", "random20"} <= set(preset_names("entropy_fork"))
    assert {"dapo", "demo_cpu"} <= set(preset_names("recipe"))


@pytest.mark.parametrize(
    "name", [f"{group}={name}" for group in ("recipe", "cluster", "template") for name in preset_names(group)]
)
def test_recipes_name_only_keys_that_verl_has(compose: Compose, name: str) -> None:
    """A recipe can add keys: a mistyped key of verl's would be a new key, and do nothing."""
    stock = OmegaConf.to_container(compose("model_engine=megatron" if "megatron" in name else "model_engine=dp"))
    recipe = OmegaConf.to_container(compose(f"+{name}"))
    ours = {
        "entropy_fork",
        "entropy_fork_guards",
        "cpu_platform",
        "demo",
        "reward.reward_kwargs",
        "ray_kwargs.ray_init",
        "actor_rollout_ref.rollout.engine_kwargs.transformers",
    }
    if verl.__version__ == "0.9.0" and name == "recipe=ladder_cpu":  # its file says that it needs 0.9.1
        ours.add("actor_rollout_ref.actor.fsdp_config.use_no_sync_for_gradient_accumulation")
    open_by_design = {"actor_rollout_ref.model.override_config", "critic.model.override_config"}

    def unknown(stock_node: Any, node: Any, path: str) -> list[str]:
        if path in ours | open_by_design or not isinstance(node, dict):
            return []
        if not isinstance(stock_node, dict):
            return [path] if stock_node is not None else []
        return [
            found
            for key in node
            for child in [f"{path}.{key}".lstrip(".")]
            for found in (unknown(stock_node[key], node[key], child) if key in stock_node else [child])
            if found not in ours | DATACLASS_ONLY
        ]

    assert unknown(stock, recipe, "") == []


#: fields of verl's dataclasses that its YAML leaves out
DATACLASS_ONLY = {
    f"{role}.mixed_precision"
    for role in ("actor_rollout_ref.actor.fsdp_config", "actor_rollout_ref.ref.fsdp_config", "critic.fsdp")
} | {"actor_rollout_ref.rollout.enable_sleep_mode"}


def test_a_dump_of_tokens_where_there_would_be_none(compose: Compose, data: list[str]) -> None:
    """An all-token baseline is not checked for a mask, but its dump is checked."""
    off = ["+entropy_fork=off", *data, "entropy_fork.dump_every=5"]
    check_before_training(compose(*off))
    refused(compose(*off, "trainer.use_v1=false"), "dump_every=5 needs verl's V1 trainer. Write")
    refused(compose(*off, "algorithm.rollout_correction.bypass_mode=true"), "bypass_mode=True skips. Write bypass_mode")


def test_what_is_dumped_is_not_in_the_name_of_a_run(compose: Compose, data: list[str]) -> None:
    config = compose("+entropy_fork=global", "entropy_fork.dump_every=5", "entropy_fork.dump_dir=/tokens", *data)
    assert selection_name(config) == "top0.2"
