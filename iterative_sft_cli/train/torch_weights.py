"""Full-precision weights and the copies that are computed with.

Guarantee: the fp32 masters are the truth. Compute copies are cast from them once a step, and no gradient is ever summed in
less than fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Weights:
    """The parameters of a model as trained.

    `names`, `params` and `masters` run in parallel over the trainable parameters, tied ones once. A master is the parameter
    itself when that is fp32, else an fp32 copy held here, rounded into the parameter by `publish`. With `own_masters` false
    the parameters themselves are what the optimizer changes, whatever their dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        compute_dtype: torch.dtype,
        *,
        own_masters: bool = True,
        together: Sequence[Sequence[nn.Parameter]] = (),
    ) -> None:
        """`together` lists matrices of equal width whose compute copies are laid end to end."""
        self.model = model
        self._together = together
        self.compute_dtype = compute_dtype
        self.names: list[str] = []
        self.params: list[nn.Parameter] = []
        self.masters: list[nn.Parameter] = []
        for name, param in model.named_parameters():
            if not param.requires_grad:
                continue
            self.names.append(name)
            self.params.append(param)
            if param.dtype == torch.float32 or not own_masters:
                self.masters.append(param)
            else:
                self.masters.append(nn.Parameter(param.detach().float()))
        self._copies: dict[nn.Parameter, nn.Parameter] = {}
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._sums: list[Tensor | None] = []

    def _needs_copy(self, param: nn.Parameter) -> bool:
        return param.dtype == torch.float32 and self.compute_dtype != torch.float32

    @torch.no_grad()
    def cast(self, *, frozen: bool) -> None:
        """Bring the compute copies up to date with the parameters; `frozen` ones too when asked."""
        if not self._places:
            for group in self._together:
                self._join(group)
                frozen = True
            for module in self.model.modules():
                for key, param in module._parameters.items():
                    if param is not None and self._needs_copy(param):
                        if param not in self._copies:
                            copy = torch.empty_like(param, dtype=self.compute_dtype)
                            self._copies[param] = nn.Parameter(copy, requires_grad=param.requires_grad)
                            frozen = True
                        self._places.append((module, key, param))
        for param, copy in self._copies.items():
            if frozen or param.requires_grad:
                copy.copy_(param)

    def _join(self, group: Sequence[nn.Parameter]) -> None:
        """Make the copies of a group out of one piece of memory."""
        if not all(self._needs_copy(param) and param not in self._copies for param in group):
            return
        rows = [param.shape[0] for param in group]
        whole = torch.empty(sum(rows), group[0].shape[1], dtype=self.compute_dtype, device=group[0].device)
        for param, part in zip(group, torch.split(whole, rows), strict=True):
            self._copies[param] = nn.Parameter(part, requires_grad=param.requires_grad)

    def drop_copies(self) -> None:
        """Free the compute copies."""
        self._copies, self._places = {}, []

    @property
    def compute(self) -> list[nn.Parameter]:
        """What the forward pass uses for each trainable parameter."""
        return [self._copies.get(param, param) for param in self.params]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the modules hold the compute copies."""
        for module, key, param in self._places:
            module._parameters[key] = self._copies[param]
        try:
            yield
        finally:
            for module, key, param in self._places:
                module._parameters[key] = param

    @contextmanager
    def gathering(self, in_fp32: bool) -> Iterator[None]:
        """Inside, every backward pass adds to one sum a parameter; with `in_fp32` the sum is fp32 whatever the compute dtype."""
        handles = []
        self._sums = [None] * len(self.params)
        for number, copy in enumerate(self.compute):
            copy.grad = None
            if in_fp32 and copy.dtype != torch.float32:

                def add(tensor: Tensor, number: int = number) -> None:
                    grad, tensor.grad = tensor.grad, None
                    assert grad is not None
                    total = self._sums[number]
                    if total is None:
                        self._sums[number] = grad.float()
                    else:
                        total.add_(grad)

                handles.append(copy.register_post_accumulate_grad_hook(add))  # type: ignore[no-untyped-call]
        try:
            yield
            for number, copy in enumerate(self.compute):
                if copy.grad is not None:
                    self._sums[number] = copy.grad
        finally:
            for handle in handles:
                handle.remove()
            for copy in self.compute:
                copy.grad = None

    def take_gradients(self) -> list[Tensor | None]:
        """The sums of the last `gathering`, one a parameter (None where nothing flowed); they are forgotten here."""
        sums, self._sums = self._sums, []
        return sums

    @torch.no_grad()
    def publish(self) -> None:
        """Round masters that are copies into the model's parameters."""
        for param, master in zip(self.params, self.masters, strict=True):
            if master is not param:
                param.copy_(master)

    @torch.no_grad()
    def reread(self) -> None:
        """Take masters that are copies from the model's parameters, after those were replaced from outside."""
        for param, master in zip(self.params, self.masters, strict=True):
            if master is not param:
                master.copy_(param)
