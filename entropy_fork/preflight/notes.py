"""Says what the numbers leave out, for one run."""

from __future__ import annotations

from entropy_fork.preflight.model_shape import ModelShape
from entropy_fork.preflight.run_shape import RunShape


def notes_on(run: RunShape, model: ModelShape) -> list[str]:
    """A sentence for each thing that the numbers leave out or take for granted."""
    notes = [
        "Activations are an estimate (entropy_fork/preflight/memory.py: layer_activations); weights, gradients and "
        "optimizer states are exact for FSDP. CUDA contexts, NCCL, CUDA graphs and fragmentation are in no number.",
    ]
    layout = run.layout
    if run.machines.on_cpu:
        notes.append(
            "trainer.device=cpu: all ranks and the rollout share one memory; no number is compared with a limit."
        )
    elif run.head.in_place_loss and not run.head.fused:
        notes.append(
            "Logits as with flash-attn installed, whose cross entropy works in place; --no-flash-attention counts them "
            "without it."
        )
    if run.rollout.is_light and not run.machines.on_cpu:
        notes.append(
            "The light rollout reserves no memory: its weights and the caches of a batch of longest answers count."
        )
    if layout.strategy not in ("fsdp", "fsdp2", "megatron"):
        notes.append(f"strategy={layout.strategy} is counted as FSDP2.")
    if layout.strategy == "megatron":
        notes.append("Megatron's sizes are its documentation's; they were not measured.")
        if not layout.checkpointing:
            notes.append("Without recompute_granularity=full, activations of all layers are counted.")
    if model.experts:
        notes.append("A mixture of experts: activations are those of the experts that one token passes through.")
    if not run.model.packed:
        notes.append(
            "use_remove_padding=False: rows are padded to the longest of their micro-batch; padding is not counted."
        )
    if run.critic:
        notes.append("The critic's memory is not counted.")
    if run.reference and not layout.lora_rank:
        notes.append("The reference policy stays on the host (verl forces it); its passing layers are not counted.")
    if run.model.offloads_activations:
        notes.append("enable_activation_offload is not counted: the activations are those of a run without it.")
    return notes
