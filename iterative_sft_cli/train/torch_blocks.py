"""Attention and gated feed-forward blocks as one differentiable step each: one product for what shares an input, little memory.

Guarantee: a kind of block is only stood in for after its own forward and backward gave the same numbers on a probe, and only
while nobody else has hooked, wrapped or adapted its layers; otherwise the model's own code runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from iterative_sft_cli.train import torch_attention, torch_native

_GATED = ("gate_proj", "up_proj", "down_proj")
_HEADS = ("q_proj", "k_proj", "v_proj", "o_proj")
_PASSED_OVER = frozenset({"position_ids", "cache_position", "attention_mask"})
"""Arguments of an attention block that say nothing which the layout of the rows does not say already."""


def _joined(weights: Sequence[Tensor]) -> Tensor | None:
    """The weights as one, when they lie end to end in memory."""
    first = weights[0]
    end = first.data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or not weight.is_contiguous() or weight.shape[1] != first.shape[1]:
            return None
        end += weight.numel() * weight.element_size()
    if first.untyped_storage().data_ptr() != weights[-1].untyped_storage().data_ptr():
        return None
    return torch.as_strided(first, (sum(weight.shape[0] for weight in weights), first.shape[1]), first.stride())


def _products(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    """x @ weight.T for each weight; and all of them as one tensor where one product made them."""
    joined = _joined(weights)
    if joined is None:
        return None, [x @ weight.t() for weight in weights]
    whole = x @ joined.t()
    return whole, list(torch.split(whole, [weight.shape[0] for weight in weights], dim=1))


def _back(
    grads: Sequence[Tensor], whole: Tensor | None, x: Tensor, weights: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x and of the weights; `wanted` says which, x first."""
    joined = None if whole is None else _joined(weights)
    if joined is None or whole is None:
        down = None
        if wanted[0]:
            down = grads[0] @ weights[0]
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                down.addmm_(grad, weight)
        return down, [grad.t() @ x if want else None for grad, want in zip(grads, wanted[1:], strict=True)]
    down = whole @ joined if wanted[0] else None
    if not any(wanted[1:]):
        return down, [None] * len(weights)
    parts = torch.split(whole.t() @ x, [weight.shape[0] for weight in weights])
    return down, [part if want else None for part, want in zip(parts, wanted[1:], strict=True)]


class _Gated(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)); the product of the two is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        whole, (a, b) = _products(flat, (gate, up))
        ctx.save_for_backward(flat, a, b, gate, up, down)
        ctx.shape, ctx.joined = x.shape, whole is not None
        out = torch_native.swiglu(a, b) @ down.t()
        shaped: Tensor = out.view(*x.shape[:-1], down.shape[0])
        return shaped

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, a, b, gate, up, down = ctx.saved_tensors
        above = grads[0].reshape(-1, down.shape[0])
        inner = a.shape[1]
        both = torch.empty(a.shape[0], 2 * inner, dtype=a.dtype) if ctx.joined else None
        if both is not None:
            to_a, to_b = torch.split(both, inner, dim=1)
        else:
            to_a, to_b = torch.empty_like(a), torch.empty_like(b)
        mixed = torch_native.swiglu_back(a, b, above @ down, to_a, to_b)
        to_down = above.t() @ mixed if ctx.needs_input_grad[3] else None
        to_x, to_weights = _back((to_a, to_b), both, flat, (gate, up), ctx.needs_input_grad[:3])
        return (None if to_x is None else to_x.view(ctx.shape)), *to_weights, to_down


class _Heads(torch.autograd.Function):
    """Causal attention of rows that lie end to end, from x to what the output projection takes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, query: Tensor, key: Tensor, value: Tensor, cosine: Tensor, sine: Tensor, form: Any
    ) -> Tensor:
        lengths, width, scale = form
        flat = x.reshape(-1, x.shape[-1])
        heads, kv_heads = query.shape[0] // width, key.shape[0] // width
        whole, parts = _products(flat, (query, key, value))
        line = torch.cat(parts, dim=1) if whole is None else whole
        torch_native.turn(line, cosine, sine, heads + kv_heads, width, back=False)
        mixed = torch_native.attend(line, lengths, heads, kv_heads, width, scale)
        out: Tensor = mixed[0]
        ctx.save_for_backward(flat, line, *mixed, cosine, sine, query, key, value)
        ctx.form, ctx.shape = (lengths, heads, kv_heads, width, scale), x.shape
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, line, out, logs, cosine, sine, *weights = ctx.saved_tensors
        lengths, heads, kv_heads, width, scale = ctx.form
        whole = torch_native.attend_back(line, lengths, heads, kv_heads, width, scale, out, logs, grads[0])
        torch_native.turn(whole, cosine, sine, heads + kv_heads, width, back=True)
        parts = torch.split(whole, [weight.shape[0] for weight in weights], dim=1)
        to_x, to_weights = _back(parts, whole, flat, weights, ctx.needs_input_grad[:4])
        return (None if to_x is None else to_x.view(ctx.shape)), *to_weights, None, None, None


# --- what may be stood in for -------------------------------------------------------------------------------------------


def _untouched(layer: Any) -> bool:
    """A plain linear layer without bias that does nothing else when it is called."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        type(layer) is nn.Linear
        and layer.bias is None
        and "forward" not in layer.__dict__
        and not any(getattr(layer, name) for name in hooks)
    )


def _has(module: nn.Module, names: Sequence[str]) -> bool:
    return not module._parameters and all(_untouched(getattr(module, name, None)) for name in names)


def _is_gated(module: nn.Module) -> bool:
    extra = {name for name, _ in module.named_children()} - set(_GATED)
    return _has(module, _GATED) and len(extra) <= 1 and "forward" not in module.__dict__


def _is_heads(module: nn.Module) -> bool:
    if {name for name, _ in module.named_children()} != set(_HEADS) or not _has(module, _HEADS):
        return False
    return isinstance(getattr(module, "head_dim", None), int) and "forward" not in module.__dict__


def _gated_forward(module: Any) -> Callable[..., Any]:
    own = module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        weights = [getattr(module, name).weight for name in _GATED]
        fits = torch_native.offered(x, weights[0].shape[0]) and all(weight.dtype == x.dtype for weight in weights)
        if args or kwargs or not fits or not _has(module, _GATED):
            return own(x, *args, **kwargs)
        return _Gated.apply(x, *weights)  # type: ignore[no-untyped-call]

    return forward


def _heads_forward(module: Any) -> Callable[..., Any]:
    own = module.forward
    width = module.head_dim
    scale = float(getattr(module, "scaling", width**-0.5))

    def forward(hidden_states: Tensor, position_embeddings: Any = None, *args: Any, **kwargs: Any) -> Any:
        lengths = torch_attention.lengths_now()
        weights = [getattr(module, name).weight for name in _HEADS]
        if (
            args
            or position_embeddings is None
            or any(value is not None and value is not False for key, value in kwargs.items() if key not in _PASSED_OVER)
            or (module.training and getattr(module, "attention_dropout", 0.0))
            or hidden_states.shape[0] != 1
            or hidden_states.shape[1] != sum(lengths)
            or not torch_native.attends(hidden_states, width)
            or any(weight.dtype != hidden_states.dtype for weight in weights)
            or not _has(module, _HEADS)
        ):
            return own(hidden_states, position_embeddings, *args, **kwargs)
        turns = [part.to(hidden_states.dtype).reshape(-1, width).contiguous() for part in position_embeddings]
        if any(part.shape[0] != hidden_states.shape[1] for part in turns):
            return own(hidden_states, position_embeddings, *args, **kwargs)
        mixed = _Heads.apply(hidden_states, *weights[:3], *turns, (lengths, width, scale))  # type: ignore[no-untyped-call]
        return module.o_proj(mixed[None]), None

    return forward


# --- probes -------------------------------------------------------------------------------------------------------------


def _outcome(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, up: Tensor) -> list[Tensor]:
    """What `run` makes of x, and the gradients of x and of the module's weights."""
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        out = run(leaf)
        grads = torch.autograd.grad(out, [leaf, *module.parameters()], up.to(out.dtype))
    return [part.detach().float() for part in (out, *grads)]


def _alike(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> bool:
    return all(
        a.shape == b.shape and float((a - b).abs().max()) <= tolerance * float(b.abs().max().clamp_min(1e-30))
        for a, b in zip(found, wanted, strict=True)
    )


def _random_copy(module: nn.Module, generator: torch.Generator) -> Any:
    """The module with weights of its own, in float32 on the CPU, that are exact in bfloat16."""
    twin = copy.deepcopy(module).to("cpu", torch.float32).requires_grad_().train()  # so that dropout shows
    with torch.no_grad():
        for weight in twin.parameters():
            weight.copy_((torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5).bfloat16())
    return twin


def _agrees_gated(module: nn.Module) -> bool:
    generator = torch.Generator().manual_seed(0)
    twin = _random_copy(module, generator)
    x, up = (torch.randn(1, 5, twin.gate_proj.in_features, generator=generator) for _ in range(2))
    return _alike(_outcome(twin, _gated_forward(twin), x, up), _outcome(twin, twin.forward, x, up), 1e-5)


def _agrees_heads(module: nn.Module) -> bool:
    """In bfloat16 against the module's own float32, row by row; what the roundings make is an order of magnitude smaller."""
    generator = torch.Generator().manual_seed(0)
    twin = _random_copy(module, generator)
    lengths = (70, 5)
    x, up = (torch.randn(1, sum(lengths), twin.q_proj.in_features, generator=generator).bfloat16() for _ in range(2))
    angles = torch.rand(1, sum(lengths), twin.head_dim // 2, generator=generator).repeat(1, 1, 2) * 6.0
    turns = (angles.cos().bfloat16(), angles.sin().bfloat16())

    def by_row(states: Tensor) -> Tensor:
        rows = zip(*(torch.split(part.float(), list(lengths), 1) for part in (states, *turns)), strict=True)
        return torch.cat([twin(row, position_embeddings=(c, s), attention_mask=mask(row))[0] for row, c, s in rows], 1)

    def mask(row: Tensor) -> Tensor:
        size = row.shape[1]
        return torch.full((size, size), float("-inf")).triu(1)[None, None]

    config = copy.copy(twin.config)
    config._attn_implementation = "eager"
    twin.config = config
    wanted = _outcome(twin, by_row, x.float(), up.float())
    twin = twin.bfloat16()
    with torch_attention.rows_layout(twin, lengths):
        found = _outcome(twin, lambda states: _heads_forward(twin)(states, turns)[0], x, up)
    return _alike(found, wanted, 0.03)


class Blocks:
    """The blocks of a model that may be stood in for. `together` lists parameters that are best laid end to end."""

    def __init__(self, model: nn.Module) -> None:
        self._found: list[tuple[Any, Callable[[Any], Callable[..., Any]], Callable[[nn.Module], bool]]] = []
        self.together: list[list[nn.Parameter]] = []
        agreed: dict[Any, bool] = {}
        first = next(model.parameters())
        if first.device.type != "cpu" or hasattr(first, "full_tensor"):  # on a GPU, or cut into pieces
            return
        for module in model.modules():
            if _is_gated(module) and torch_native.offered(torch.empty(0), module.gate_proj.out_features):  # type: ignore[union-attr,arg-type]
                kinds = tuple(type(child) for child in module.children())
                self._take(module, (type(module), kinds), _agrees_gated, _gated_forward, _is_gated, _GATED[:2], agreed)
            elif _is_heads(module) and torch_native.attends(torch.empty(0, dtype=torch.bfloat16), module.head_dim):  # type: ignore[arg-type]
                self._take(module, type(module), _agrees_heads, _heads_forward, _is_heads, _HEADS[:3], agreed)

    def _take(
        self,
        module: Any,
        kind: Any,
        agrees: Callable[[nn.Module], bool],
        stand_in: Callable[[Any], Callable[..., Any]],
        still: Callable[[nn.Module], bool],
        joined: Sequence[str],
        agreed: dict[Any, bool],
    ) -> None:
        if kind not in agreed:
            try:
                agreed[kind] = agrees(module)
            except (RuntimeError, TypeError, AttributeError, ValueError, KeyError, IndexError, AssertionError):
                agreed[kind] = False
        if agreed[kind]:
            self._found.append((module, stand_in, still))
            self.together.append([getattr(module, name).weight for name in joined])

    def __len__(self) -> int:
        return len(self._found)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Inside, these blocks compute in one step each."""
        chosen = [(module, stand_in) for module, stand_in, still in self._found if still(module)]
        for module, stand_in in chosen:
            module.__dict__["forward"] = stand_in(module)
        try:
            yield
        finally:
            for module, _ in chosen:
                module.__dict__.pop("forward", None)
