"""RMS normalisation in a third of the passes over memory that the modules' own code makes.

Guarantee: a class of modules is only replaced after its own forward and backward gave the same numbers on a probe; the
modules are themselves again when the step is over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from iterative_sft_cli.train import torch_native


class _RmsNorm(torch.autograd.Function):
    """weight * (x / sqrt(mean(x^2) + eps)): the quotient in fp32, rounded to the dtype of x before the weight, as Llama's is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.native = weight.dtype == x.dtype and x.is_contiguous() and torch_native.offered(x, x.shape[-1])
        if ctx.native:
            out, factors = torch_native.norm(x, weight, eps)
            ctx.save_for_backward(x, weight, factors)
            return out
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = torch.mul(x, scale, out=torch.empty_like(x))
        ctx.save_for_backward(unit, weight, scale)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        unit, weight, scale = ctx.saved_tensors
        grad = grads[0]
        if ctx.native:
            return *torch_native.norm_back(unit, weight, scale, grad), None
        product = grad * unit
        grad_weight = product.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        along = (product @ weight[:, None]).div_(unit.shape[-1])
        down = torch.addcmul(grad * weight, unit, along, value=-1)
        return torch.mul(down, scale, out=down), grad_weight, None


def _eps(module: nn.Module) -> float | None:
    value = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(value) if isinstance(value, float) else None


def _agrees(module: nn.Module) -> bool:
    """Whether the module computes what `_RmsNorm` does, forward and backward, on random numbers in fp32."""
    weight = module.weight
    eps = _eps(module)
    assert isinstance(weight, Tensor) and eps is not None
    generator = torch.Generator().manual_seed(0)
    x, up = (torch.randn(2, 3, weight.shape[0], generator=generator).to(weight.device) for _ in range(2))
    fill = torch.rand(weight.shape[0], generator=generator).to(weight.device)
    earlier = module._parameters["weight"]
    found = []
    try:
        for own in (True, False):
            leaf, scale = x.clone().requires_grad_(), nn.Parameter(fill.clone())
            module._parameters["weight"] = scale
            with torch.enable_grad():
                out = module(leaf) if own else _RmsNorm.apply(leaf, scale, eps)  # type: ignore[no-untyped-call]
                out.backward(up)
            found.append((out.detach(), leaf.grad, scale.grad))
    except (RuntimeError, TypeError, AttributeError):
        return False
    finally:
        module._parameters["weight"] = earlier
    return all(
        a is not None and b is not None and a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(*found, strict=True)
    )


def rms_norms(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that `fused_norms` may stand in for."""
    agreed: dict[type, bool] = {}
    chosen = []
    for module in model.modules():
        weight = module._parameters.get("weight")
        if "RMSNorm" not in type(module).__name__ or weight is None or weight.dim() != 1 or _eps(module) is None:
            continue
        if set(module._parameters) != {"weight"} or "forward" in module.__dict__:
            continue
        if type(module) not in agreed:
            agreed[type(module)] = _agrees(module)
        if agreed[type(module)]:
            chosen.append(module)
    return chosen


@contextmanager
def fused_norms(modules: list[nn.Module]) -> Iterator[None]:
    """Inside, these modules compute in fused form."""

    def stand_in(module: nn.Module) -> Any:
        eps = _eps(module)
        return lambda x: _RmsNorm.apply(x, module.weight, eps)  # type: ignore[no-untyped-call]

    for module in modules:
        module.__dict__["forward"] = stand_in(module)
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)
