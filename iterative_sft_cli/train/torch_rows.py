"""Rows to micro-batches: which rows go together, and the tensors of each.

Guarantee: every row is in exactly one micro-batch, whole; position ids are explicit, so nothing depends on padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from iterative_sft_cli.encoding import IGNORE
from iterative_sft_cli.errors import DataError
from iterative_sft_cli.types import TrainRow


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes.

    `inputs` go to the model as they are. `positions` (N,) index the flattened (batch x time) hidden states at which a label
    is predicted, `targets` (N,) are those labels, `row` (N,) the index into `weights` (R,). `lengths` are the rows' own
    lengths in order; `packed` says that they lie end to end in one sequence. `num_tokens` counts no padding.
    """

    inputs: dict[str, Any]
    positions: Tensor
    targets: Tensor
    row: Tensor
    weights: Tensor
    ref_logprobs: Tensor | None
    lengths: tuple[int, ...]
    packed: bool
    num_tokens: int


@dataclass(frozen=True)
class RowFormat:
    """How a model wants its rows: `packed` end to end or padded; `position_ids` accepted; `decoder_start` for encoder-decoders."""

    packed: bool
    position_ids: bool
    pad_token_id: int
    is_encoder_decoder: bool = False
    decoder_start_token_id: int = 0
    device: torch.device = torch.device("cpu")

    def padded(self) -> RowFormat:
        """The same model's rows in a padded batch."""
        return replace(self, packed=False)


def sequences(batch: MicroBatch) -> tuple[tuple[Tensor, ...], Tensor]:
    """The rows' input ids, one (T,) tensor each without padding, and for each label the place in its row that predicts it, (N,)."""
    ids = batch.inputs["input_ids"]
    if batch.packed:
        starts = [sum(batch.lengths[:i]) for i in range(len(batch.lengths))]
        found = tuple(ids[0, start : start + length] for start, length in zip(starts, batch.lengths, strict=True))
    else:
        starts = [i * ids.shape[1] for i in range(len(batch.lengths))]
        found = tuple(ids[i, :length] for i, length in enumerate(batch.lengths))
    return found, batch.positions - torch.tensor(starts, device=batch.positions.device)[batch.row]


def num_trained(row: TrainRow, is_encoder_decoder: bool) -> int:
    """Labels of a row that are predicted; a causal model cannot predict the first token."""
    labels = row.labels if is_encoder_decoder else row.labels[1:]
    return sum(label != IGNORE for label in labels)


def check(row: TrainRow, is_encoder_decoder: bool, vocab_size: int, *, needs_ref_logprobs: bool) -> None:
    """Raises DataError, naming the row, for what a model of `vocab_size` cannot be trained on."""
    if not row.input_ids:
        raise DataError("no tokens", where=f"sample {row.sample_id}")
    if not is_encoder_decoder and len(row.labels) != len(row.input_ids):
        raise DataError(f"{len(row.labels)} labels for {len(row.input_ids)} input ids", where=f"sample {row.sample_id}")
    if not math.isfinite(row.weight):
        raise DataError(f"weight {row.weight} is not finite", where=f"sample {row.sample_id}")
    trained = num_trained(row, is_encoder_decoder)
    if not trained:
        raise DataError("no trained token (all labels are -100)", where=f"sample {row.sample_id}")
    for token in (*row.input_ids, *(label for label in row.labels if label != IGNORE)):
        if not 0 <= token < vocab_size:
            raise DataError(
                f"token id {token} is outside the embedding of {vocab_size} rows",
                where=f"sample {row.sample_id}",
            )
    if needs_ref_logprobs and (row.ref_logprobs is None or len(row.ref_logprobs) != trained):
        got = "none" if row.ref_logprobs is None else len(row.ref_logprobs)
        raise DataError(
            f"the objective needs one ref_logprob for each of {trained} trained tokens, got {got}",
            where=f"sample {row.sample_id}",
        )


def row_cost(row: TrainRow, is_encoder_decoder: bool) -> int:
    """Tokens a row puts through the model."""
    return len(row.input_ids) + (len(row.labels) if is_encoder_decoder else 0)


def share(rows: Sequence[TrainRow], rank: int, size: int, is_encoder_decoder: bool) -> list[TrainRow]:
    """This rank's part of a step's rows: each row on one rank, like token counts on all."""
    if size == 1:
        return list(rows)
    costs = [row_cost(row, is_encoder_decoder) for row in rows]
    filled = [0] * size
    mine: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: (-costs[index], index)):
        slot = filled.index(min(filled))
        filled[slot] += costs[index]
        if slot == rank:
            mine.append(index)
    return [rows[index] for index in sorted(mine)]


def plan(rows: Sequence[TrainRow], budget: int, *, packed: bool, is_encoder_decoder: bool = False) -> list[list[int]]:
    """Indices of `rows` by micro-batch, at most `budget` tokens each (padding counted); a longer row goes alone.

    A pure function of the lengths. Longest first, so that a budget that does not fit shows at once.
    """
    costs = [row_cost(row, is_encoder_decoder) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: (-costs[index], index))
    if not packed:
        groups: list[list[int]] = []
        for index in order:
            if groups and (len(groups[-1]) + 1) * costs[groups[-1][0]] <= budget:
                groups[-1].append(index)
            else:
                groups.append([index])
        return groups
    count = max(1, -(-sum(costs) // budget)) if costs else 0
    while count:
        bins: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for index in order:
            slot = filled.index(min(filled))
            bins[slot].append(index)
            filled[slot] += costs[index]
        if all(total <= budget or len(group) == 1 for total, group in zip(filled, bins, strict=True)):
            return [group for group in bins if group]
        count += 1
    return []


def build(rows: Sequence[TrainRow], indices: Sequence[int], form: RowFormat) -> MicroBatch:
    """The tensors of the chosen rows."""
    chosen = [rows[index] for index in indices]
    lengths = [len(row.input_ids) for row in chosen]
    width = sum(lengths) if form.packed else max(lengths)
    device = form.device
    inputs: dict[str, Any] = {}
    if form.packed:
        inputs["input_ids"] = torch.tensor([[token for row in chosen for token in row.input_ids]], device=device)
        ranges = [torch.arange(length) for length in lengths]
        inputs["position_ids"] = torch.cat(ranges)[None].to(device)
        starts = [sum(lengths[:number]) for number in range(len(lengths))]
    else:
        ids = torch.full((len(chosen), width), form.pad_token_id)
        mask = torch.zeros((len(chosen), width), dtype=torch.long)
        for number, row in enumerate(chosen):
            ids[number, : lengths[number]] = torch.tensor(row.input_ids)
            mask[number, : lengths[number]] = 1
        inputs["input_ids"] = ids.to(device)
        inputs["attention_mask"] = mask.to(device)
        if form.position_ids:
            inputs["position_ids"] = torch.arange(width, device=device)[None].expand(len(chosen), -1)
        starts = [number * width for number in range(len(chosen))]
    labels = [row.labels for row in chosen]
    shift = 1
    if form.is_encoder_decoder:
        shift = 0
        width = max(len(label) for label in labels)
        decoder_ids = torch.full((len(chosen), width), form.pad_token_id)
        decoder_mask = torch.zeros((len(chosen), width), dtype=torch.long)
        for number, label in enumerate(labels):
            shown = [form.pad_token_id if token == IGNORE else token for token in label[:-1]]
            decoder_ids[number, : len(label)] = torch.tensor([form.decoder_start_token_id, *shown])
            decoder_mask[number, : len(label)] = 1
        inputs["decoder_input_ids"] = decoder_ids.to(device)
        inputs["decoder_attention_mask"] = decoder_mask.to(device)
        starts = [number * width for number in range(len(chosen))]
    positions: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for number, label in enumerate(labels):
        for place, token in enumerate(label[shift:]):
            if token != IGNORE:
                positions.append(starts[number] + place)
                targets.append(token)
                owner.append(number)
    reference = None
    if all(row.ref_logprobs is not None for row in chosen):
        flat = [value for row in chosen for value in row.ref_logprobs or ()]
        if len(flat) == len(targets):
            reference = torch.tensor(flat, dtype=torch.float32, device=device)
    return MicroBatch(
        inputs=inputs,
        positions=torch.tensor(positions, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
        row=torch.tensor(owner, dtype=torch.long, device=device),
        weights=torch.tensor([row.weight for row in chosen], dtype=torch.float32, device=device),
        ref_logprobs=reference,
        lengths=tuple(lengths),
        packed=form.packed,
        num_tokens=sum(row_cost(row, form.is_encoder_decoder) for row in chosen),
    )
