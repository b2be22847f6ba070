"""Optimizers by name, over fp32 masters, and their state as plain named tensors.

Guarantee: `state_tensors` followed by `load_state_tensors` gives back the same bytes, so that the next step is the same too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.train.torch_adamw import AdamW
from iterative_sft_cli.train.torch_settings import StepSettings

_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""transformers.Trainer.get_decay_parameter_names: biases and normalisation weights are not decayed."""


def decays(name: str, module_is_norm: bool) -> bool:
    """Whether weight decay applies to a parameter of this name."""
    return not module_is_norm and not _NO_DECAY.search(name.lower())


def _groups(
    model: nn.Module, names: Sequence[str], masters: Sequence[nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    norms = {
        f"{prefix}.{key}" if prefix else key
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for key, _ in module.named_parameters(recurse=False)
    }
    decayed = [m for n, m in zip(names, masters, strict=True) if decays(n, n in norms)]
    others = [m for n, m in zip(names, masters, strict=True) if not decays(n, n in norms)]
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "decays": True},
        {"params": others, "weight_decay": 0.0, "decays": False},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: nn.Module, names: Sequence[str], masters: Sequence[nn.Parameter], settings: StepSettings
) -> torch.optim.Optimizer:
    """The optimizer `settings.optimizer` names, with Hugging Face's decay groups. Raises ConfigError when it cannot be had."""
    groups = _groups(model, names, masters, settings.weight_decay)
    name = settings.optimizer
    betas = (settings.adam_beta1, settings.adam_beta2)
    if name == "adamw":
        kinds = {master.device.type for master in masters}
        fused = kinds <= {"cpu", "cuda"} and all(master.is_floating_point() for master in masters)
        return AdamW(
            groups, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon, fused=fused, foreach=None
        )
    if name == "adafactor":
        from transformers.optimization import Adafactor

        made: torch.optim.Optimizer = Adafactor(
            groups, lr=settings.learning_rate, scale_parameter=False, relative_step=False
        )
        return made
    if name == "adamw_8bit":
        try:
            import bitsandbytes
        except ImportError:
            raise ConfigError(
                "optimizer adamw_8bit needs the package bitsandbytes",
                where="train.optimizer",
                hint="pip install 'iterative-sft-cli[quant]', or use adamw",
            ) from None
        eight: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
            groups, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon
        )
        return eight
    raise ConfigError(f"unknown optimizer {name!r}", where="train.optimizer", expected="adamw, adamw_8bit or adafactor")


def set_weight_decay(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The decay of the groups that decay."""
    for group in optimizer.param_groups:
        group["weight_decay"] = value if group.get("decays") else 0.0


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The same rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def state_tensors(
    optimizer: torch.optim.Optimizer, names: Sequence[str], masters: Sequence[nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors keyed `optimizer/<key>/<parameter>` and the scalars, `{parameter: {key: value}}`."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, master in zip(names, masters, strict=True):
        for key, value in optimizer.state.get(master, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{key}/{name}"] = value.detach()
            elif value is None or isinstance(value, bool | int | float | str):
                scalars.setdefault(name, {})[key] = value
            else:
                raise DataError(f"optimizer state {key!r} is a {type(value).__name__} and cannot be stored")
    return tensors, scalars


def load_state_tensors(
    optimizer: torch.optim.Optimizer,
    names: Sequence[str],
    masters: Sequence[nn.Parameter],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
) -> None:
    """Put the state back as it was; unknown parameters are a DataError."""
    by_name = dict(zip(names, masters, strict=True))
    optimizer.state.clear()
    for full, value in tensors.items():
        if not full.startswith("optimizer/"):
            continue
        _, key, name = full.split("/", 2)
        if name not in by_name:
            raise DataError(f"optimizer state for {name!r}, which the model does not train")
        master = by_name[name]
        on_host = value.dim() == 0 and key == "step"
        optimizer.state[master][key] = value.clone() if on_host else value.to(master.device, copy=True)
    for name, values in scalars.items():
        if name not in by_name:
            raise DataError(f"optimizer state for {name!r}, which the model does not train")
        optimizer.state[by_name[name]].update(values)
