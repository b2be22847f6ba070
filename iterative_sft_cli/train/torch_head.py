"""Log-probabilities of the labels, with logits only where a label is.

Guarantee: the model's own forward runs unchanged up to its output layer; the (tokens x vocabulary) matrix exists once, in the
compute dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_CHUNK = 256


class _TokenLogprobs(torch.autograd.Function):
    """(hidden, weight, bias, targets) -> log p(target) and the mean log p over the vocabulary, fp32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, want_mean: bool
    ) -> tuple[Tensor, Tensor]:
        count, vocabulary = hidden.shape[0], weight.shape[0]
        keep = any(ctx.needs_input_grad)
        probs = torch.empty((count, vocabulary) if keep else (0, 0), dtype=hidden.dtype, device=hidden.device)
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        means = torch.empty(count if want_mean else 0, dtype=torch.float32, device=hidden.device)
        for start in range(0, count, _CHUNK):
            part = slice(start, min(start + _CHUNK, count))
            logits = functional.linear(hidden[part], weight, bias)
            wide = logits.float()
            normalizer = wide.logsumexp(-1)
            logprobs[part] = wide.gather(1, targets[part, None]).squeeze(1) - normalizer
            if want_mean:
                means[part] = wide.mean(-1) - normalizer
            if keep:
                torch.softmax(logits, -1, out=probs[part])
        ctx.save_for_backward(hidden, weight, targets, logprobs)
        ctx.probs, ctx.has_bias, ctx.want_mean = probs, bias is not None, want_mean
        return logprobs, means

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, logprobs = ctx.saved_tensors
        down: Tensor = ctx.probs
        ctx.probs = None
        grad, grad_mean = grads
        scale: Tensor | None = None
        if ctx.want_mean:
            for start in range(0, down.shape[0], _CHUNK):
                part = slice(start, start + _CHUNK)
                wide = down[part].float() * -(grad[part] + grad_mean[part])[:, None]
                wide += (grad_mean[part] / weight.shape[0])[:, None]
                wide.scatter_add_(1, targets[part, None], grad[part, None])
                down[part] = wide
        else:
            # p - 1 at the label from the log-probability: in bf16 the difference itself would vanish for sure tokens
            down.scatter_(1, targets[:, None], torch.expm1(logprobs)[:, None].to(down.dtype))
            scale = (-grad)[:, None].to(hidden.dtype)
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_hidden = down @ weight
            if scale is not None:
                grad_hidden *= scale
        if ctx.needs_input_grad[1]:
            grad_weight = down.t() @ (hidden if scale is None else hidden * scale)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = (down if scale is None else down * scale).sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None


def token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, want_mean: bool = False
) -> tuple[Tensor, Tensor | None]:
    """log p(target) (N,) and, if wanted, the mean log-probability over the vocabulary (N,), both fp32 and differentiable.

    `hidden` (N, H), `weight` (V, H), `bias` (V,) or None, `targets` (N,).
    """
    logprobs, means = _TokenLogprobs.apply(hidden, weight, bias, targets, want_mean)  # type: ignore[no-untyped-call]
    return logprobs, means if want_mean else None


def logprobs_of_logits(logits: Tensor, targets: Tensor, want_mean: bool) -> tuple[Tensor, Tensor | None]:
    """The same from logits (N, V) that a model made in its own way (soft caps, scaling, adapters on the output layer)."""
    wide = logits.float().log_softmax(-1)
    return wide.gather(1, targets[:, None]).squeeze(1), wide.mean(-1) if want_mean else None


@contextmanager
def selected(head: nn.Module, positions: Tensor, through: bool) -> Iterator[None]:
    """Inside, the output layer sees only the flattened hidden states at `positions`; with `through` it hands them on untouched."""
    original = head.forward
    earlier = head.__dict__.get("forward")

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)[None]
        return chosen if through else original(chosen, *args, **kwargs)

    head.forward = forward
    try:
        yield
    finally:
        if earlier is None:
            del head.forward
        else:
            head.forward = earlier


def head_is_plain(model: nn.Module, head: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether the model returns what its output layer, a plain `nn.Linear`, made of the hidden states, unaltered."""
    if type(head) is not nn.Linear:
        return False
    made: list[Any] = []
    handle = head.register_forward_hook(lambda _module, _args, output: made.append(output))
    try:
        with torch.no_grad():
            logits = model(**inputs).logits
    finally:
        handle.remove()
    return len(made) == 1 and logits is made[0]
