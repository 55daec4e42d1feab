"""The LM head at chosen positions only: which ones, and what is computed of their logits.

A row of logits has as many numbers as the vocabulary, 151,936 for Qwen3, and every other tensor of a step is small
beside them. But a loss looks at a few of these rows: none of a prompt, and with token weights of zero none of what was
dropped. :func:`response_positions` says where the response's predictions lie in a packed batch;
:func:`log_probs_and_entropy` is the pass without gradients, for any number of rows in a fixed amount of memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

#: rows of logits that exist at once: 512 × 151,936 × 4 bytes are 0.3 GB, and a GPU is busy with them
CHUNK = 512

#: as many rows of logits are kept for the backward pass, as in an ordinary head; more are computed a second time, in
#: chunks. 8192 × 151,936 in bfloat16 are 2.5 GB.
ROWS_KEPT = 8192


def response_positions(offsets: Tensor, response_lengths: Tensor) -> Tensor:
    """Where each response token is predicted, one position before its own, in a packed batch.

    Args:
        offsets: int64, shape (num_rows + 1,): where each sequence (prompt and response) begins, and where all end.
        response_lengths: int64, shape (num_rows,); a sequence ends with its response, and its prompt is not empty.

    Returns:
        int64, shape (sum of response_lengths,), ascending.
    """
    ends = response_lengths.cumsum(0)
    to_packed = offsets[1:] - 1 - ends
    num_tokens = int(ends[-1]) if len(ends) else 0
    places = torch.arange(num_tokens, device=offsets.device)
    return places + to_packed.repeat_interleave(response_lengths, output_size=num_tokens)


def padded_positions(positions: Tensor, offsets: Tensor, padded_length: int) -> Tensor:
    """The same positions where every sequence is padded on its right and rows lie in one line.

    Args:
        positions: int64, shape (num_positions,), in the packed batch.
        offsets: int64, shape (num_rows + 1,), as in :func:`response_positions`.
        padded_length: of every row.

    Returns:
        int64, shape (num_positions,).
    """
    rows = torch.searchsorted(offsets, positions, right=True) - 1
    return positions - offsets[rows] + rows * padded_length


@torch.no_grad()
def log_probs_and_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labels and entropies of the whole distributions (the paper's Eq. 1), in one pass.

    The matrix product is made in the type of ``hidden``, everything after it in float32 or better. (An entropy of
    16-bit logits and sums is a difference of two numbers around 20, which bfloat16 tells apart in steps of 0.125.)

    Args:
        hidden: float, shape (num_rows, hidden_size): the last layer's output at these positions.
        weight: same type, shape (vocabulary, hidden_size): the head's, which has no bias.
        labels: int64, shape (num_rows,): the token that followed.
        temperature: T, which logits are divided by.
        chunk: rows of logits at once.

    Returns:
        Two tensors of shape (num_rows,) in nats, float32 (float64 for such input).
    """
    log_probs, entropies = _per_chunk(_log_prob_and_entropy, 2, hidden, weight, labels, temperature, chunk)
    return log_probs, entropies


@torch.no_grad()
def log_probs_entropy_and_rank(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, chunk: int = CHUNK
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`log_probs_and_entropy`, and how many tokens are strictly likelier than the label, int64."""
    parts = _per_chunk(_log_prob_entropy_and_rank, 3, hidden, weight, labels, temperature, chunk)
    log_probs, entropies, ranks = parts  # a rank is below 2^24, so float32 holds it exactly
    return log_probs, entropies, ranks.long()


def _per_chunk(
    measure: Callable[[Tensor, Tensor], Tensor],
    num_measures: int,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float,
    chunk: int,
) -> tuple[Tensor, ...]:
    """What ``measure`` makes of (log-probabilities of all tokens, labels), one chunk of rows after another."""
    parts = []
    for part, label in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        logits = linear(part, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature != 1.0:
            logits.div_(temperature)
        logits.sub_(logits.logsumexp(-1, keepdim=True))  # now the logarithms of probabilities
        parts.append(measure(logits, label.unsqueeze(-1)))
    if not parts:
        parts = [hidden.new_empty((num_measures, 0), dtype=torch.promote_types(hidden.dtype, torch.float32))]
    return torch.cat(parts, dim=1).unbind()


def _log_prob_and_entropy(log_probs: Tensor, label: Tensor) -> Tensor:
    entropy = -(log_probs.exp().mul_(log_probs)).sum(-1)
    return torch.stack([log_probs.gather(-1, label).squeeze(-1), entropy])


def _log_prob_entropy_and_rank(log_probs: Tensor, label: Tensor) -> Tensor:
    rank = (log_probs > log_probs.gather(-1, label)).sum(-1)
    return torch.cat([_log_prob_and_entropy(log_probs, label), rank.to(log_probs.dtype).unsqueeze(0)])
