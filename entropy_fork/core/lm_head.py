"""The LM head at chosen positions only: which ones, and what is computed of their logits.

A row of logits has as many numbers as the vocabulary, 151,936 for Qwen3, and every other tensor of a step is small
beside them. But a loss looks at a few of these rows: none of a prompt, and with token weights of zero none of what was
dropped. :func:`response_positions` says where the response's predictions lie in a packed batch; :func:`in_chunks` is
the pass without gradients, for any number of rows in a fixed amount of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from entropy_fork.core.entropy import entropies

#: rows of logits that exist at once: 512 × 151,936 × 4 bytes are 0.3 GB, and a GPU is busy with them
CHUNK = 512

#: as many rows of logits are kept for the backward pass, as in an ordinary head; more are computed a second time, so
#: many at once. 8192 × 151,936 in bfloat16 are 2.5 GB.
ROWS_KEPT = 8192

#: rows of a product, at least. A CPU multiplies up to three rows of float32 in another order than many, and then
#: unchanged weights would give another log-probability, by 1e-6, where a micro-batch keeps one token.
FEWEST_ROWS = 64


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
def in_chunks(
    measure: Callable[[Callable[[], Tensor], Tensor], tuple[Tensor, ...]],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int = CHUNK,
) -> tuple[Tensor, ...]:
    """Measure every row of logits, a chunk of rows at a time; no more rows exist at once.

    Args:
        measure: from a function that makes logits, shape (n, vocabulary), and their labels, shape (n,), to tensors of
            shape (n,). A function, because Python 3.10 keeps the arguments of a call until it ends: ``measure`` could
            not free logits that it was given.
        hidden: float, shape (num_rows, hidden_size): the last layer's output at these positions.
        weight: same type, shape (vocabulary, hidden_size): the head's, which has no bias.
        labels: int64, shape (num_rows,): the token that followed.
        chunk: rows of logits at once.

    Returns:
        What ``measure`` returns, each of shape (num_rows,).
    """
    pairs = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    parts = [measure(partial(logits_of, part, weight), label) for part, label in pairs]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def logits_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """The head's product, whose rows do not depend on how many there are: at least :data:`FEWEST_ROWS` are computed.

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

    The matrix product is made in the type of ``hidden``, everything after it, the temperature included, in float32 or
    better.

    Args:
        hidden: float, shape (num_rows, hidden_size).
        weight: same type, shape (vocabulary, hidden_size).
        labels: int64, shape (num_rows,).
        temperature: T, which logits are divided by.
        chunk: rows of logits at once.

    Returns:
        Three tensors of shape (num_rows,): log-probabilities and entropies (the paper's Eq. 1) in nats, float32
        (float64 for such input); how many tokens are strictly likelier than the label, int64.
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
