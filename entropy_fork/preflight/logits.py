"""Bytes of logits on one accelerator: formulas for each way in which hidden states become log-probs.

They count the copies that verl's own functions make. ``tests/test_memory.py`` measures the ways that a CPU has; flash
attention's cross entropy, which works in place, is read in its source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from entropy_fork.core.lm_head import CHUNK, ROWS_KEPT

#: tokens that verl's fused LM head handles at once (verl/utils/experimental/torch_functional.py: FusedLinearForPPO)
FUSED_CHUNK = 512
#: what it holds of each logit of such a chunk, bytes: forward, and backward
FUSED_FORWARD_BYTES, FUSED_BACKWARD_BYTES = 12, 20
#: what entropy_fork/core/lm_head.py holds of each logit of a chunk of :data:`CHUNK`, which is all that there is
SPARSE_FORWARD_BYTES = 8


@dataclass(frozen=True)
class Head:
    """How verl gets from hidden states to log-probs and entropies.

    Attributes:
        logit_bytes: of one logit: the forward pass's dtype.
        scaled: ``rollout.temperature`` ≠ 1: a scaled copy (transformer_impl.py: _scale_logits_by_temperature).
        packed: ``use_remove_padding``; without it the padded logits are copied once more into a packed tensor.
        compiled: the entropy through torch.compile (``use_torch_compile``).
        chunk: tokens per chunk of ``entropy_from_logits_with_chunking``, 0 without.
        entropy_in_update: none, ``mask`` (looked at, no gradient) or ``loss`` (in the loss, with its gradient).
        fused: ``use_fused_kernels``.
        sparse: at wanted positions only (``entropy_fork/verl/sparse_head.py``).
        in_place_loss: flash attention's cross entropy, which writes the gradient over the logits.
    """

    logit_bytes: int = 2
    scaled: bool = False
    packed: bool = True
    compiled: bool = True
    chunk: int = 0
    entropy_in_update: str = "none"
    fused: bool = False
    sparse: bool = False
    in_place_loss: bool = True


def sparse(head: Head) -> Head:
    """The same head where it is asked for wanted positions only; a copy of packed logits is then not made."""
    return replace(head, entropy_in_update="none", packed=True, sparse=True)


def update_logits(head: Head, tokens: int, vocab: int) -> int:
    """Peak bytes of logits and of what is made of them in an update, for ``tokens`` that go through the LM head.

    b bytes per logit (transformer_impl.py: prepare_model_outputs; utils/torch_functional.py: logprobs_from_logits):

    ==========================================  ========================  =========================================
    entropy in the update                       in place (flash attention)  without (``logprobs_from_logits_v2``)
    ==========================================  ========================  =========================================
    none                                        b                          fp32: 4b; else b + 4
    for the mask, no gradient                   the larger of 2b and the entropy's forward pass; fp32: 4b
    in the loss                                 3b compiled, else 3b + 14  fp32: 7b; else 5b + 14
    ==========================================  ========================  =========================================

    plus b for the scaled copy, and b for the packed copy where padding is not removed. The entropy's forward pass is
    :func:`forward_logits`. With fused kernels 20 bytes for each logit of a chunk of 512 tokens. Of more than 8192
    wanted positions, so many exist at once.
    """
    if head.fused:
        return FUSED_BACKWARD_BYTES * min(tokens, FUSED_CHUNK) * vocab
    if head.sparse:
        tokens = min(tokens, ROWS_KEPT)
    b = head.logit_bytes
    forward = _entropy_bytes(head, tokens) if head.entropy_in_update != "none" else b
    if head.in_place_loss:
        in_loss = 3 * b if head.compiled or head.chunk else 3 * b + 14
        per_logit = {"none": b, "mask": max(2 * b, forward), "loss": max(in_loss, forward)}
    elif b == 4:
        per_logit = {"none": 4 * b, "mask": max(4 * b, forward), "loss": 7 * b}
    else:
        per_logit = {"none": b + 4, "mask": max(b + 4, forward), "loss": 5 * b + 14}
    return math.ceil((per_logit[head.entropy_in_update] + _copies(head)) * tokens * vocab)


def forward_logits(head: Head, tokens: int, vocab: int) -> int:
    """Peak bytes of logits in the log-prob pass, which always asks for entropies (trainer_base.py).

    b + 4 bytes per logit compiled (one fp32 tensor: what Inductor makes of verl's function on a CPU; on a GPU it may
    be none); eager in fp32 3b, in 16 bits b + 8 (softmax and product in fp32 under autocast); chunked b, and 12 bytes
    for each logit of a chunk; at wanted positions only 8 bytes of a chunk of 512. Copies as in :func:`update_logits`.
    """
    if head.fused:
        return FUSED_FORWARD_BYTES * min(tokens, FUSED_CHUNK) * vocab
    if head.sparse:
        return SPARSE_FORWARD_BYTES * min(tokens, CHUNK) * vocab
    return math.ceil((_entropy_bytes(head, tokens) + _copies(head)) * tokens * vocab)


def _entropy_bytes(head: Head, tokens: int) -> float:
    b = head.logit_bytes
    if head.chunk:
        return b + (12 if b == 2 else 8) * min(1.0, head.chunk / max(1, tokens))
    if head.compiled:
        return b + 4
    return 3 * b if b == 4 else b + 8


def _copies(head: Head) -> int:
    return head.logit_bytes * (int(head.scaled) + int(not head.packed))
