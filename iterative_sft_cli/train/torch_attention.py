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
_BLOCK = 128
"""Queries at a time: what lies above the diagonal blocks is never computed."""
_KEEP = 640
"""Rows up to this length keep their probabilities for the backward pass; longer ones compute them again."""


class _Rows:
    """Lengths of the rows now in flight. One a process: backward may run on other threads, so no thread-local."""

    lengths: tuple[int, ...] = ()


_masks: dict[tuple[int, torch.dtype], Tensor] = {}


def _above_diagonal(size: int, dtype: torch.dtype) -> Tensor:
    """(size, size): minus infinity above the diagonal, 0 elsewhere."""
    found = _masks.get((size, dtype))
    if found is None:
        found = torch.full((size, size), float("-inf"), dtype=dtype).triu_(1)
        _masks[size, dtype] = found
    return found


def _probabilities(query: Tensor, keys: Tensor, rows: int) -> Tensor:
    """Causal softmax of a block: `query` (kv heads, group x rows, size) scaled, `keys` (kv heads, seen, size)."""
    scores = torch.bmm(query, keys.transpose(1, 2))
    wide = scores.view(-1, rows, keys.shape[1])
    wide[:, :, -rows:].add_(_above_diagonal(rows, scores.dtype))
    return torch.softmax(wide, -1).view_as(scores)


class _CausalRows(torch.autograd.Function):
    """Two matrix products a block, with the heads of a group folded into the rows.

    In bf16 on a CPU that takes a quarter of the time of scaled_dot_product_attention's kernel, backward included.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
        heads, total, size = query.shape
        groups, share = key.shape[0], heads // key.shape[0]
        query = query * scale
        out = torch.empty(total, heads, size, dtype=query.dtype)
        kept: list[Tensor] = []
        start = 0
        for length in lengths:
            keys, values = (states[:, start : start + length].contiguous() for states in (key, value))
            for low in range(0, length, _BLOCK):
                high = min(length, low + _BLOCK)
                block = query[:, start + low : start + high].reshape(groups, share * (high - low), size)
                probs = _probabilities(block, keys[:, :high], high - low)
                if length <= _KEEP:
                    kept.append(probs)
                mixed = torch.bmm(probs, values[:, :high])
                out[start + low : start + high] = mixed.view(heads, high - low, size).transpose(0, 1)
            start += length
        ctx.save_for_backward(query, key, value, *kept)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        heads, total, size = query.shape
        groups, share = key.shape[0], heads // key.shape[0]
        upstream = grads[0].transpose(0, 1)
        grad_query = torch.empty(total, heads, size, dtype=query.dtype)
        grad_key, grad_value = (torch.empty(total, groups, size, dtype=query.dtype) for _ in range(2))
        start = used = 0
        for length in ctx.lengths:
            keys, values = (states[:, start : start + length].contiguous() for states in (key, value))
            to_keys: Tensor | None = None
            to_values: Tensor | None = None
            for low in range(0, length, _BLOCK):
                high = min(length, low + _BLOCK)
                rows = high - low
                place = slice(start + low, start + high)
                block = query[:, place].reshape(groups, share * rows, size)
                above = upstream[:, place].reshape(groups, share * rows, size)
                if length <= _KEEP:
                    probs, used = kept[used], used + 1
                else:
                    probs = _probabilities(block, keys[:, :high], rows)
                down = torch.bmm(above, values[:, :high].transpose(1, 2))
                down = torch._softmax_backward_data(down, probs, -1, down.dtype)
                grad_query[place] = torch.bmm(down, keys[:, :high]).view(heads, rows, size).transpose(0, 1)
                part_key = torch.bmm(down.transpose(1, 2), block)
                part_value = torch.bmm(probs.transpose(1, 2), above)
                if length <= _BLOCK:
                    to_keys, to_values = part_key, part_value
                    continue
                if to_keys is None or to_values is None:
                    to_keys, to_values = (torch.zeros(groups, length, size, dtype=torch.float32) for _ in range(2))
                to_keys[:, :high] += part_key
                to_values[:, :high] += part_value
            assert to_keys is not None and to_values is not None
            grad_key[start : start + length] = to_keys.transpose(0, 1)
            grad_value[start : start + length] = to_values.transpose(0, 1)
            start += length
        grad_query *= ctx.scale
        return grad_query.transpose(0, 1), grad_key.transpose(0, 1), grad_value.transpose(0, 1), None, None


def rows_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each row of `query` (1, heads, total, size); returns (1, total, heads, size).

    Raises NotImplementedError for what it does not compute (soft caps, windows, sinks, biases).
    """
    for name in ("softcap", "sliding_window", "s_aux", "position_bias"):
        if more.get(name) is not None:
            raise NotImplementedError(name)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if query.device.type == "cpu" and not dropout:
        mixed: Tensor = _CausalRows.apply(query[0], key[0], value[0], _Rows.lengths, scale)  # type: ignore[no-untyped-call]
        return mixed[None], None
    grouped = query.shape[1] != key.shape[1]
    parts: list[Tensor] = []
    start = 0
    for length in _Rows.lengths:
        q, k, v = (states[:, :, start : start + length] for states in (query, key, value))
        parts.append(
            functional.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=length > 1, scale=scale, enable_gqa=grouped
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


def lengths_now() -> tuple[int, ...]:
    """The lengths of the rows that lie end to end now; empty outside `rows_layout`."""
    return _Rows.lengths


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
