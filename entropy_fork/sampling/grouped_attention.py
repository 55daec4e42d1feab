"""Attention for drawing token by token: the query heads of a group share their keys without a copy of them.

With grouped-query attention several query heads read the same keys and values. On a CPU, transformers' ``sdpa``
(``integrations/sdpa_attention.py``) repeats the whole cache for each head of a group, in each layer and for each token.
A single query position needs no copy: the heads of a group are then handed over as if they were query positions.

Load a model with ``attn_implementation="sdpa"``, so that transformers refuses one that sdpa would compute wrongly, and
hand it to :func:`share_keys`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

#: its name among the attention functions of transformers
NAME = "entropy_fork_grouped"


def share_keys(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, which from now on draws without copies of its keys."""
    model.set_attn_implementation(NAME)
    return model


def grouped_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it.

    Args:
        module: the attention layer.
        query: floating, of the shape (rows, heads, queries, size).
        key: (rows, groups, keys, size), where ``groups`` divides ``heads``.
        value: shaped as ``key``.
        attention_mask: (rows, 1, queries, keys), or None; True or 0.0 where a query sees a key.
        settings: ``scaling``, ``dropout`` and others, as for transformers' ``sdpa``.

    Returns:
        The result (rows, queries, heads, size), and None for the attention weights. With more than one query position
        it is that of ``sdpa``, bit for bit.
    """
    rows, heads, queries, size = query.shape
    groups = key.shape[1]
    if queries > 1 or groups == heads:
        result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **settings
        )
        return result
    output = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(rows, groups, heads // groups, size),
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=settings.get("dropout", 0.0),
        scale=settings.get("scaling"),
    )
    return output.reshape(rows, 1, heads, size), None


ALL_ATTENTION_FUNCTIONS.register(NAME, grouped_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
