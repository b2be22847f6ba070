"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings while training.

Guarantee: a row's noise has the magnitude alpha / sqrt(its own length x width) in every layout; Hugging Face's hook uses the
padded length, which is the same for a row alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from iterative_sft_cli.train.torch_rows import MicroBatch


@contextmanager
def noisy_embeddings(model: Any, batch: MicroBatch, alpha: float | None) -> Iterator[None]:
    """Inside, the token embeddings of `model` add the noise to what they return; None adds nothing.

    An encoder-decoder embeds twice, the decoder's tokens second, through one module or through two that share a weight.
    """
    if alpha is None:
        yield
        return
    counts = [
        _lengths(batch, "attention_mask", "input_ids"),
        _lengths(batch, "decoder_attention_mask", "decoder_input_ids"),
    ]
    calls = iter(counts)

    def add(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        lengths = next(calls, None)
        if lengths is None:
            return output
        magnitude = alpha / (lengths * output.shape[-1]).sqrt()
        noise = torch.empty_like(output, dtype=torch.float32).uniform_(-1, 1) * magnitude[..., None]
        return output + noise.to(output.dtype)

    weight = model.get_input_embeddings().weight
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding) and module.weight is weight]
    handles = [module.register_forward_hook(add) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _lengths(batch: MicroBatch, mask_name: str, ids_name: str) -> Tensor | None:
    """The length of the row that each position belongs to, (batch, time)."""
    ids = batch.inputs.get(ids_name)
    if not isinstance(ids, Tensor):
        return None
    if batch.packed:
        lengths = torch.tensor(batch.lengths, dtype=torch.float32, device=ids.device)
        return lengths.repeat_interleave(torch.tensor(batch.lengths, device=ids.device))[None]
    mask = batch.inputs.get(mask_name)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        mask = torch.ones_like(ids)
    return mask.sum(-1, keepdim=True).float().clamp_min(1).expand(ids.shape)
