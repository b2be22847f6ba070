"""Matrix products with weights laid out once for the matrix library, and what follows them fused in.

Guarantee: the product of the given weights, rounded once to their dtype; where the library has no prepared form, plain
`linear` computes the same.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, silu

_ROWS_HINT = 128
"""Rows for which the layout is chosen; measured: the layout is the same from 1 to 256."""


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN has a prepared form for this weight here: bfloat16 on a CPU with bfloat16 products."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch._C._has_mkldnn:
        return False
    ops = torch.ops.mkldnn
    return hasattr(ops, "_linear_pointwise") and bool(ops._is_mkldnn_bf16_supported())


class Linear:
    """y = x @ weight.T + bias for x [rows, inputs]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.bias = bias
        self.packed = can_pack(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT) if self.packed else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        if self.packed:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return y
        return linear(x, self.weight, self.bias)

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        """silu of the product."""
        if self.packed:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "swish", [], "")
            return y
        return silu(linear(x, self.weight, self.bias))

    def add(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The product plus `other`."""
        if self.packed:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")
            return y
        return linear(x, self.weight, self.bias).add_(other)

    def times(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The product times `other`, element by element."""
        if self.packed:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "mul")
            return y
        return linear(x, self.weight, self.bias).mul_(other)
