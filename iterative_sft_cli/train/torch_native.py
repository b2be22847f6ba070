"""Tensors to and from the training kernels in C.

Guarantee: a kernel is offered only for devices, types and shapes it is written for; elsewhere the callers compute the same with
torch. Memory is always torch's own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iterative_sft_cli.native import fingerprint, load

_VERSION = 1
_SUFFIX = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_SHARE = 65536
_PARTS = 16
"""Shares of rows whose sums are added up last: a constant, so that results do not depend on the number of threads."""


def offered(x: Tensor, width: int) -> bool:
    """Whether the row kernels take numbers like those of `x` in rows of `width`."""
    return x.device.type == "cpu" and x.dtype in _SUFFIX and width % 16 == 0 and load("training", _VERSION) is not None


def kernels() -> str | None:
    """`fingerprint` of the kernels in use; None without them."""
    return fingerprint(load("training", _VERSION))


def attends(x: Tensor, width: int) -> bool:
    """Whether attention of this head width is computed for numbers like those of `x`."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return False
    library = load("training", _VERSION)
    return library is not None and bool(library.isft_attends(ctypes.c_int64(width)))


def _call(name: str, *arguments: Any) -> Any:
    library = load("training", _VERSION)
    assert library is not None
    passed: list[Any] = []
    for value in arguments:
        if isinstance(value, Tensor):
            passed.append(ctypes.c_void_p(value.data_ptr()))
        elif isinstance(value, float):
            passed.append(ctypes.c_float(value))
        else:
            passed.append(ctypes.c_int64(value))
    return library[name](*passed)


def _named(base: str, x: Tensor) -> str:
    return f"isft_{base}_{_SUFFIX[x.dtype]}"


def norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMS norm of the rows of contiguous `x`, and each row's factor."""
    width = x.shape[-1]
    rows = x.numel() // width
    out, factors = torch.empty_like(x), torch.empty(rows, dtype=torch.float32)
    _call(_named("norm", x), x, weight, rows, width, epsilon, out, factors)
    return out, factors


def norm_back(x: Tensor, weight: Tensor, factors: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and of `weight`."""
    width = x.shape[-1]
    rows = x.numel() // width
    down, parts = torch.empty_like(x), torch.empty(_PARTS, width, dtype=torch.float32)
    _call(_named("norm_back", x), x, weight, factors, up.contiguous(), rows, width, down, parts, _PARTS)
    return down, parts.sum(0).to(weight.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; both [rows, inner] with the same distance from row to row."""
    rows, inner = gate.shape
    out = torch.empty(rows, inner, dtype=gate.dtype)
    _call(_named("swiglu", gate), gate, up, gate.stride(0), rows, inner, out)
    return out


def swiglu_back(gate: Tensor, up: Tensor, above: Tensor, grad_gate: Tensor, grad_up: Tensor) -> Tensor:
    """Fills the gradients, laid out as `gate` and `up` are, and turns `above` into silu(gate) * up, which is returned."""
    rows, inner = gate.shape
    _call(_named("swiglu_back", gate), gate, up, gate.stride(0), rows, inner, above, grad_gate, grad_up, above)
    return above


def turn(line: Tensor, cosine: Tensor, sine: Tensor, heads: int, width: int, *, back: bool) -> None:
    """Rotary embedding (rotate_half) of the first `heads` heads of each row of `line`, in place; `back` is its transpose."""
    _call(_named("turn", line), line, line.shape[1], cosine, sine, line.shape[0], heads, width, int(back))


def softmax(logits: Tensor, targets: Tensor, *, keep: bool) -> Tensor:
    """log p(target) of each row; with `keep` the logits become probabilities, minus one at the target."""
    rows, width = logits.shape
    logprobs = torch.empty(rows, dtype=torch.float32)
    _call(_named("softmax", logits), logits, targets, rows, width, logprobs, int(keep))
    return logprobs


def _tasks(lengths: Sequence[int], kv_heads: int) -> Tensor:
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    longest = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    return torch.tensor([(starts[n], lengths[n], head) for n in longest for head in range(kv_heads)])


def attend(
    line: Tensor, lengths: Sequence[int], heads: int, kv_heads: int, width: int, scale: float
) -> tuple[Any, ...]:
    """Causal attention inside rows of these lengths: (out [total, heads * width], logs [heads, total])."""
    total = line.shape[0]
    out = torch.empty(total, heads * width, dtype=line.dtype)
    logs = torch.empty(heads, total, dtype=torch.float32)
    tasks = _tasks(lengths, kv_heads)
    if _call("isft_attend", tasks, len(tasks), line, heads, kv_heads, width, scale, out, logs, total):
        raise MemoryError("attention")
    return out, logs


def attend_back(
    line: Tensor, lengths: Sequence[int], heads: int, kv_heads: int, width: int, scale: float, *more: Tensor
) -> Tensor:
    """The gradient of `line`; `more` is out, logs and the gradient of out."""
    out, logs, up = more
    total, grad, tasks = line.shape[0], torch.empty_like(line), _tasks(lengths, kv_heads)
    shape = (heads, kv_heads, width, scale)
    if _call("isft_attend_back", tasks, len(tasks), line, *shape, out, logs, total, up.contiguous(), grad):
        raise MemoryError("attention")
    return grad


def squares(grad: Tensor) -> float:
    """The sum of the squares of a float32 or bfloat16 gradient that lies in one piece."""
    parts = torch.empty(-(-grad.numel() // _SHARE), dtype=torch.float64)
    _call("isft_squares", grad, int(grad.dtype == torch.bfloat16), grad.numel(), parts)
    return float(parts.sum())


def adamw(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, group: dict[str, Any], step: int, scale: float
) -> None:
    """One AdamW step of a float32 parameter, in place; the gradient, float32 or bfloat16, counts `scale` times."""
    small, large = group["betas"]
    _call(
        "isft_adamw", weight, grad, int(grad.dtype == torch.bfloat16), mean, square, weight.numel(), float(group["lr"]),
        float(group["weight_decay"]), float(small), float(large), float(group["eps"]), 1.0 - small**step, 1.0 - large**step,
        float(scale),
    )  # fmt: skip
