"""Attention over rows that lie end to end: each row attends to itself only, and no padding is computed.

Guarantee: a model is only given this when a probe has shown that it yields the same numbers as the padded layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

NAME = "isft_rows"


class _Rows:
    """Lengths of the rows now in flight. One a process: backward may run on other threads, so no thread-local."""

    lengths: tuple[int, ...] = ()


def rows_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each row of `query` (1, heads, total, size); returns (1, total, heads, size)."""
    groups = query.shape[1] // key.shape[1]
    parts: list[Tensor] = []
    start = 0
    for length in _Rows.lengths:
        q, k, v = (states[:, :, start : start + length] for states in (query, key, value))
        parts.append(
            functional.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=length > 1, scale=scaling, enable_gqa=groups > 1
            ).transpose(1, 2)
        )
        start += length
    return torch.cat(parts, dim=1), None


AttentionInterface.register(NAME, rows_attention)


def may_pack(model: nn.Module) -> bool:
    """Whether the model's design allows it: decoder-only, attention from the shared interface, full attention in every layer."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    if not getattr(model, "_supports_attention_backend", False):
        return False
    if getattr(model, "_is_stateful", False) or getattr(config, "sliding_window", None):
        return False
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text is not config:
        return False
    kinds = getattr(config, "layer_types", None)
    return not kinds or set(kinds) == {"full_attention"}


@contextmanager
def rows_layout(model: nn.Module, lengths: tuple[int, ...]) -> Iterator[None]:
    """Inside, `model` attends within rows of these lengths; forward and backward both belong inside."""
    config: Any = model.config
    earlier, _Rows.lengths = (config._attn_implementation, _Rows.lengths), lengths
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation, _Rows.lengths = earlier
