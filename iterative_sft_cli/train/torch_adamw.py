"""AdamW whose step reads gradients in the dtype they are in and scales them on the way.

Guarantee: state and arithmetic are those of `torch.optim.AdamW`; where the kernel does not serve, that one steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from iterative_sft_cli.train import torch_native


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, and `step_with`."""

    @torch.no_grad()
    def step_with(self, params: Sequence[nn.Parameter], grads: list[Tensor | None], scale: float) -> bool:
        """Step on `scale` times `grads`, one a parameter, which are used up. False, and nothing done, where it does not serve."""
        if "step" in self.__dict__ or self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks:
            return False  # somebody listens to `step`
        if not all(_fits(p, g) for p, g in zip(params, grads, strict=True) if g is not None):
            return False
        groups = {id(param): group for group in self.param_groups for param in group["params"]}
        if any(id(param) not in groups for param in params):
            return False
        for number, param in enumerate(params):
            grad, grads[number] = grads[number], None
            if grad is None:
                continue
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
            state["step"] += 1
            step = int(state["step"].item())
            torch_native.adamw(param, grad, state["exp_avg"], state["exp_avg_sq"], groups[id(param)], step, scale)
        return True


def _fits(param: Tensor, grad: Tensor) -> bool:
    plain = param.dtype == torch.float32 and grad.dtype in (torch.float32, torch.bfloat16)
    return plain and torch_native.offered(param, 16) and param.is_contiguous() and grad.is_contiguous()
