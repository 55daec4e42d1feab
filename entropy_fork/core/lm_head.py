"""The LM head at chosen positions only: find the positions, and compute from their logits.

A row of logits has as many numbers as the vocabulary, 151,936 for Qwen3. Every other tensor of a step is small beside
the logits. But a loss needs few of these rows: none of the prompt, and none of a dropped token, whose weight is 0.
:func:`response_positions` finds the positions of a packed batch that predict response tokens. :func:`in_chunks`
computes without gradients, any number of rows in a fixed amount of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from entropy_fork.core.entropy import entropies

#: rows of logits that exist at once: 512 × 151,936 × 4 bytes are 0.3 GB, and enough work for a GPU
CHUNK = 512

#: up to this many rows of logits are kept for the backward pass, as an ordinary head keeps all. If there are more, the
#: backward pass computes them again, this many at once. 8192 × 151,936 numbers in bfloat16 are 2.5 GB.
ROWS_KEPT = 8192

#: the fewest rows that are multiplied. For up to three float32 rows a CPU adds in another order than for many. If a
#: micro-batch keeps one token, its log-probability would then change by 1e-6 although the model's weights did not.
FEWEST_ROWS = 64


def response_positions(offsets: Tensor, response_lengths: Tensor) -> Tensor:
    """The position in a packed batch that predicts each response token: one before the token's own.

    Args:
        offsets: int64, shape (num_rows + 1,): where each sequence (prompt and response) begins, and the last one ends.
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
    """Translate positions of a packed batch into those of the same batch padded on the right, then flattened.

    Args:
        positions: int64, shape (num_positions,), in the packed batch.
        offsets: int64, shape (num_rows + 1,), as in :func:`response_positions`.
        padded_length: the length of every padded row.

    Returns:
        int64, shape (num_positions,).
    """
    rows = torch.searchsorted(offsets, positions, right=True) - 1
    return positions - offsets[rows] + rows * padded_length


@torch.no_grad()
def in_chunks(
    measure: Callable[[Callable[[], Tensor], Tensor], tuple[Tensor, ...]],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int = CHUNK,
) -> tuple[Tensor, ...]:
    """Call ``measure`` on all rows of logits, a chunk of rows at a time. No more rows exist at once.

    Args:
        measure: takes a function that makes logits of shape (n, vocabulary), and the labels of shape (n,). Returns
            tensors of shape (n,). It does not take the logits themselves, because Python 3.10 keeps the arguments of a
            call until it ends, so ``measure`` could not free them.
        hidden: float, shape (num_rows, hidden_size): the last layer's output at these positions.
        weight: same type, shape (vocabulary, hidden_size): the weight of the head, which has no bias.
        labels: int64, shape (num_rows,): the token that followed.
        chunk: rows of logits at once.

    Returns:
        What ``measure`` returns, each of shape (num_rows,).
    """
    pairs = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    parts = [measure(partial(logits_of, part, weight), label) for part, label in pairs]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def logits_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """The logits of these rows. At least :data:`FEWEST_ROWS` are computed, so a row does not depend on their number.

    Args:
        hidden: float, shape (num_rows, hidden_size).
        weight: same type, shape (vocabulary, hidden_size).

    Returns:
        Same type, shape (num_rows, vocabulary).
    """
    missing = FEWEST_ROWS - len(hidden)
    if missing <= 0:
        return linear(hidden, weight)
    return linear(pad(hidden, (0, 0, 0, missing)), weight)[: len(hidden)]


def log_probs_entropy_and_rank(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, chunk: int = CHUNK
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the labels, entropies of the whole distributions, and ranks, in one pass without gradients.

    The matrix product is computed in the type of ``hidden``. Everything after it, the division by the temperature too,
    is computed in float32 or better.

    Args:
        hidden: float, shape (num_rows, hidden_size).
        weight: same type, shape (vocabulary, hidden_size).
        labels: int64, shape (num_rows,).
        temperature: T, which logits are divided by.
        chunk: rows of logits at once.

    Returns:
        Three tensors of shape (num_rows,): log-probabilities and entropies (the paper's Eq. 1) in nats, float32
        (float64 for such input); the number of tokens that are strictly likelier than the label, int64.
    """

    def measure(make: Callable[[], Tensor], labels: Tensor) -> tuple[Tensor, ...]:
        logits = make()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature != 1.0:
            logits.div_(temperature)
        of_label = logits.gather(-1, labels.unsqueeze(-1))
        rank = (logits > of_label).sum(-1)
        return of_label.squeeze(-1) - logits.logsumexp(-1), entropies(logits), rank

    log_probs, entropy, rank = in_chunks(measure, hidden, weight, labels, chunk)
    return log_probs, entropy, rank
