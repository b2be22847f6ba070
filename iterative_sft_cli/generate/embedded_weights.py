"""The model that generates: a view of the trainer's live model with weights in the compute dtype and adapters merged in.

Guarantee: after `refresh` every weight of the replica equals the live one (merged with its adapter, in float32) rounded once
to the compute dtype; storage is reused from phase to phase, and weights that need no change are shared, not copied.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn


class Replica:
    """A copy of `live`'s module tree for generation. The live model is never changed.

    Without `merge` adapter layers stay layers of their own, cast like the rest.
    """

    def __init__(self, live: nn.Module, dtype: torch.dtype, device: torch.device, *, merge: bool = True) -> None:
        self.merge = merge
        self.live = live
        self.dtype = dtype
        self.device = device
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        self.merged: list[tuple[Any, nn.Parameter]] = []
        self.sources: list[tuple[int, int]] = []
        self.model = self._build()
        self.refresh()

    def is_of(self, live: nn.Module) -> bool:
        """Whether this replica still stands for `live`: same module, same parameter objects and storages."""
        return live is self.live and self.sources == _identity(live)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the live weights over, into the storage that is there."""
        for source, copied in self.pairs:
            copied.copy_(source)
        for layer, copied in self.merged:
            copied.copy_(merged_weight(layer))
        for source_buffer, own in zip(self.live.buffers(), self._buffers, strict=True):
            if own is not None and own.shape == source_buffer.shape:
                own.copy_(source_buffer)
        self._verify()

    def _verify(self) -> None:
        """Raises RuntimeError unless every unmerged weight begins as the live one of its name does (a bug, not bad input)."""
        merged = {id(own) for _, own in self.merged}
        live = dict(self.live.named_parameters())
        for name, own in self.model.named_parameters():
            source = live.get(name)
            if source is None or id(own) in merged:
                continue
            start = source.detach().flatten()[:16].to(own.device, own.dtype)
            if not torch.equal(own.detach().flatten()[:16], start) and not bool(start.isnan().any()):
                raise RuntimeError(f"generation would run on old weights: {name} differs from the trainer's")

    def _build(self) -> Any:
        layers = _adapter_layers(self.live) if self.merge else []
        base_weight = {id(layer.get_base_layer().weight): layer for layer in layers}
        memo: dict[int, Any] = {}
        for parameter in self.live.parameters():
            layer = base_weight.get(id(parameter))
            usable = parameter.dtype == self.dtype or not parameter.is_floating_point()
            if layer is None and usable and parameter.device == self.device:
                memo[id(parameter)] = parameter
                continue
            own = nn.Parameter(torch.empty_like(parameter, dtype=self.dtype, device=self.device), requires_grad=False)
            memo[id(parameter)] = own
            if layer is None:
                self.pairs.append((parameter, own))
            else:
                self.merged.append((layer, own))
        twin: Any = copy.deepcopy(self.live, memo)
        self._buffers = [memo.get(id(buffer)) for buffer in self.live.buffers()]
        self.sources = _identity(self.live)
        if layers:
            twin = twin.unload()
            own_weights = {id(p) for p in twin.parameters()}
            self.pairs = [(s, own) for s, own in self.pairs if id(own) in own_weights]
        return twin.to(self.device).eval()


def _identity(model: nn.Module) -> list[tuple[int, int]]:
    return [(id(p), p.data_ptr()) for p in model.parameters()]


def _adapter_layers(model: nn.Module) -> list[Any]:
    """The LoRA layers of a PeftModel, empty for a plain model."""
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def can_merge(model: nn.Module) -> bool:
    """Whether generation may run on merged weights: no adapter, or plain LoRA over unquantised layers."""
    if not hasattr(model, "peft_config"):
        return True
    layers = _adapter_layers(model)
    if not layers or any(config.peft_type != "LORA" for config in cast(Any, model).peft_config.values()):
        return False
    for layer in layers:
        base = layer.get_base_layer()
        if type(base).__name__ not in ("Linear", "Conv1D") or not base.weight.is_floating_point():
            return False
        if any(layer.use_dora.get(name, False) for name in layer.active_adapters):
            return False
        if any(getattr(layer, "lora_bias", {}).get(name, False) for name in layer.active_adapters):
            return False
    return all(not getattr(config, "modules_to_save", None) for config in cast(Any, model).peft_config.values())


def merged_weight(layer: Any) -> torch.Tensor:
    """base + every active adapter's delta, in float32."""
    weight: torch.Tensor = layer.get_base_layer().weight.float()
    if layer.disable_adapters or layer.merged:
        return weight
    for name in layer.active_adapters:
        if name in layer.lora_A:
            weight = weight + layer.get_delta_weight(name).float()
    return weight
