"""What would stop a run, or make another one of it, read in verl's code: said before Ray starts.

verl 0.9 checks much of its config where it is used: in a worker after the model is loaded, or in the first update,
after the first rollout. Each check below names the place. Those that verl makes at the start are verl's
(``validate_config``), and those of the mask are in ``entropy_fork/verl/config.py``; ``plan.py`` runs all three.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.preflight.memory import Layout
from entropy_fork.preflight.model_shape import ModelShape
from entropy_fork.verl.config import read_guards
from entropy_fork.verl.guards.data_files import check_data_files

ACTOR, ROLLOUT, REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        message: what is wrong and what to write instead, in one or two sentences.
        when: when the run itself would notice; empty for what it would never notice.
        fatal: False where the run goes on, but is not the one that was asked for.
    """

    message: str
    when: str = ""
    fatal: bool = True


IN_WORKER = "when the worker loads the model"
IN_UPDATE = "in the first update, after the first rollout"
IN_LOG_PROB = "in the first log-prob pass, after the first rollout"
IN_RAY = "after Ray is up"
IN_ENGINE = "when the rollout engine starts"


def find_problems(config: DictConfig, layout: Layout, model: ModelShape | None) -> list[Problem]:
    """All of them, for a composed config. Without a model, those that need none."""
    checks: list[Callable[..., Iterator[Problem]]] = [_trainer, _parallelism, _batches, _lengths, _rollout, _data]
    return [problem for check in checks for problem in check(config, layout, model)]


def _trainer(config: DictConfig, layout: Layout, model: ModelShape | None) -> Iterator[Problem]:
    mode = config.trainer.v1.trainer_mode
    train, mini = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    rollout = config.actor_rollout_ref.rollout
    groups = config.algorithm.get("filter_groups")
    filtering = bool(groups and groups.get("enable"))
    if mode == "separate_async":  # trainer_separate_async.py: __init__
        sync = config.trainer.v1.separate_async.parameter_sync_step
        if train != sync * mini:
            fits = f"trainer.v1.separate_async.parameter_sync_step={train // mini}" if train % mini == 0 else ""
            yield Problem(
                f"separate_async takes one mini-batch per update: data.train_batch_size ({train}) must be "
                f"parameter_sync_step ({sync}) × ppo_mini_batch_size ({mini}) = {sync * mini}. Write "
                + (f"{fits}, or " if fits else "")
                + f"data.train_batch_size={sync * mini}.",
                IN_RAY,
            )
        if rollout.nnodes < 1 or rollout.n_gpus_per_node < 1:
            yield Problem(
                f"separate_async has rollout engines on accelerators of their own, and {ROLLOUT}.nnodes="
                f"{rollout.nnodes}, n_gpus_per_node={rollout.n_gpus_per_node}. Write {ROLLOUT}.nnodes=1 or more.",
                IN_RAY,
            )
        if rollout.checkpoint_engine.backend == "naive":
            yield Problem(
                f"separate_async sends weights to other accelerators, and {ROLLOUT}.checkpoint_engine.backend=naive "
                f"cannot. Write {ROLLOUT}.checkpoint_engine.backend=nccl.",
                IN_RAY,
            )
    elif not config.actor_rollout_ref.get("hybrid_engine", True):
        yield Problem(
            f"actor_rollout_ref.hybrid_engine=False needs trainer.v1.trainer_mode=separate_async, and it is {mode}."
        )
    generation = config.data.get("gen_batch_size")
    exact = filtering or mode != "sync"
    if generation and not exact and train % generation:  # trainer_base.py: _next_train_batch
        yield Problem(
            f"data.gen_batch_size={generation} must divide data.train_batch_size={train}: prompts are fetched in whole "
            f"generation batches. Leave data.gen_batch_size=null, or write a divisor.",
            "in the first step",
        )
    if generation and generation != 1 and exact:  # trainer_base.py: _init_dataloader
        yield Problem(
            f"data.gen_batch_size={generation} does nothing: with dynamic sampling or an asynchronous trainer verl "
            f"fetches prompts one by one and keeps algorithm.filter_groups.max_inflight_gen_batches "
            f"({(groups or {}).get('max_inflight_gen_batches', 1)}) batches of data.train_batch_size in flight.",
            fatal=False,
        )
    if filtering:
        if not groups.get("metric"):
            yield Problem("algorithm.filter_groups.enable=True needs algorithm.filter_groups.metric=acc.", IN_RAY)
        if rollout.n < 2:
            yield Problem(
                f"dynamic sampling keeps groups with a right and a wrong answer, and {ROLLOUT}.n={rollout.n} makes "
                f"groups of one: no group would ever be kept, and the run would sample for ever. Write {ROLLOUT}.n=8.",
                "never: it goes on sampling",
            )
        if groups.get("max_num_gen_batches", 0) > 0:
            yield Problem(
                "algorithm.filter_groups.max_num_gen_batches is ignored by verl's V1 trainer; "
                "max_inflight_gen_batches bounds what is generated at once.",
                fatal=False,
            )
    overlong = OmegaConf.select(config, "reward.reward_kwargs.overlong_buffer_cfg")
    if overlong and overlong.get("enable") and config.reward.reward_manager.name == "dapo":  # reward_manager/dapo.py
        longest = OmegaConf.select(config, "reward.reward_kwargs.max_resp_len")
        if longest is None or not 0 < overlong.len <= longest:
            yield Problem(
                f"overlong shaping needs 0 < overlong_buffer_cfg.len ({overlong.len}) ≤ reward_kwargs.max_resp_len "
                f"({longest}). Write a smaller reward.reward_kwargs.overlong_buffer_cfg.len.",
                "when the reward workers start",
            )
        elif longest != config.data.max_response_length:
            yield Problem(
                f"overlong shaping ends at reward_kwargs.max_resp_len={longest}, but responses end at "
                f"data.max_response_length={config.data.max_response_length}.",
                fatal=False,
            )


def _parallelism(config: DictConfig, layout: Layout, model: ModelShape | None) -> Iterator[Problem]:
    actor = config.actor_rollout_ref.actor
    world = layout.world
    where = f"{world} accelerators ({config.trainer.nnodes} × {config.trainer.n_gpus_per_node})"
    if layout.strategy == "megatron":
        product = layout.tensor * layout.pipeline * layout.sequence
        if world % product:  # megatron.core.parallel_state
            yield Problem(
                f"{where} cannot be cut into tensor × pipeline × context = {layout.tensor} × {layout.pipeline} × "
                f"{layout.sequence} = {product}. Change these keys of {ACTOR}.megatron, or the number of accelerators.",
                IN_WORKER,
            )
        if model is not None:
            if model.heads % layout.tensor:
                yield Problem(
                    f"{ACTOR}.megatron.tensor_model_parallel_size={layout.tensor} does not divide the model's "
                    f"{model.heads} attention heads.",
                    IN_WORKER,
                )
            uneven = OmegaConf.select(actor, "megatron.override_transformer_config") or {}
            virtual = actor.megatron.virtual_pipeline_model_parallel_size or 1
            if model.layers % (layout.pipeline * virtual) and not any("pipeline" in str(key) for key in uneven):
                yield Problem(
                    f"{model.layers} layers cannot be cut into {layout.pipeline} × {virtual} pipeline stages of one "
                    f"size. Change {ACTOR}.megatron.pipeline_model_parallel_size.",
                    IN_WORKER,
                )
        return
    sp = layout.sequence
    if world % sp:  # transformer_impl.py: _init_device_mesh
        yield Problem(f"{where} cannot be cut into groups of {ACTOR}.ulysses_sequence_parallel_size={sp}.", IN_WORKER)
    if sp > 1 and not config.actor_rollout_ref.model.use_remove_padding:  # transformer_impl.py: __init__
        yield Problem(
            f"sequence parallelism ({sp}) needs packed sequences: write "
            f"actor_rollout_ref.model.use_remove_padding=True.",
            IN_WORKER,
        )
    if model is not None:  # monkey_patch.py: apply_monkey_patch
        if model.heads % sp:
            yield Problem(
                f"{ACTOR}.ulysses_sequence_parallel_size={sp} does not divide the model's {model.heads} attention "
                f"heads. Write {_divisors(model.heads, world)}.",
                IN_WORKER,
            )
        if model.kv_heads % sp and sp % model.kv_heads:
            yield Problem(
                f"{ACTOR}.ulysses_sequence_parallel_size={sp} and the model's {model.kv_heads} key-value heads: one "
                f"must divide the other.",
                IN_WORKER,
            )
    fused = config.actor_rollout_ref.model.use_fused_kernels
    if fused and actor.strategy == "fsdp2" and model is not None and not model.tied:  # fsdp_utils.py: apply_fsdp2
        yield Problem(
            "actor_rollout_ref.model.use_fused_kernels=True with strategy=fsdp2: FSDP2 shards an LM head that is not "
            "the embedding by itself, and verl's fused forward pass reads the shard. Leave use_fused_kernels out (a "
            f"masked run computes the head in chunks anyway), or write {ACTOR}.strategy=fsdp.",
            IN_LOG_PROB,
        )
    if layout.shard and world % layout.shard:  # engine/fsdp/utils.py: create_device_mesh
        yield Problem(f"{where} cannot be cut into shards of {ACTOR}.fsdp_config.fsdp_size={layout.shard}.", IN_WORKER)
    if actor.strategy == "fsdp" and actor.fsdp_config.offload_policy:
        yield Problem(
            f"{ACTOR}.fsdp_config.offload_policy=True does nothing with strategy=fsdp; write {ACTOR}.strategy=fsdp2, "
            f"or param_offload and optimizer_offload.",
            fatal=False,
        )


def _batches(config: DictConfig, layout: Layout, model: ModelShape | None) -> Iterator[Problem]:
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    dp = layout.data_parallel
    train, mini, n = config.data.train_batch_size, actor.ppo_mini_batch_size, rollout.n
    rows = mini * n
    if rows % dp:  # engine_workers.py: train_mini_batch
        yield Problem(
            f"a mini-batch of {ACTOR}.ppo_mini_batch_size ({mini}) × {ROLLOUT}.n ({n}) = {rows} sequences cannot be "
            f"dealt to {dp} data-parallel ranks. Write a ppo_mini_batch_size that is a multiple of "
            f"{dp // math.gcd(n, dp)}.",
            IN_UPDATE,
        )
    if mini > train:
        yield Problem(
            f"{ACTOR}.ppo_mini_batch_size ({mini}) is larger than data.train_batch_size ({train}): verl would fill the "
            f"mini-batch with padding rows. Write {ACTOR}.ppo_mini_batch_size={train}."
        )
    elif train % mini:  # trainer_base.py: _balance_batch
        yield Problem(
            f"data.train_batch_size ({train}) is no multiple of {ACTOR}.ppo_mini_batch_size ({mini}): verl spreads "
            f"padding rows over the mini-batches.",
            fatal=False,
        )
    dynamic = bool(actor.use_dynamic_bsz)
    if dynamic != bool(rollout.log_prob_use_dynamic_bsz):  # engine_workers.py: init_model
        yield Problem(
            f"{ACTOR}.use_dynamic_bsz={dynamic} and {ROLLOUT}.log_prob_use_dynamic_bsz="
            f"{bool(rollout.log_prob_use_dynamic_bsz)} must be the same; leave the second one out.",
            IN_WORKER,
        )
    if dynamic:
        return
    for key, size, per_rank, when in (
        (f"{ACTOR}.ppo_micro_batch_size_per_gpu", actor.ppo_micro_batch_size_per_gpu, rows // dp, IN_UPDATE),
        (f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu", rollout.log_prob_micro_batch_size_per_gpu,
         rows_of_batch(train, mini, n, dp) // dp, IN_LOG_PROB),
    ):  # fmt: skip
        if size is None:  # engine_workers.py: init_model
            yield Problem(
                f"without use_dynamic_bsz verl needs {key} (its older key without _per_gpu is accepted at first, and "
                f"refused by the worker). Write {key}=1, or {ACTOR}.use_dynamic_bsz=True.",
                IN_WORKER,
            )
        elif per_rank % size and not rows % dp:  # engine/utils.py: prepare_micro_batches
            yield Problem(f"{key}={size} does not divide the {per_rank} sequences of a rank. Write a divisor.", when)


def _lengths(config: DictConfig, layout: Layout, model: ModelShape | None) -> Iterator[Problem]:
    """utils/seqlen_balancing.py: rearrange_micro_batches asserts that a micro-batch can hold the longest sequence."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    longest = config.data.max_prompt_length + config.data.max_response_length
    least = -(-longest // layout.sequence)
    budgets = []
    if actor.use_dynamic_bsz:
        budgets.append((f"{ACTOR}.ppo_max_token_len_per_gpu", actor.ppo_max_token_len_per_gpu, "in an update"))
    if rollout.log_prob_use_dynamic_bsz:
        key = f"{ROLLOUT}.log_prob_max_token_len_per_gpu"
        budgets.append((key, rollout.log_prob_max_token_len_per_gpu, "in a log-prob pass"))
    ref = config.actor_rollout_ref.ref
    if needs_reference(config) and not layout.lora_rank and ref.log_prob_use_dynamic_bsz:
        key = f"{REF}.log_prob_max_token_len_per_gpu"
        budgets.append((key, ref.log_prob_max_token_len_per_gpu, "in a pass of the reference policy"))
    for key, budget, where in budgets:
        if budget * layout.sequence < longest:
            yield Problem(
                f"{key} ({budget}) × sequence parallelism ({layout.sequence}) = {budget * layout.sequence} tokens "
                f"cannot hold the longest sequence, prompt + response = {config.data.max_prompt_length} + "
                f"{config.data.max_response_length} = {longest}. Write {key}={least} or more, or raise "
                f"ulysses_sequence_parallel_size.",
                f"{where}, at the first response that is that long",
            )


def _rollout(config: DictConfig, layout: Layout, model: ModelShape | None) -> Iterator[Problem]:
    rollout = config.actor_rollout_ref.rollout
    tp, per_replica = rollout.tensor_model_parallel_size, accelerators_per_engine(rollout)
    longest = config.data.max_prompt_length + config.data.max_response_length
    if layout.world % per_replica:  # engine_workers.py: init_model
        yield Problem(
            f"{layout.world} accelerators cannot be cut into rollout engines of {per_replica} "
            f"({ROLLOUT}.tensor_model_parallel_size={tp} × data_parallel_size={rollout.data_parallel_size}).",
            IN_WORKER,
        )
    on_node = min(config.trainer.n_gpus_per_node, per_replica)
    if per_replica % on_node:  # rollout/replica.py: RolloutReplica.__init__
        yield Problem(
            f"a rollout engine of {per_replica} accelerators does not fill whole nodes of "
            f"trainer.n_gpus_per_node={config.trainer.n_gpus_per_node}.",
            IN_ENGINE,
        )
    if config.trainer.v1.trainer_mode == "separate_async" and rollout.nnodes > 0:
        separate = rollout.nnodes * rollout.n_gpus_per_node
        if separate < per_replica:
            yield Problem(
                f"{ROLLOUT}.nnodes × n_gpus_per_node = {separate} accelerators make no engine of {per_replica}.", IN_RAY
            )
        elif separate % per_replica:
            yield Problem(
                f"{separate % per_replica} of the {separate} separate rollout accelerators would stay idle: engines "
                f"have {per_replica}.",
                fatal=False,
            )
    if model is not None:
        if model.heads % tp:  # vllm/config/model.py: verify_with_parallel_config
            yield Problem(
                f"{ROLLOUT}.tensor_model_parallel_size={tp} does not divide the model's {model.heads} attention heads.",
                IN_ENGINE,
            )
        context = rollout.max_model_len
        if context is not None and context > model.max_positions:  # vllm_async_server.py: _validate_configs
            yield Problem(
                f"{ROLLOUT}.max_model_len={context} is more than the model's context of {model.max_positions} tokens.",
                IN_ENGINE,
            )
        allowed = min(context or model.max_positions, model.max_positions)
        if longest > allowed:  # vllm_async_server.py: generate cuts max_tokens to what is left
            source = f"{ROLLOUT}.max_model_len" if context is not None else "the model's context"
            yield Problem(
                f"prompt + response = {longest} tokens, and {source} is {allowed}: longer responses would be cut "
                f"there, without a word. Write "
                + (
                    f"{ROLLOUT}.max_model_len={longest}"
                    if longest <= model.max_positions
                    else f"data.max_response_length={model.max_positions - config.data.max_prompt_length}, or take a "
                    f"model with a longer context"
                )
                + "."
            )
    if rollout.max_num_batched_tokens < rollout.max_num_seqs and rollout.name == "vllm":  # vllm/config/scheduler.py
        yield Problem(
            f"{ROLLOUT}.max_num_batched_tokens ({rollout.max_num_batched_tokens}) must be at least max_num_seqs "
            f"({rollout.max_num_seqs}).",
            IN_ENGINE,
        )
    if not 0 < rollout.gpu_memory_utilization <= 1:
        yield Problem(
            f"{ROLLOUT}.gpu_memory_utilization={rollout.gpu_memory_utilization} is a share, in (0, 1].", IN_ENGINE
        )


def _data(config: DictConfig, layout: Layout, model: ModelShape | None) -> Iterator[Problem]:
    """Files that verl stumbles over. And steps_per_epoch is a whole number of batches, and it is divided by."""
    import pyarrow.parquet as pq

    try:
        if not read_guards(config).data_files:  # with the guard, the launcher says it
            check_data_files(config)
    except EntropyForkError as error:
        yield Problem(str(error), IN_RAY)
    files: Any = config.data.train_files
    files = list(files) if isinstance(files, (list, ListConfig)) else [files]
    paths = [os.path.expanduser(str(file)) for file in files]
    if not all(path.endswith(".parquet") and os.path.exists(path) for path in paths):
        return
    try:
        rows = sum(pq.read_metadata(path).num_rows for path in paths)
    except (OSError, ValueError):  # said above
        return
    most = config.data.get("train_max_samples", -1)
    rows = min(rows, most) if most and most > 0 else rows
    if rows < config.data.train_batch_size:
        yield Problem(
            f"data.train_files has {rows} rows and data.train_batch_size={config.data.train_batch_size}: not one "
            f"batch. Write data.train_batch_size={rows} or less.",
            IN_RAY,
        )


def needs_reference(config: DictConfig) -> bool:
    """Whether a run computes log-probs of a reference policy."""
    return bool(config.algorithm.get("use_kl_in_reward", False) or config.actor_rollout_ref.actor.use_kl_loss)


def accelerators_per_engine(rollout: DictConfig) -> int:
    """Accelerators that one rollout engine spans."""
    return rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size


def rows_of_batch(train: int, mini: int, n: int, dp: int) -> int:
    """Rows with verl's padding rows, a multiple of a mini-batch and of the ranks (_get_required_batch_multiple)."""
    multiple = mini * n * dp // math.gcd(mini * n, dp)
    return -(-train * n // multiple) * multiple


def _divisors(number: int, world: int) -> str:
    fitting = [str(i) for i in range(1, number + 1) if number % i == 0 and world % i == 0]
    return " or ".join([", ".join(fitting[:-1]), fitting[-1]]) if len(fitting) > 1 else "1"
