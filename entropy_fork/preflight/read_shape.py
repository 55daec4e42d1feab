"""Reads the shape of a run from verl's config. No other module of preflight looks into the config's values.

Some questions are answered by code that takes a whole config: verl's ``need_critic``, and ``read_config`` and
``dense_because`` of ours. They are asked here, and the shape holds their answers.
"""

from __future__ import annotations

import warnings

from omegaconf import DictConfig

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.preflight.config_values import ConfigValues
from entropy_fork.preflight.logits import Head
from entropy_fork.preflight.memory import DTYPE_BYTES, Layout
from entropy_fork.preflight.run_shape import (
    Data,
    DynamicSampling,
    Machines,
    Mask,
    Model,
    Overlong,
    Packing,
    Rollout,
    RunShape,
    Trainer,
    Update,
)
from entropy_fork.verl.config import MASKED_STRATEGIES, EntropyForkConfig, read_config

ACTOR, ROLLOUT, REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"
MODEL = "actor_rollout_ref.model"
FSDP, MEGATRON = f"{ACTOR}.fsdp_config", f"{ACTOR}.megatron"


def read_run_shape(config: DictConfig) -> RunShape:
    """Read a resolved config.

    Raises:
        UnreadableConfig: values are missing or of the wrong type; with a complaint about each.
    """
    try:
        fork_config = read_config(config)
    except EntropyForkError:  # the launcher's checks report it
        fork_config = None
    values = ConfigValues(config)
    machines = _machines(values)
    model = _model(values)
    trainer, data, rollout = _trainer(values), _data(values), _rollout(values, machines)
    update, sampling, overlong = _update(values), _sampling(values), _overlong(values)
    layout = _layout(values, machines.world)
    head = _head(values, layout, model, machines, fork_config)
    reference = values.flag("algorithm.use_kl_in_reward", absent=False) or update.kl_loss
    reference_pass = None
    if reference and not layout.lora_rank:
        reference_pass = _packing(values, REF, "log_prob_use_dynamic_bsz", "log_prob_max_token_len_per_gpu", None)
    values.check()
    return RunShape(
        machines=machines,
        trainer=trainer,
        data=data,
        update=update,
        model=model,
        rollout=rollout,
        sampling=sampling,
        mask=_mask(config, fork_config, layout),
        layout=layout,
        head=head,
        overlong=overlong,
        reference=reference,
        reference_pass=reference_pass,
        critic=_trains_critic(config),
    )


def kept_ratio(fork_config: EntropyForkConfig | None) -> float:
    """The largest share of the tokens that an update of the run looks at."""
    if fork_config is None or fork_config.use != "mask" or (fork_config.where and fork_config.outside == "keep"):
        return 1.0
    ratio = fork_config.top_ratio
    if fork_config.schedule != "constant":
        ratio = max(ratio, fork_config.final_ratio)
    return ratio - fork_config.band_from


def _machines(values: ConfigValues) -> Machines:
    return Machines(
        nodes=values.whole("trainer.nnodes", 1),
        per_node=values.whole("trainer.n_gpus_per_node", 1),
        on_cpu=values.text("trainer.device") == "cpu",
    )


def _trainer(values: ConfigValues) -> Trainer:
    trainer = Trainer(
        mode=values.text("trainer.v1.trainer_mode"),
        hybrid=values.flag("actor_rollout_ref.hybrid_engine", absent=True),
        sync_steps=1,
    )
    if not trainer.separate:
        return trainer
    return Trainer(trainer.mode, values.whole("trainer.v1.separate_async.parameter_sync_step", 1), trainer.hybrid)


def _data(values: ConfigValues) -> Data:
    return Data(
        batch=values.whole("data.train_batch_size", 1),
        prompt_length=values.whole("data.max_prompt_length", 1),
        response_length=values.whole("data.max_response_length", 1),
        generation_batch=values.whole_or_none("data.gen_batch_size", 0),
        files=values.texts_or_none("data.train_files"),
        max_rows=values.whole("data.train_max_samples", absent=-1),
    )


def _update(values: ConfigValues) -> Update:
    return Update(
        mini_batch=values.whole(f"{ACTOR}.ppo_mini_batch_size", 1),
        epochs=values.whole(f"{ACTOR}.ppo_epochs", 0),
        packing=_packing(values, ACTOR, "use_dynamic_bsz", "ppo_max_token_len_per_gpu", "ppo_micro_batch_size_per_gpu"),
        kl_loss=values.flag(f"{ACTOR}.use_kl_loss"),
        reduces_at_end=values.flag(f"{FSDP}.use_no_sync_for_gradient_accumulation", absent=False),
        offload_policy=values.flag(f"{FSDP}.offload_policy", absent=False),
        virtual_stages=values.whole(f"{MEGATRON}.virtual_pipeline_model_parallel_size", 0, absent=1) or 1,
        uneven_stages=any("pipeline" in name for name in values.names_in(f"{MEGATRON}.override_transformer_config")),
    )


def _packing(values: ConfigValues, group: str, dynamic_key: str, tokens_key: str, sequences_key: str | None) -> Packing:
    dynamic = values.flag(f"{group}.{dynamic_key}")
    return Packing(
        dynamic=dynamic,
        tokens=values.whole(f"{group}.{tokens_key}", 1) if dynamic else 0,
        sequences=None if dynamic or sequences_key is None else values.whole_or_none(f"{group}.{sequences_key}", 0),
    )


def _model(values: ConfigValues) -> Model:
    return Model(
        path=values.text_or_none(f"{MODEL}.path"),
        trusts_its_code=values.flag(f"{MODEL}.trust_remote_code"),
        packed=values.flag(f"{MODEL}.use_remove_padding"),
        fused=values.flag(f"{MODEL}.use_fused_kernels"),
        offloads_activations=values.flag(f"{MODEL}.enable_activation_offload"),
    )


def _rollout(values: ConfigValues, machines: Machines) -> Rollout:
    value_bytes = DTYPE_BYTES["bf16"]  # not looked at on a CPU, where a rollout may have a dtype that no engine has
    if not machines.on_cpu:
        value_bytes = values.dtype_bytes(f"{ROLLOUT}.dtype", absent="bfloat16")
    return Rollout(
        name=values.text(f"{ROLLOUT}.name"),
        n=values.whole(f"{ROLLOUT}.n", 1),
        tensor=values.whole(f"{ROLLOUT}.tensor_model_parallel_size", 1),
        data_parallel=values.whole(f"{ROLLOUT}.data_parallel_size", 1),
        pipeline=values.whole(f"{ROLLOUT}.pipeline_model_parallel_size", 1),
        nodes=values.whole(f"{ROLLOUT}.nnodes", 0, absent=0),
        per_node=values.whole(f"{ROLLOUT}.n_gpus_per_node", 0, absent=0),
        sends_weights_by=values.text(f"{ROLLOUT}.checkpoint_engine.backend", absent=""),
        context=values.whole_or_none(f"{ROLLOUT}.max_model_len", 0),
        batched_tokens=values.whole_or_none(f"{ROLLOUT}.max_num_batched_tokens"),
        batched_sequences=values.whole_or_none(f"{ROLLOUT}.max_num_seqs"),
        memory_share=values.number(f"{ROLLOUT}.gpu_memory_utilization"),
        value_bytes=value_bytes,
        sleeps=values.flag(f"{ROLLOUT}.free_cache_engine") and values.flag(f"{ROLLOUT}.enable_sleep_mode", absent=True),
        log_probs=_packing(
            values,
            ROLLOUT,
            "log_prob_use_dynamic_bsz",
            "log_prob_max_token_len_per_gpu",
            "log_prob_micro_batch_size_per_gpu",
        ),
    )


def _sampling(values: ConfigValues) -> DynamicSampling:
    groups = "algorithm.filter_groups"
    return DynamicSampling(
        on=values.flag(f"{groups}.enable", absent=False),
        metric=values.text_or_none(f"{groups}.metric"),
        in_flight=values.whole(f"{groups}.max_inflight_gen_batches", absent=1),
        most_batches=values.whole(f"{groups}.max_num_gen_batches", absent=0),
    )


def _overlong(values: ConfigValues) -> Overlong | None:
    reward = "reward.reward_kwargs"
    if not values.flag(f"{reward}.overlong_buffer_cfg.enable", absent=False):
        return None
    if values.text("reward.reward_manager.name") != "dapo":
        return None
    return Overlong(
        buffer=values.whole(f"{reward}.overlong_buffer_cfg.len"), end=values.whole_or_none(f"{reward}.max_resp_len")
    )


def _layout(values: ConfigValues, world: int) -> Layout:
    """How verl cuts the actor up."""
    strategy = values.text(f"{ACTOR}.strategy")
    lora = values.whole(f"{MODEL}.lora.rank", absent=0)
    lora = lora if lora > 0 else values.whole(f"{MODEL}.lora_rank", 0, absent=0)
    if strategy == "megatron":
        recompute = values.text_or_none(f"{MEGATRON}.override_transformer_config.recompute_granularity")
        return Layout(
            strategy="megatron",
            world=world,
            shard=1,
            sequence=values.whole(f"{MEGATRON}.context_parallel_size", 1),
            tensor=values.whole(f"{MEGATRON}.tensor_model_parallel_size", 1),
            pipeline=values.whole(f"{MEGATRON}.pipeline_model_parallel_size", 1),
            param_offload=values.flag(f"{MEGATRON}.param_offload"),
            optimizer_offload=values.flag(f"{MEGATRON}.optimizer_offload"),
            checkpointing=recompute == "full",
            distributed_optimizer=values.flag(f"{MEGATRON}.use_distributed_optimizer"),
            lora_rank=lora,
        )
    sequence = "ulysses_sequence_parallel_size"
    shard = values.whole(f"{FSDP}.fsdp_size", absent=-1)
    if shard == 0:
        values.complain(
            f"{FSDP}.fsdp_size",
            f"{FSDP}.fsdp_size=0 is no number of accelerators. Write {FSDP}.fsdp_size=-1 to shard over all of them.",
        )
    return Layout(
        strategy=strategy,
        world=world,
        shard=world if shard <= 0 or shard >= world else shard,
        sequence=max(1, *(values.whole(f"{group}.{sequence}", 0, absent=1) for group in (ACTOR, FSDP))),
        master_bytes=values.dtype_bytes(f"{FSDP}.model_dtype", absent="fp32", null="fp32"),
        compute_bytes=values.dtype_bytes(f"{FSDP}.mixed_precision.param_dtype", absent="bf16"),
        reduce_bytes=values.dtype_bytes(f"{FSDP}.mixed_precision.reduce_dtype", absent="fp32"),
        param_offload=values.flag(f"{FSDP}.param_offload", absent=False),
        optimizer_offload=values.flag(f"{FSDP}.optimizer_offload", absent=False),
        offload_policy=strategy == "fsdp2" and values.flag(f"{FSDP}.offload_policy", absent=False),
        reshard_after_forward=values.flag(f"{FSDP}.reshard_after_forward", absent=True),
        checkpointing=values.flag(f"{MODEL}.enable_gradient_checkpointing"),
        lora_rank=lora,
    )


def _head(
    values: ConfigValues, layout: Layout, model: Model, machines: Machines, fork_config: EntropyForkConfig | None
) -> Head:
    """How verl gets from hidden states to log-probs."""
    engine = MEGATRON if layout.strategy == "megatron" else FSDP
    entropy = "none"
    in_bonus, only_logged = values.number(f"{ACTOR}.entropy_coeff") != 0, values.flag(f"{ACTOR}.calculate_entropy")
    if in_bonus or only_logged:
        entropy = "loss"
    elif fork_config is not None and fork_config.entropy == "current" and fork_config.pool == "micro_batch":
        entropy = "mask"
    chunked = values.flag(f"{engine}.entropy_from_logits_with_chunking", absent=False)
    return Head(
        logit_bytes=layout.compute_bytes,
        scaled=values.number(f"{ROLLOUT}.temperature") != 1,
        packed=model.packed,
        compiled=values.flag(f"{engine}.use_torch_compile", absent=True) and layout.strategy != "megatron",
        chunk=values.whole(f"{engine}.entropy_from_logits_chunk_size", 1, absent=2048) if chunked else 0,
        entropy_in_update=entropy,
        fused=model.fused,
        in_place_loss=not machines.on_cpu and not values.flag(f"{engine}.full_determinism", absent=False),
    )


def _mask(config: DictConfig, fork_config: EntropyForkConfig | None, layout: Layout) -> Mask:
    kept = kept_ratio(fork_config)
    if fork_config is None:
        return Mask(kept_ratio=kept, dense_because="nothing is masked", sparse_log_probs=False)
    may_drop = kept < 1 or (fork_config.use == "mask" and bool(fork_config.where))
    return Mask(
        kept_ratio=kept,
        dense_because=fork_config.dense_because(config, may_drop),
        sparse_log_probs=fork_config.sparse_head and may_drop and layout.strategy in MASKED_STRATEGIES,
    )


def _trains_critic(config: DictConfig) -> bool:
    from verl.trainer.ppo.utils import need_critic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(need_critic(config))
