"""Memory of a step: how many tokens one forward and backward pass may hold, checkpointing, and what happens without enough.

Guarantee: the budget is a pure function of the model's shape and the machine's total memory, so a resumed run splits its steps
alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from iterative_sft_cli.machine import is_out_of_memory, total_memory
from iterative_sft_cli.train.base import TrainOutOfMemory

_SHARE = 0.25
_MAX_CPU = 4096
_MAX_GPU = 65536


def bytes_per_token(config: Any, checkpointing: bool) -> int:
    """Activation bytes a token costs, generously: hidden states, the feed-forward block, and logits in two dtypes."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = int(getattr(text, "hidden_size", 0) or getattr(text, "d_model", 0) or 1024)
    layers = int(getattr(text, "num_hidden_layers", 0) or getattr(text, "num_layers", 0) or 24)
    inner = int(getattr(text, "intermediate_size", 0) or getattr(text, "d_ff", 0) or 4 * hidden)
    vocabulary = int(getattr(text, "vocab_size", 50000))
    a_layer = 4 * (16 * hidden + 5 * inner)
    kept = layers * 4 * hidden + a_layer if checkpointing else layers * a_layer
    return kept + 6 * vocabulary


def micro_batch_tokens(config: Any, device: torch.device, checkpointing: bool) -> int:
    """The budget that `micro_batch_tokens: auto` means."""
    room = int(total_memory(str(device)) * _SHARE) // bytes_per_token(config, checkpointing)
    return max(64, min(room, _MAX_CPU if device.type == "cpu" else _MAX_GPU))


def set_checkpointing(model: Any, on: bool, kwargs: Mapping[str, Any] | None) -> None:
    """Switch activation checkpointing of a transformers model, whatever its version calls it."""
    now = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on and not now:
        options = dict(kwargs or {"use_reentrant": False})
        getattr(model, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": options})
    elif now and not on:
        getattr(model, f"{word}_checkpointing_disable")()


@contextmanager
def out_of_memory() -> Iterator[None]:
    """Inside, running out of memory is TrainOutOfMemory, whoever says it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise TrainOutOfMemory(str(error)) from error
        raise
