"""``entropy-fork plan``: what a command line would do to a cluster, before it has one.

Composes the config as ``verl.trainer.main_ppo`` does (the same config package, the same search path plugins), runs
verl's checks, ours and those of :mod:`entropy_fork.preflight.problems`, builds the model on the meta device, and adds
up what one accelerator would hold. Nothing is started and nothing is written.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import verl  # noqa: F401 - before Hydra looks for its plugins: loads ours
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.progress import task
from entropy_fork.preflight import memory
from entropy_fork.preflight.memory import DTYPE_BYTES, GIB, Head, Layout, Phase
from entropy_fork.preflight.model_shape import ModelShape, find_model_shape
from entropy_fork.preflight.problems import (
    Problem,
    accelerators_per_engine,
    find_problems,
    needs_reference,
    rows_of_batch,
)
from entropy_fork.verl import plugin
from entropy_fork.verl.checks import check_before_training, check_maskable
from entropy_fork.verl.config import (
    MASKED_STRATEGIES,
    MOVED,
    NODE,
    EntropyForkConfig,
    moved,
    read_config,
)
from entropy_fork.verl.cpu import cpu_platform

#: the share of the accelerator's memory above which a plan that fits is called tight: what no formula here counts
TIGHT = 0.9


@dataclass
class Plan:
    """What was found. Sizes in bytes, lengths in tokens."""

    command: str
    problems: list[Problem] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    phases: list[dict[str, Any]] = field(default_factory=list)
    head: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)
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
        """Everything, for a program."""
        return {"runs": not self.errors, **asdict(self)}


def in_gib(size: float) -> str:
    """Bytes for a person."""
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"


def compose(overrides: list[str], config_name: str = "ppo_trainer") -> DictConfig:
    """The config that ``python -m verl.trainer.main_ppo OVERRIDES`` would have.

    Raises:
        EntropyForkError: Hydra's reason, in one line.
    """
    if any(override in ("-m", "--multirun") for override in overrides):
        raise EntropyForkError("plan looks at one job of a sweep: leave -m out, and give each key one value")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("verl.trainer.config", version_base=None), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = hydra_compose(config_name, overrides=overrides, return_hydra_config=True)
        # what Hydra knows of the command line, for checks that look at it
        HydraConfig.instance().set_config(copy.deepcopy(config))
        with open_dict(config):
            del config["hydra"]
        return config
    except (HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split("\nSee https")[0].split())
        if found := [key for key in MOVED if f"'{key}'" in reason]:
            reason = moved(found[0])
        elif f"'{NODE}." in reason:  # Hydra would have a mistyped key appended
            reason = (
                f"{reason.split('To append')[0]}Keys of {NODE}: {', '.join(f.name for f in fields(EntropyForkConfig))}"
            )
        raise EntropyForkError(f"the config cannot be composed: {reason}") from None


def make_plan(
    overrides: list[str],
    config_name: str = "ppo_trainer",
    model_config: str | None = None,
    gpu_memory_gib: float = 80.0,
) -> Plan:
    """Compose, check and add up.

    Raises:
        EntropyForkError: where there is no config to plan with.
    """
    config = compose(overrides, config_name)
    plan = Plan(command=" ".join(overrides), accelerator_bytes=round(gpu_memory_gib * GIB))
    with task("checks of the launcher, and of the data"):
        plan.problems += what_the_launcher_says(config)
    _fill_in(config)
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:  # verl resolves in the TaskRunner
        plan.problems.append(Problem(f"a value cannot be resolved: {str(error).splitlines()[0]}", "after Ray is up"))
        return plan
    layout = layout_of(config)
    model = None
    path = config.actor_rollout_ref.model.path
    try:
        model = find_model_shape(path, model_config, bool(config.actor_rollout_ref.model.trust_remote_code))
    except EntropyForkError as error:
        plan.problems.append(Problem(str(error), "" if model_config else "when the model is loaded"))
    plan.problems += find_problems(config, layout, model)
    _count_steps(plan, config, layout)
    plan.mask = mask_in_words(config)
    if model is not None:
        _add_up(plan, config, layout, model)
    return plan


def _fill_in(config: DictConfig) -> None:
    """Values for keys that the launcher has just found missing, so that the rest can be said too."""
    for node, key, value in (
        (config.actor_rollout_ref.rollout, "name", "vllm"),
        (config.actor_rollout_ref.model, "path", None),
        (config.data, "train_files", []),
        (config.data, "val_files", []),
    ):
        if OmegaConf.is_missing(node, key):
            node[key] = value


def what_the_launcher_says(config: DictConfig) -> list[Problem]:
    """main_ppo's own checks: all of them as it makes them, up to the first that fails, and then each by itself."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils import config as verl_config

    whole = verl_config.validate_config
    stock = getattr(whole, "__wrapped__", whole)
    found: list[Problem] = []

    def say(error: BaseException) -> None:
        if isinstance(error, InstantiationException) and error.__cause__ is not None:
            error = error.__cause__  # a check in one of verl's dataclasses, wrapped in Hydra's account of it
        message = " ".join(str(error).split()) or type(error).__name__
        no_engine = message.startswith("vllm version None")  # verl asks vLLM which ranks of LoRA it knows
        if no_engine:
            message = "vLLM is not installed here, so whether it has LoRA of this rank was not checked."
        if message not in [problem.message for problem in found]:
            found.append(Problem(message, "" if no_engine else "at the start", fatal=not no_engine))

    def validate(function: Callable[..., None]) -> None:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(config, need_reference_policy(config), need_critic(config))

    def mask_check() -> None:
        masked = read_config(config)
        if masked is not None:
            check_maskable(config, masked)

    for check in (
        lambda: validate(whole),
        lambda: validate(stock),
        lambda: config.actor_rollout_ref.rollout.name,
        lambda: cpu_platform.check_before_training(config) if plugin.ON_CPU else None,
        lambda: check_before_training(config),
        mask_check,
    ):
        try:
            check()
        except MissingMandatoryValue as error:
            if not found:
                name = "actor_rollout_ref.rollout.name"
                say(
                    ValueError(f"{str(error).splitlines()[0]}" + (f"; write {name}=vllm" if name in str(error) else ""))
                )
        except Exception as error:  # whatever it is, the launcher would end with it
            say(error)
    return found


def layout_of(config: DictConfig) -> Layout:
    """How verl would cut the actor up."""
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    world = config.trainer.nnodes * config.trainer.n_gpus_per_node
    lora = (model.get("lora") or {}).get("rank", 0) or 0
    lora = lora if lora > 0 else model.get("lora_rank", 0)
    if actor.strategy == "megatron":
        engine = actor.megatron
        recompute = OmegaConf.select(engine, "override_transformer_config.recompute_granularity")
        return Layout(
            strategy="megatron",
            world=world,
            shard=1,
            sequence=engine.context_parallel_size,
            tensor=engine.tensor_model_parallel_size,
            pipeline=engine.pipeline_model_parallel_size,
            param_offload=engine.param_offload,
            optimizer_offload=engine.optimizer_offload,
            checkpointing=recompute == "full",
            distributed_optimizer=engine.use_distributed_optimizer,
            lora_rank=lora,
        )
    engine = actor.get("fsdp_config") or {}
    precision = engine.get("mixed_precision") or {}
    sequence = max(
        actor.get("ulysses_sequence_parallel_size", 1) or 1, engine.get("ulysses_sequence_parallel_size", 1) or 1
    )
    fsdp_size = engine.get("fsdp_size", -1)
    return Layout(
        strategy=actor.strategy,
        world=world,
        shard=world if fsdp_size < 0 or fsdp_size >= world else fsdp_size,
        sequence=sequence,
        master_bytes=_bytes_of(engine.get("model_dtype") or "fp32"),
        compute_bytes=_bytes_of(precision.get("param_dtype", "bf16")),
        reduce_bytes=_bytes_of(precision.get("reduce_dtype", "fp32")),
        param_offload=bool(engine.get("param_offload")),
        optimizer_offload=bool(engine.get("optimizer_offload")),
        offload_policy=bool(engine.get("offload_policy")) and actor.strategy == "fsdp2",
        reshard_after_forward=bool(engine.get("reshard_after_forward", True)),
        checkpointing=bool(model.enable_gradient_checkpointing),
        lora_rank=lora,
    )


def head_of(config: DictConfig, layout: Layout, masked: EntropyForkConfig | None) -> Head:
    """How verl would get from hidden states to log-probs."""
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    engine = actor.get("megatron" if layout.strategy == "megatron" else "fsdp_config") or {}
    entropy = "none"
    if actor.entropy_coeff != 0 or actor.calculate_entropy:
        entropy = "loss"
    elif masked is not None and masked.entropy == "current" and masked.pool == "micro_batch":
        entropy = "mask"
    return Head(
        logit_bytes=layout.compute_bytes,
        scaled=float(config.actor_rollout_ref.rollout.temperature) != 1.0,
        packed=bool(model.use_remove_padding),
        compiled=bool(engine.get("use_torch_compile", True)) and layout.strategy != "megatron",
        chunk=engine.get("entropy_from_logits_chunk_size", 2048)
        if engine.get("entropy_from_logits_with_chunking")
        else 0,
        entropy_in_update=entropy,
        fused=bool(model.use_fused_kernels),
        in_place_loss=config.trainer.device != "cpu" and not engine.get("full_determinism"),
    )


def mask_in_words(config: DictConfig) -> str:
    """Which tokens the run would be trained on, a sentence."""
    try:
        fork_config = read_config(config)
        if fork_config is None:
            return "No mask: all response tokens are trained on (verl as it is)."
        return fork_config.rule(config.actor_rollout_ref.actor.loss_agg_mode).describe()
    except (EntropyForkError, ValueError) as error:
        return str(error)


def _count_steps(plan: Plan, config: DictConfig, layout: Layout) -> None:
    actor, rollout, data = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.data
    dp, longest = layout.data_parallel, data.max_prompt_length + data.max_response_length
    rows = data.train_batch_size * rollout.n
    padded = rows_of_batch(data.train_batch_size, actor.ppo_mini_batch_size, rollout.n, dp)
    mini_rows = actor.ppo_mini_batch_size * rollout.n
    rows_per_rank = max(1, mini_rows // dp)
    if actor.use_dynamic_bsz:
        budget = actor.ppo_max_token_len_per_gpu
        full_rows = max(1, budget * layout.sequence // longest)
        micro = math.ceil(rows_per_rank / full_rows)
    else:
        per_micro = actor.ppo_micro_batch_size_per_gpu or 1
        budget = per_micro * math.ceil(longest / layout.sequence)
        micro = math.ceil(rows_per_rank / per_micro)
    all_of_rank = math.ceil(rows_per_rank * longest / layout.sequence)
    if rollout.log_prob_use_dynamic_bsz:
        log_prob_budget = rollout.log_prob_max_token_len_per_gpu
    else:
        log_prob_budget = (rollout.log_prob_micro_batch_size_per_gpu or 1) * math.ceil(longest / layout.sequence)
    plan.layout = {**asdict(layout), "data_parallel": dp}
    plan.step = {
        "prompts": data.train_batch_size,
        "responses": rollout.n,
        "sequences": rows,
        "padding_sequences": padded - rows,
        "longest_sequence": longest,
        "tokens_at_most": rows * longest,
        "gradient_steps_per_batch": padded // mini_rows * actor.ppo_epochs,
        "sequences_per_gradient_step": mini_rows,
        "sequences_per_rank_per_gradient_step": mini_rows / dp,
        "micro_batches_per_gradient_step_at_most": micro,
        "tokens_per_gpu_per_step_at_most": math.ceil(padded / dp * longest / layout.sequence),
        "tokens_per_gpu_per_gradient_step_at_most": all_of_rank,
        "tokens_per_gpu_per_micro_batch_at_most": min(budget, all_of_rank),
        "tokens_per_gpu_in_log_prob_pass_at_most": min(
            log_prob_budget, math.ceil(padded / dp * longest / layout.sequence)
        ),
    }


def _add_up(plan: Plan, config: DictConfig, layout: Layout, model: ModelShape) -> None:
    """Memory of one accelerator in each phase of a step, and of the host."""
    rollout, total = config.actor_rollout_ref.rollout, plan.accelerator_bytes
    try:
        masked = read_config(config)
    except EntropyForkError:
        masked = None
    engine = config.actor_rollout_ref.actor.get("fsdp_config") or {}
    accumulates = plan.step["micro_batches_per_gradient_step_at_most"] > 1
    layout = replace(
        layout,
        keeps_unsharded_gradients=bool(engine.get("use_no_sync_for_gradient_accumulation")) and accumulates,
    )
    head = head_of(config, layout, masked)
    plan.model = {
        "source": model.source,
        "parameters": model.num_parameters,
        "trained_parameters": sum(p.count for p in model.lora_parameters(layout.lora_rank))
        if layout.lora_rank
        else model.num_parameters,
        "layers": model.layers,
        "hidden": model.hidden,
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "vocabulary": model.vocab,
        "context": model.max_positions,
    }
    on_cpu = plan.on_cpu = config.trainer.device == "cpu"
    separate = config.trainer.v1.trainer_mode == "separate_async" and not config.actor_rollout_ref.get(
        "hybrid_engine", True
    )
    share = 0 if on_cpu or separate else round(rollout.gpu_memory_utilization * total)
    sleeps = rollout.free_cache_engine and rollout.get("enable_sleep_mode", True)
    asleep = 0 if sleeps else share
    tokens = plan.step["tokens_per_gpu_per_micro_batch_at_most"]
    log_prob_tokens = plan.step["tokens_per_gpu_in_log_prob_pass_at_most"]
    kept = kept_ratio(masked)
    dense_because = "nothing is masked" if masked is None else masked.dense_because(config, kept)
    is_sparse = masked is not None and masked.sparse_head and kept < 1 and layout.strategy in MASKED_STRATEGIES
    at_responses = memory.sparse(head) if is_sparse else head
    at_kept = memory.sparse(head) if dense_because is None else head
    # kept tokens are not spread evenly over micro-batches; this is their mean
    rows = math.ceil(kept * tokens) if dense_because is None else tokens
    phases = [
        memory.log_prob_phase(model, layout, at_responses, log_prob_tokens, asleep),
        memory.update_phase(model, layout, at_kept, tokens, rows, asleep),
    ]
    if share:
        phases = [
            memory.rollout_phase(model, layout, share, after_first_update=False),
            memory.rollout_phase(model, layout, share, after_first_update=True),
            *phases,
        ]
    plan.phases = [{"name": phase.name, "parts": phase.parts, "total": phase.total} for phase in phases]
    vocab = math.ceil(model.vocab / layout.tensor)
    plan.head = {
        "tokens": tokens,
        "vocabulary": vocab,
        "kept_ratio": kept,
        "dense_because": dense_because,
        "log_prob_pass_bytes": memory.forward_logits(at_responses, log_prob_tokens, vocab),
        "log_prob_pass_bytes_dense": memory.forward_logits(head, log_prob_tokens, vocab),
        "gradient_step_bytes": memory.update_logits(at_kept, rows, vocab),
        "gradient_step_bytes_dense": memory.update_logits(head, tokens, vocab),
    }
    if not on_cpu:
        _rollout_engine(plan, config, model)
        plan.problems += [_does_not_fit(phase, total) for phase in phases if phase.total > total]
        plan.problems += [_tight(phase, total) for phase in phases if total * TIGHT < phase.total <= total]
    plan.host_bytes_per_node = memory.host_states(model, layout, config.trainer.n_gpus_per_node)
    plan.notes = _notes(config, layout, model, head, on_cpu)


def kept_ratio(masked: EntropyForkConfig | None) -> float:
    """The largest share of the tokens that an update of the run looks at."""
    if masked is None:
        return 1.0
    ratio = masked.top_ratio if masked.schedule == "constant" else max(masked.top_ratio, masked.final_ratio)
    return ratio - masked.band_from


def _rollout_engine(plan: Plan, config: DictConfig, model: ModelShape) -> None:
    """Its weights, and how many full sequences its cache would hold."""
    rollout = config.actor_rollout_ref.rollout
    tp, size = rollout.tensor_model_parallel_size, _bytes_of(rollout.dtype)
    share = round(rollout.gpu_memory_utilization * plan.accelerator_bytes)
    weights = memory.rollout_weights(model, tp, size)
    per_token = memory.kv_bytes_per_token(model, tp, size)
    cache = max(0, share - weights)
    longest = plan.step["longest_sequence"]
    context = min(rollout.max_model_len or model.max_positions, model.max_positions)
    world = config.trainer.nnodes * config.trainer.n_gpus_per_node
    if config.trainer.v1.trainer_mode == "separate_async":
        world = rollout.nnodes * rollout.n_gpus_per_node
    engines = max(1, world // accelerators_per_engine(rollout))
    full = cache // (per_token * longest)
    plan.rollout = {
        "engines": engines,
        "accelerators_per_engine": accelerators_per_engine(rollout),
        "share_bytes": share,
        "weights_bytes": weights,
        "cache_bytes": cache,
        "cache_bytes_per_token": per_token,
        "full_length_sequences_per_engine": full,
        "sequences_per_engine_per_step": math.ceil(plan.step["sequences"] / engines),
    }
    where = "actor_rollout_ref.rollout"
    if weights >= share:
        plan.problems.append(
            Problem(
                f"the rollout engine's weights, {in_gib(weights)} on each of {tp} accelerators, do not fit its share "
                f"of {in_gib(share)} ({where}.gpu_memory_utilization={rollout.gpu_memory_utilization}). Write a larger "
                f"{where}.tensor_model_parallel_size or gpu_memory_utilization.",
                "when the rollout engine starts",
            )
        )
    elif cache < per_token * context:
        plan.problems.append(
            Problem(
                f"the rollout engine's cache of {in_gib(cache)} holds {cache // per_token} tokens, and one sequence "
                f"may have {context} ({where}.max_model_len, by default the model's context). Write "
                f"{where}.max_model_len={longest}, a larger tensor_model_parallel_size or gpu_memory_utilization.",
                "when the rollout engine starts",
            )
        )


def _does_not_fit(phase: Phase, total: int) -> Problem:
    largest = max(phase.parts, key=phase.parts.__getitem__)
    ways = {
        "logits": "lower ppo_max_token_len_per_gpu (and log_prob_max_token_len_per_gpu), raise "
        "ulysses_sequence_parallel_size, or write actor_rollout_ref.actor.entropy_from_logits_with_chunking=True, or "
        "+entropy_fork=global, which holds a chunk of the log-prob pass and the kept rows of the update",
        "activations": "lower ppo_max_token_len_per_gpu, raise ulysses_sequence_parallel_size, or write "
        "actor_rollout_ref.model.enable_gradient_checkpointing=True",
        "unsharded gradients": "write actor_rollout_ref.actor.fsdp_config.use_no_sync_for_gradient_accumulation=False",
        "rollout engine": "lower actor_rollout_ref.rollout.gpu_memory_utilization, or offload with "
        "actor_rollout_ref.actor.fsdp_config.param_offload=True and optimizer_offload=True",
        "weights and optimizer that were not offloaded": "write actor_rollout_ref.actor.fsdp_config.param_offload=True "
        "and optimizer_offload=True",
    }
    way = ways.get(largest, "take more accelerators, LoRA (actor_rollout_ref.model.lora_rank=32), or FSDP2's "
                            "actor_rollout_ref.actor.fsdp_config.offload_policy=True")  # fmt: skip
    return Problem(
        f"{phase.name}: {in_gib(phase.total)} on an accelerator of {in_gib(total)}, most of it {largest} "
        f"({in_gib(phase.parts[largest])}). To fit: {way}.",
        "out of memory there",
    )


def _tight(phase: Phase, total: int) -> Problem:
    return Problem(
        f"{phase.name}: {in_gib(phase.total)} of {in_gib(total)} is more than {TIGHT:.0%}: CUDA contexts, NCCL, "
        f"fragmentation and what a sleeping rollout engine keeps come on top.",
        fatal=False,
    )


def _notes(config: DictConfig, layout: Layout, model: ModelShape, head: Head, on_cpu: bool) -> list[str]:
    """What the numbers leave out for this config."""
    notes = [
        "Activations are an estimate (entropy_fork/preflight/memory.py: layer_activations); weights, gradients and "
        "optimizer states are exact for FSDP. CUDA contexts, NCCL, CUDA graphs and fragmentation are in no number.",
    ]
    if on_cpu:
        notes.append("trainer.device=cpu: all ranks and the rollout share one memory; nothing is held against a limit.")
    elif head.in_place_loss and not head.fused:
        notes.append("Logits as with flash-attn installed, whose cross entropy works in place.")
    if layout.strategy not in ("fsdp", "fsdp2", "megatron"):
        notes.append(f"strategy={layout.strategy} is counted as FSDP2.")
    if layout.strategy == "megatron":
        notes.append("Megatron's sizes are its documentation's; they were not measured.")
        if not layout.checkpointing:
            notes.append("Without recompute_granularity=full, activations of all layers are counted.")
    if model.experts:
        notes.append("A mixture of experts: activations are those of the experts that one token passes through.")
    if not config.actor_rollout_ref.model.use_remove_padding:
        notes.append(
            "use_remove_padding=False: rows are padded to the longest of their micro-batch; padding is not counted."
        )
    from verl.trainer.ppo.utils import need_critic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if need_critic(config):
            notes.append("The critic's memory is not counted.")
    if needs_reference(config) and not layout.lora_rank:
        notes.append("The reference policy stays on the host (verl forces it); its passing layers are not counted.")
    if config.actor_rollout_ref.model.enable_activation_offload:
        notes.append("enable_activation_offload is not counted: activations are given as without it.")
    return notes


def _bytes_of(dtype: Any) -> int:
    try:
        return DTYPE_BYTES[str(dtype).removeprefix("torch.")]
    except KeyError:
        raise EntropyForkError(f"unknown dtype {dtype!r}; verl knows {', '.join(DTYPE_BYTES)}") from None
