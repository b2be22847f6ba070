"""Tiny models as config sections name them, and their weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
import torch

from iterative_sft_cli.model import LoadedModel

torch.set_num_threads(1)

MODELS = {
    "llama": lambda: tiny.tiny_llama(),
    "untied": lambda: tiny.tiny_llama(tied=False),
    "gpt2": lambda: tiny.tiny_gpt2(),
    "t5": lambda: tiny.tiny_t5(),
}


def section(path: Path | str | None = None, **settings: Any) -> SimpleNamespace:
    blank: dict[str, Any] = dict(
        path=None if path is None else str(path),
        revision=None,
        dtype="auto",
        device="auto",
        attention="sdpa",
        adapter=None,
        quantization="none",
        trust_remote_code=False,
        init=None,
        tokenizer=None,
    )
    return SimpleNamespace(**{**blank, **settings})


def lora(**settings: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{**dict(type="lora", r=4, alpha=8.0, dropout=0.0, target_modules="all-linear"), **settings}
    )


def state(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def scramble(loaded: LoadedModel) -> None:
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
