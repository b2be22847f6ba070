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

from iterative_sft_cli.train import torch_native

_CHUNK = 512
"""Tokens whose logits are made in one matrix product."""
_SLICE = 32
"""Tokens whose logits are normalised at once, in fp32; few enough to stay in the cache."""


class Scratch:
    """Buffers that outlive a step: memory that is fresh from the system costs more to touch than to compute with."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def get(self, name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised (rows, columns) tensor; the same memory for the same name as long as it is large enough."""
        held = self._held.get(name)
        if held is None or held.numel() < rows * columns or held.dtype != dtype or held.device != device:
            self._held.pop(name, None)
            held = self._held[name] = torch.empty(rows * columns, dtype=dtype, device=device)
        return held[: rows * columns].view(rows, columns)

    def clear(self) -> None:
        """Give the memory back."""
        self._held.clear()


class _TokenLogprobs(torch.autograd.Function):
    """(hidden, weight, bias, targets) -> log p(target) and the mean log p over the vocabulary, fp32.

    What the backward pass needs of the logits, softmax minus one-hot, is made at once in the compute dtype, and with it the
    gradient of `hidden` up to each token's own factor, while the logits are still in the cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        want_mean: bool,
        scratch: Scratch | None,
    ) -> tuple[Tensor, Tensor]:
        count, vocabulary = hidden.shape[0], weight.shape[0]
        dtype, device = hidden.dtype, hidden.device
        keep = any(ctx.needs_input_grad)
        memory = Scratch() if scratch is None else scratch
        ahead = keep and not want_mean and ctx.needs_input_grad[0]
        native = not want_mean and torch_native.offered(hidden, 16)
        down = memory.get("down", count, vocabulary, dtype, device) if keep else None
        grad_hidden = torch.empty_like(hidden) if ahead else None
        logprobs = torch.empty(count, dtype=torch.float32, device=device)
        means = torch.empty(count if want_mean else 0, dtype=torch.float32, device=device)
        size = min(_CHUNK, count)
        piece = _SLICE if device.type == "cpu" else _CHUNK
        logits_memory = memory.get("logits", size, vocabulary, dtype, device)
        wide_memory = memory.get("wide", min(piece, size), vocabulary, torch.float32, device)
        normal_memory = memory.get("normal", min(piece, size), vocabulary, torch.float32, device)
        for start in range(0, count, _CHUNK):
            end = min(start + _CHUNK, count)
            logits = down[start:end] if native and down is not None else logits_memory[: end - start]
            torch.mm(hidden[start:end], weight.t(), out=logits)
            if bias is not None:
                logits += bias
            if native:
                logprobs[start:end] = torch_native.softmax(logits, targets[start:end], keep=keep)
                if grad_hidden is not None:
                    torch.mm(logits, weight, out=grad_hidden[start:end])
                continue
            for low in range(0, end - start, piece):
                part = logits[low : low + piece]
                place = slice(start + low, start + low + part.shape[0])
                wide = wide_memory[: part.shape[0]].copy_(part)
                normal = torch.log_softmax(wide, -1, out=normal_memory[: part.shape[0]])
                logprobs[place] = normal.gather(1, targets[place, None]).squeeze(1)
                if want_mean:
                    means[place] = normal.mean(-1)
                if down is not None:
                    torch.softmax(part, -1, out=down[place])
            if down is not None and not want_mean:
                # p - 1 at the label from the log-probability: in bf16 the difference itself would vanish for sure tokens
                numbers = torch.arange(start, end, device=device)
                down[numbers, targets[start:end]] = torch.expm1(logprobs[start:end]).to(dtype)
            if grad_hidden is not None and down is not None:
                torch.mm(down[start:end], weight, out=grad_hidden[start:end])
        ctx.save_for_backward(hidden, weight, targets)
        ctx.down, ctx.grad_hidden, ctx.has_bias, ctx.want_mean = down, grad_hidden, bias is not None, want_mean
        return logprobs, means

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        down: Tensor = ctx.down
        grad_hidden: Tensor | None = ctx.grad_hidden
        ctx.down = ctx.grad_hidden = None
        grad, grad_mean = grads
        grad_weight = grad_bias = None
        if ctx.want_mean:
            for start in range(0, down.shape[0], _SLICE):
                part = slice(start, start + _SLICE)
                wide = down[part].float() * -(grad[part] + grad_mean[part])[:, None]
                wide += (grad_mean[part] / weight.shape[0])[:, None]
                wide.scatter_add_(1, targets[part, None], grad[part, None])
                down[part] = wide
            if ctx.needs_input_grad[0]:
                grad_hidden = down @ weight
            scaled = hidden
        else:
            scale = (-grad)[:, None].to(hidden.dtype)
            scaled = hidden * scale
            if grad_hidden is not None:
                grad_hidden *= scale
            if ctx.has_bias and ctx.needs_input_grad[2]:
                grad_bias = (scale.t() @ down).squeeze(0)
        if ctx.needs_input_grad[1]:
            grad_weight = down.t() @ scaled
        if ctx.want_mean and ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = down.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    want_mean: bool = False,
    scratch: Scratch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(target) (N,) and, if wanted, the mean log-probability over the vocabulary (N,), both fp32 and differentiable.

    `hidden` (N, H), `weight` (V, H), `bias` (V,) or None, `targets` (N,).
    With a `scratch` the backward pass must come before the next call that uses it.
    """
    logprobs, means = _TokenLogprobs.apply(hidden, weight, bias, targets, want_mean, scratch)  # type: ignore[no-untyped-call]
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
