"""Micro-batches that a caller's own data collator makes.

Guarantee: every key that it returns but `labels` reaches the model as it is; left padding changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from iterative_sft_cli.encoding import IGNORE
from iterative_sft_cli.train import torch_rows
from iterative_sft_cli.train.torch_rows import MicroBatch, RowFormat
from iterative_sft_cli.types import TrainRow


def collated(
    rows: Sequence[TrainRow],
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    *,
    budget: int,
    form: RowFormat,
    shifted_right: Callable[[Tensor], Tensor] | None,
) -> list[MicroBatch]:
    """`rows` in micro-batches of at most `budget` tokens, whose tensors `collator` makes of {input_ids, attention_mask, labels}.

    Missing position ids are counted from the attention mask. `shifted_right` makes decoder inputs from labels where the
    collator made none. Raises ValueError without `input_ids` and `labels`, or when they are of the wrong shape.
    """
    batches = []
    for group in torch_rows.plan(rows, budget, packed=False, is_encoder_decoder=form.is_encoder_decoder):
        features = [
            {
                "input_ids": torch.tensor(rows[index].input_ids),
                "attention_mask": torch.ones(len(rows[index].input_ids), dtype=torch.long),
                "labels": torch.tensor(rows[index].labels),
            }
            for index in group
        ]
        batches.append(_micro_batch(dict(collator(features)), form, shifted_right))
    return batches


def _micro_batch(
    batch: dict[str, Any], form: RowFormat, shifted_right: Callable[[Tensor], Tensor] | None
) -> MicroBatch:
    inputs = {key: value.to(form.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    labels = inputs.pop("labels", None)
    ids = inputs.get("input_ids")
    if not isinstance(labels, Tensor) or labels.dim() != 2 or not isinstance(ids, Tensor):
        raise ValueError("data_collator must return input_ids and labels, two-dimensional tensors")
    mask = inputs.get("attention_mask")
    shift = 0 if form.is_encoder_decoder else 1
    trained = labels[:, shift:] != IGNORE
    if shift and isinstance(mask, Tensor) and mask.dim() == 2:
        trained = trained & mask[:, :-1].bool()  # a row's first token is not predicted from the padding before it
    elif shift and isinstance(inputs.get("position_ids"), Tensor):
        trained = trained & (inputs["position_ids"][:, 1:] != 0)  # nor from the row before it
    if shift and form.position_ids and "position_ids" not in inputs:
        if isinstance(mask, Tensor) and mask.dim() == 2:
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
        else:
            inputs["position_ids"] = torch.arange(ids.shape[1], device=form.device).expand(ids.shape[0], -1)
    if form.is_encoder_decoder and "decoder_input_ids" not in inputs and shifted_right is not None:
        inputs["decoder_input_ids"] = shifted_right(labels)
    row, place = trained.nonzero(as_tuple=True)
    real = mask if isinstance(mask, Tensor) and mask.dim() == 2 else torch.ones_like(ids)
    lengths = tuple(int(count) for count in real.sum(-1))
    return MicroBatch(
        inputs=inputs,
        positions=row * labels.shape[1] + place,
        targets=labels[:, shift:][trained],
        row=row,
        weights=torch.ones(labels.shape[0], device=form.device),
        ref_logprobs=None,
        lengths=lengths,
        packed=False,
        num_tokens=sum(lengths) + (int((labels != IGNORE).sum()) if form.is_encoder_decoder else 0),
    )
