"""The few sums over ranks that a step needs; with one process they are nothing.

Guarantee: gradients are summed in fp32, in the same order on every rank, and no Python object ever travels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

door: Callable[[], None] | None = None
"""Called before a collective where ranks may come at different times: it returns when all are there, and waits outside of the collective."""


def size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This rank."""
    return dist.get_rank() if size() > 1 else 0


def meet() -> None:
    """Return when every rank has come here, where somebody sees to that."""
    if door is not None:
        door()


def sum_ints(values: Sequence[int], device: torch.device) -> list[int]:
    """Each value summed over ranks."""
    if size() == 1:
        return list(values)
    meet()
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(tensor)
    return [int(value) for value in tensor]


def gather_ints(values: Sequence[int], device: torch.device) -> list[list[int]]:
    """Every rank's values, by rank; all ranks pass equally many."""
    if size() == 1:
        return [list(values)]
    meet()
    mine = torch.tensor(values, dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(size())]
    dist.all_gather(every, mine)
    return [[int(value) for value in tensor] for tensor in every]


def sum_tensor(tensor: Tensor) -> Tensor:
    """`tensor` summed over ranks, in place."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients summed over ranks; a parameter that got none here counts as zeros."""
    if size() == 1:
        return list(grads)
    full = [
        torch.zeros_like(p, dtype=torch.float32) if g is None else g.float() for g, p in zip(grads, like, strict=True)
    ]
    meet()
    works = [dist.all_reduce(grad, async_op=True) for grad in full]
    for work in works:
        work.wait()
    return list(full)


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Rank 0's values everywhere."""
    if size() > 1:
        meet()
        for tensor in tensors:
            dist.broadcast(tensor, 0)
