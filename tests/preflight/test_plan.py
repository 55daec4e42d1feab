"""entropy-fork plan: each error that verl would raise late, the numbers of a known case, and the command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from entropy_fork.cli import app
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.preflight.compose import compose
from entropy_fork.preflight.memory import GIB
from entropy_fork.preflight.plan import Plan, make_plan
from entropy_fork.verl import plugin

MakePlan = Callable[..., Plan]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakePlan:
    """Plan a run of the authors' size on 128 GPUs that has no errors, with further overrides."""
    monkeypatch.setattr(plugin, "ON_CPU", False)  # tests run on a CPU, plans are for clusters
    row = {"prompt": [{"role": "user", "content": "1+1"}], "data_source": "x", "reward_model": {"ground_truth": "2"}}
    pq.write_table(pa.Table.from_pylist([row] * 600), tmp_path / "data.parquet")

    def make(*overrides: str, **options: Any) -> Plan:
        base = [
            "+entropy_fork=global", "algorithm.adv_estimator=grpo", "actor_rollout_ref.model.path=Qwen/Qwen3-14B-Base",
            *[f"data.{split}_files={tmp_path / 'data.parquet'}" for split in ("train", "val")],
            "data.train_batch_size=512", "data.max_prompt_length=2048", "data.max_response_length=20480",
            "trainer.nnodes=16", "trainer.n_gpus_per_node=8",
            "actor_rollout_ref.actor.strategy=fsdp2", "actor_rollout_ref.actor.ppo_mini_batch_size=32",
            "actor_rollout_ref.actor.use_dynamic_bsz=true", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=22528",
            "actor_rollout_ref.actor.ulysses_sequence_parallel_size=8",
            "actor_rollout_ref.actor.fsdp_config.param_offload=true",
            "actor_rollout_ref.actor.fsdp_config.optimizer_offload=true",
            "actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.rollout.n=16",
            "actor_rollout_ref.rollout.tensor_model_parallel_size=4",
            "actor_rollout_ref.rollout.gpu_memory_utilization=0.8", "trainer.logger=[console]",
            "reward.custom_reward_function.path=pkg://entropy_fork.reward",
        ]  # fmt: skip
        return make_plan([*base, *overrides], **options)

    return make


def messages(made: Plan) -> list[str]:
    return [problem.message for problem in made.errors]


def notes(made: Plan) -> list[str]:
    return [problem.message for problem in made.problems if not problem.fatal]


def test_the_authors_run_has_no_errors_and_the_numbers_of_the_paper(plan: MakePlan) -> None:
    made = plan()
    assert messages(made) == []
    assert made.model.parameters == 14_768_307_200
    assert made.layout.data_parallel == 16
    step = made.step
    assert (step.sequences, step.gradient_steps_per_batch) == (8192, 16)
    assert (step.sequences_per_gradient_step, step.sequences_per_rank_per_gradient_step) == (512, 32)
    # 32 sequences of at most 22,528 tokens on a rank, 8 of them in 8 × 22,528 tokens
    assert step.micro_batches_per_gradient_step_at_most == 4
    assert step.tokens_per_gpu_per_gradient_step_at_most == 32 * 22528 // 8
    assert step.tokens_per_gpu_per_micro_batch_at_most == 22528
    phases = {phase.name: phase for phase in made.phases}
    assert set(phases) == {"start of the rollout engine", "rollout", "old log-probs", "gradient step"}
    update = phases["gradient step"].parts
    assert update["weights"] == pytest.approx(14_768_307_200 * 4 / 128, rel=0.01)
    assert update["optimizer"] == 2 * update["weights"]
    assert made.head.gradient_step_bytes_dense == 22528 * 151936 * 2
    assert made.head.gradient_step_bytes == pytest.approx(made.head.gradient_step_bytes_dense / 5, rel=1e-3)
    assert made.head.log_prob_pass_bytes == 512 * 151936 * 8
    assert made.rollout.engines == 32
    assert made.rollout.cache_bytes_per_token == 2 * 40 * 2 * 128 * 2
    assert made.rollout.full_length_sequences_per_engine == (
        (made.rollout.share_bytes - made.rollout.weights_bytes) // (made.rollout.cache_bytes_per_token * 22528)
    )
    assert made.host_bytes_per_node == 8 * 3 * update["weights"]


ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
TWO_GPUS = ("trainer.nnodes=1", "trainer.n_gpus_per_node=2", f"{ACTOR}.ulysses_sequence_parallel_size=2",
            f"{ROLLOUT}.tensor_model_parallel_size=2")  # fmt: skip


# A: actor_rollout_ref.actor., R: actor_rollout_ref.rollout.
LATE_OR_NEVER = [
    # what verl only asserts in the first update or log-prob pass
    ("A:ppo_mini_batch_size=31 R:n=10", "310 sequences cannot be dealt to 16 .*multiple of 8"),
    ("data.max_response_length=190000", "sequence parallelism .8. = 180224 tokens cannot hold .*=24006 or more"),
    ("R:log_prob_max_token_len_per_gpu=2000", "log_prob_max_token_len_per_gpu.*=2816 or more"),
    (
        "A:use_dynamic_bsz=false A:ppo_micro_batch_size_per_gpu=5 R:log_prob_micro_batch_size_per_gpu=4",
        "ppo_micro_batch_size_per_gpu=5 does not divide the 32 sequences",
    ),
    (
        "A:use_dynamic_bsz=false A:ppo_micro_batch_size_per_gpu=4 R:log_prob_micro_batch_size_per_gpu=3",
        "log_prob_micro_batch_size_per_gpu=3 does not divide the 512 sequences",
    ),
    # … when the worker loads the model
    ("A:ulysses_sequence_parallel_size=16", "=16 does not divide the model's 40 attention heads. Write 1, 2, 4 or 8"),
    ("A:ulysses_sequence_parallel_size=5", "128 accelerators .16 × 8. cannot be cut into groups of .*=5"),
    (
        "A:ulysses_sequence_parallel_size=1 A:fsdp_config.ulysses_sequence_parallel_size=2 "
        "actor_rollout_ref.model.use_remove_padding=false",
        "needs packed sequences: write .*use_remove_padding=True",
    ),
    ("A:fsdp_config.fsdp_size=24", "cannot be cut into shards of .*fsdp_size=24. Write a divisor of 128, or -1"),
    (
        "R:log_prob_use_dynamic_bsz=false R:log_prob_micro_batch_size_per_gpu=1",
        "log_prob_use_dynamic_bsz=False must be the same",
    ),
    (
        "A:use_dynamic_bsz=false A:ppo_micro_batch_size=128 R:log_prob_micro_batch_size=128",
        "verl needs actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
    ),
    ("actor_rollout_ref.model.use_fused_kernels=true", "reads the shard. Leave use_fused_kernels out"),
    (
        "R:tensor_model_parallel_size=3",
        "128 accelerators cannot be cut into rollout engines of 3 .*Write sizes whose product divides 128",
    ),
    # … when the rollout engine starts
    ("R:tensor_model_parallel_size=16", "=16 does not divide the model's 40 attention heads"),
    (
        "R:max_model_len=40000",
        "max_model_len=40000 is more than the model's context of 32768 tokens. Write .*=32768 or less",
    ),
    ("R:max_num_batched_tokens=100", "max_num_batched_tokens .100. must be at least max_num_seqs .256.. Write .*=256"),
    ("R:gpu_memory_utilization=1.3", "gpu_memory_utilization=1.3 is not a share"),
    ("R:gpu_memory_utilization=0.08", "rollout engine's weights, 6.9 GiB on each of 4 .* share of 6.4 GiB"),
    ("R:gpu_memory_utilization=0.095", "one sequence may have 32768 .*Write .*max_model_len=22528"),
    # … after Ray is up
    (
        "trainer.v1.trainer_mode=separate_async R:nnodes=4 R:checkpoint_engine.backend=nccl",
        r"must be parameter_sync_step \(4\) × ppo_mini_batch_size \(32\) = 128. Write .*parameter_sync_step=16",
    ),
    ("trainer.v1.trainer_mode=separate_async", "nnodes=0.*Write actor_rollout_ref.rollout.nnodes=1"),
    ("trainer.v1.trainer_mode=separate_async R:nnodes=1", "backend=naive cannot"),
    ("data.train_batch_size=1024", "has 600 rows and data.train_batch_size=1024: not one batch"),
    (
        "algorithm.filter_groups.enable=true algorithm.filter_groups.metric=null",
        "needs algorithm.filter_groups.metric=acc",
    ),
    ("data.gen_batch_size=500", "data.gen_batch_size=500 must divide data.train_batch_size=512"),
    (
        "reward.reward_manager.name=dapo +reward.reward_kwargs.max_resp_len=20480 "
        "+reward.reward_kwargs.overlong_buffer_cfg={enable:true,len:30000,penalty_factor:1,log:false}",
        "0 < overlong_buffer_cfg.len .30000. ≤ reward_kwargs.max_resp_len .20480.",
    ),
    # … never
    (
        "algorithm.filter_groups.enable=true algorithm.filter_groups.metric=acc R:n=1 A:ppo_mini_batch_size=512",
        "no group would ever be kept",
    ),
    ("R:max_model_len=20000", "longer responses would be cut there without any message. Write .*=22528"),
    ("data.max_response_length=31000", "the model's context is 32768: .*max_response_length=30720"),
    ("A:ppo_mini_batch_size=1024", "fill the mini-batch with padding rows. Write .*ppo_mini_batch_size=512"),
]


@pytest.mark.parametrize(("overrides", "match"), LATE_OR_NEVER)
def test_what_verl_says_late_or_never(plan: MakePlan, overrides: str, match: str) -> None:
    written = overrides.replace("A:", f"{ACTOR}.").replace("R:", f"{ROLLOUT}.").split()
    found = messages(plan(*written))
    assert any(re.search(match, message) for message in found), found


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ([f"{ACTOR}.loss_agg_mode=mean"], "Invalid loss_agg_mode: mean"),  # verl's
        ([f"{ACTOR}.policy_loss.loss_mode=geo_mean"], "takes the logarithm of token weights"),  # ours
        (["entropy_fork.top_ratio=2"], r"top_ratio must be in \(0, 1\]"),
        (["data.train_files=/gone.parquet"], "there is no file /gone.parquet"),
        ([f"{ROLLOUT}.name=transformers"], "VERL_PLATFORM=cpu python -m"),
        (["actor_rollout_ref.model.path=/no/such/model"], "is not on this machine; write --model-config"),
    ],
)
def test_what_the_launcher_says(plan: MakePlan, overrides: list[str], match: str) -> None:
    found = messages(plan(*overrides))
    assert any(re.search(match, message) for message in found), found


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["data.train_batch_size=abc"], r"^data\.train_batch_size=abc is not a whole number of at least 1\. Write"),
        ([f"{ACTOR}.ppo_mini_batch_size=null"], r"ppo_mini_batch_size has no value, .*Write .*=1 or more"),
        ([f"{ACTOR}.ppo_mini_batch_size=0"], "ppo_mini_batch_size=0 is not a whole number of at least 1"),
        ([f"~{ROLLOUT}.n"], r"rollout\.n has no value"),
        ([f"{ROLLOUT}.n=???"], r"rollout\.n has no value"),
        ([f"{ACTOR}.use_dynamic_bsz=maybe"], r"actor\.use_dynamic_bsz=maybe is not True or False. Write .*=True or"),
        ([f"{ROLLOUT}.gpu_memory_utilization=most"], "=most is not a number. Write"),
        ([f"{ACTOR}.fsdp_config=5"], "fsdp_config=5 is not a group of keys"),
        ([f"{ACTOR}.fsdp_config.model_dtype=int3"], "model_dtype=int3 is not a dtype that verl knows. Write .*=fp32"),
        ([f"{ACTOR}.fsdp_config.fsdp_size=0"], "fsdp_size=0 is no number of accelerators. Write .*=-1"),
    ],
)
def test_a_value_that_is_missing_or_of_another_type(plan: MakePlan, overrides: list[str], match: str) -> None:
    made = plan(*overrides)
    found = messages(made)
    assert sum(bool(re.search(match, message)) for message in found) == 1, found
    empty = made.to_json()
    assert (empty["model"], empty["layout"], empty["step"], empty["head"], empty["rollout"]) == ({}, {}, {}, {}, {})


def test_all_such_values_are_named_at_once(plan: MakePlan) -> None:
    found = " ".join(messages(plan("data.train_batch_size=abc", f"{ROLLOUT}.n=null")))
    assert "data.train_batch_size=abc" in found
    assert f"{ROLLOUT}.n has no value" in found


def test_a_whole_number_may_be_written_with_a_point(plan: MakePlan) -> None:
    made = plan(f"{ACTOR}.ppo_max_token_len_per_gpu=22528.0")
    assert messages(made) == []
    assert made.to_json()["step"] == plan().to_json()["step"]


def test_the_config_is_read_in_one_place() -> None:
    """Whoever else imports DictConfig only hands it on: to the launcher's checks, to Ray, to the mask's sentence."""
    import entropy_fork.preflight

    folder = Path(entropy_fork.preflight.__path__[0])
    importing = {file.stem for file in folder.glob("*.py") if "omegaconf" in file.read_text(encoding="utf-8")}
    assert importing == {"compose", "config_values", "read_shape", "launcher", "workers", "plan"}


def test_one_error_does_not_hide_the_others(plan: MakePlan) -> None:
    found = " ".join(
        messages(
            plan(
                "data.train_files=/gone.parquet",
                f"{ACTOR}.policy_loss.loss_mode=geo_mean",
                f"{ACTOR}.ulysses_sequence_parallel_size=16",
                f"{ROLLOUT}.gpu_memory_utilization=0.08",
            )
        )
    )
    for part in ("/gone.parquet", "geo_mean", "40 attention heads", "rollout engine's weights"):
        assert part in found


@pytest.mark.parametrize(
    ("overrides", "phase", "way"),
    [
        # 14.8 billion parameters × 16 bytes on two GPUs
        (TWO_GPUS,
         "gradient step", "offload_policy=True"),
        ([f"{ACTOR}.ppo_max_token_len_per_gpu=180224", "entropy_fork=off"], "old log-probs", "with_chunking=True"),
        ([f"{ACTOR}.ppo_max_token_len_per_gpu=45056", f"{ACTOR}.entropy_from_logits_with_chunking=true",
          "actor_rollout_ref.model.enable_gradient_checkpointing=false"],
         "gradient step", "enable_gradient_checkpointing=True"),
        ([f"{ACTOR}.fsdp_config.use_no_sync_for_gradient_accumulation=true", "actor_rollout_ref.model.path=Qwen3-32B"],
         "gradient step", "use_no_sync_for_gradient_accumulation=False"),
        (["trainer.nnodes=1", f"{ACTOR}.fsdp_config.param_offload=false",
          f"{ACTOR}.fsdp_config.optimizer_offload=false"], "rollout", "lower .*gpu_memory_utilization, or offload"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error_with_a_way_out(
    plan: MakePlan, overrides: list[str], phase: str, way: str
) -> None:
    found = messages(plan(*overrides))
    assert any(re.search(rf"^{phase}: .* GiB on an accelerator of 80.0 GiB.*{way}", message) for message in found), (
        found
    )


def test_more_memory_and_lora_make_it_fit(plan: MakePlan) -> None:
    small = TWO_GPUS
    assert messages(plan(*small))
    assert messages(plan(*small, gpu_memory_gib=141)) == []
    lora = plan(*small, "actor_rollout_ref.model.lora_rank=32")
    assert messages(lora) == []
    assert lora.model.trained_parameters == 128_450_560


def test_notes_on_what_runs_but_not_as_it_was_written(plan: MakePlan) -> None:
    made = plan(
        "algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=acc",
        "algorithm.filter_groups.max_num_gen_batches=10", "data.gen_batch_size=1536", "data.train_batch_size=500",
    )  # fmt: skip
    assert messages(made) == []
    for part in ("data.gen_batch_size=1536 does nothing", "max_num_gen_batches is ignored", "spreads padding rows"):
        assert any(part in note for note in notes(made)), (part, notes(made))


def test_the_head_of_the_update_is_sparse_only_where_it_can_be(plan: MakePlan) -> None:
    assert plan().head.dense_because is None
    for override, why in (
        ("entropy_fork=off", "nothing is masked"),
        ("entropy_fork.top_ratio=1.0", "nothing is dropped"),
        ("entropy_fork=official", "selects during the update"),
        (f"{ACTOR}.use_kl_loss=true", "KL loss is of all tokens"),
        (f"{ACTOR}.policy_loss.loss_mode=gspo", "the loss gspo looks at all tokens"),
        ("entropy_fork.sparse_head=false", "sparse_head=False"),
    ):
        made = plan(override)
        assert why in made.head.dense_because
        assert made.head.gradient_step_bytes == made.head.gradient_step_bytes_dense
    # the log-prob pass of the authors' rule skips prompts all the same
    official = plan("entropy_fork=official").head
    assert official.log_prob_pass_bytes < official.log_prob_pass_bytes_dense / 10
    off = plan("entropy_fork=off").head
    assert off.log_prob_pass_bytes == off.log_prob_pass_bytes_dense


def test_megatron_through_verls_config_name() -> None:
    overrides = [
        "actor_rollout_ref.model.path=Qwen/Qwen3-14B", "actor_rollout_ref.rollout.name=vllm", "trainer.nnodes=2",
        f"{ACTOR}.use_dynamic_bsz=true", f"{ACTOR}.megatron.tensor_model_parallel_size=3",
    ]  # fmt: skip
    made = make_plan(overrides, "ppo_megatron_trainer")
    assert made.layout.strategy == "megatron"
    found = " ".join(messages(made))
    assert "tensor × pipeline × context = 3 × 1 × 1 = 3" in found
    assert "tensor_model_parallel_size=3 does not divide the model's 40 attention heads" in found


def test_a_config_that_cannot_be_composed() -> None:
    with pytest.raises(EntropyForkError, match=r"'entropy_fork.patience_s' is now 'entropy_fork_guards.patience_s'"):
        compose(["+entropy_fork=global", "entropy_fork.patience_s=9"])
    with pytest.raises(EntropyForkError, match=r"no key 'topratio'\. Did you mean top_ratio\?"):
        compose(["+entropy_fork=global", "entropy_fork.topratio=0.1"])
    with pytest.raises(EntropyForkError, match="one job of a sweep"):
        make_plan(["-m", "entropy_fork.top_ratio=0.1,0.2"])
    with pytest.raises(EntropyForkError, match=r"Available options.*demo_cpu"):
        compose(["+recipe=none_such"])


def test_the_command(tmp_path: Path) -> None:
    missing = [f"data.{split}_files=/gone.parquet" for split in ("train", "val")]
    arguments = ["plan", "+recipe=demo_cpu", *missing, "actor_rollout_ref.model.path=Qwen/Qwen3-8B"]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 1
    assert "there is no file /gone.parquet" in run.output
    assert "this would not run" in run.output
    run = CliRunner().invoke(app, [*arguments, "--json"])
    assert run.exit_code == 1
    made = json.loads(run.stdout)
    assert made["runs"] is False
    assert made["step"]["gradient_steps_per_batch"] == 2
    assert made["problems"][0]["message"].endswith("/gone.parquet")
    run = CliRunner().invoke(app, ["plan", "+recipe=demo_cpu", "+nonsense"])
    assert run.exit_code == 1
    assert "Traceback" not in run.output


def test_every_shown_number_is_in_the_json(plan: MakePlan) -> None:
    made = json.loads(json.dumps(plan().to_json()))
    assert list(made) == [
        "runs", "command", "problems", "model", "layout", "step", "phases", "head", "rollout", "host_bytes_per_node",
        "accelerator_bytes", "on_cpu", "mask", "notes",
    ]  # fmt: skip
    assert made["layout"]["data_parallel"] == 16
    assert made["step"]["tokens_per_gpu_per_micro_batch_at_most"] == 22528
    assert made["head"]["dense_because"] is None
    assert made["runs"] is True
    assert made["accelerator_bytes"] == 80 * GIB
    assert {phase["name"]: phase["total"] for phase in made["phases"]}["gradient step"] == sum(
        made["phases"][-1]["parts"].values()
    )


def test_the_light_rollout_takes_what_it_needs_and_reserves_nothing(plan: MakePlan) -> None:
    """Its weights stay on the GPU; the caches of a batch of longest answers are gone before the update."""
    light = (
        *("trainer.nnodes=1", "trainer.n_gpus_per_node=1", f"{ACTOR}.ulysses_sequence_parallel_size=1"),
        *(f"{ROLLOUT}.name=transformers", f"+{ROLLOUT}.engine_kwargs.transformers.device=cuda"),
        *(f"{ROLLOUT}.tensor_model_parallel_size=1", f"{ROLLOUT}.max_num_seqs=4"),
    )
    made = plan(*light)
    phases = {phase.name: phase.parts for phase in made.phases}
    weights = made.model.parameters * 2
    cache = 4 * made.step.longest_sequence * 2 * 40 * 8 * 128 * 2  # layers, kv heads, head size, bytes
    assert phases["rollout"]["rollout engine"] == weights + cache
    assert phases["gradient step"]["rollout engine"] == phases["old log-probs"]["rollout engine"] == weights
    assert made.rollout is None
    assert any("The light rollout reserves no memory" in note for note in made.notes)
    assert any(message.startswith("gradient step: ") for message in messages(made)), "14B do not fit one GPU"


def test_logits_without_flash_attention_take_a_copy_in_32_bits(plan: MakePlan) -> None:
    with_it, without = plan("entropy_fork=off"), plan("entropy_fork=off", flash_attention=False)
    assert with_it.head.gradient_step_bytes == 22528 * 151936 * 2
    assert without.head.gradient_step_bytes == 22528 * 151936 * (2 + 4)
    assert any("--no-flash-attention" in note for note in with_it.notes)
    assert not any("flash" in note for note in without.notes)
