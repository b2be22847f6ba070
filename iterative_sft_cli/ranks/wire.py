"""The records that travel between ranks, as JSON: what comes out is equal to what went in, to the last bit of a float."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from iterative_sft_cli.types import Completion, Decoding, Request, TrainRow

IGNORE = -100


def pack(value: Any) -> bytes:
    """`value` as compact JSON."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def unpack(data: bytes) -> Any:
    """Undo `pack`."""
    return json.loads(data)


def from_requests(requests: Iterable[Request]) -> list[Any]:
    """Requests as plain lists."""
    return [[r.prompt_id, r.prompt, r.prompt_ids, r.sample_indices, r.seeds] for r in requests]


def to_requests(rows: Iterable[Sequence[Any]]) -> list[Request]:
    """Undo `from_requests`."""
    return [
        Request(prompt_id, prompt, tuple(ids), tuple(indices), tuple(seeds))
        for prompt_id, prompt, ids, indices, seeds in rows
    ]


def from_decoding(decoding: Decoding) -> dict[str, Any]:
    """A decoding as a mapping."""
    return dataclasses.asdict(decoding)


def to_decoding(values: dict[str, Any]) -> Decoding:
    """Undo `from_decoding`."""
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Decoding(**plain)


def from_completion(made: Completion) -> list[Any]:
    """A completion as a list."""
    return [
        made.prompt_id,
        made.sample_index,
        made.token_ids,
        made.finish_reason,
        made.text,
        made.logprob,
        made.token_logprobs,
    ]


def to_completion(values: Sequence[Any]) -> Completion:
    """Undo `from_completion`."""
    prompt_id, sample_index, ids, reason, text, logprob, token_logprobs = values
    logprobs = None if token_logprobs is None else tuple(token_logprobs)
    return Completion(prompt_id, sample_index, tuple(ids), reason, text, logprob, logprobs)


def from_rows(rows: Iterable[TrainRow]) -> list[Any]:
    """Training rows as lists; labels that repeat the input are sent as runs (start, end)."""
    return [[r.sample_id, r.input_ids, _runs(r), r.weight, r.ref_logprobs] for r in rows]


def to_rows(values: Iterable[Sequence[Any]]) -> list[TrainRow]:
    """Undo `from_rows`."""
    rows = []
    for sample_id, ids, labels, weight, reference in values:
        if labels and isinstance(labels[0], list):
            spread = [IGNORE] * len(ids)
            for start, end in labels:
                spread[start:end] = ids[start:end]
            labels = spread
        rows.append(
            TrainRow(sample_id, tuple(ids), tuple(labels), weight, None if reference is None else tuple(reference))
        )
    return rows


def _runs(row: TrainRow) -> list[Any]:
    ids, labels = row.input_ids, row.labels
    if len(ids) != len(labels) or any(b not in (IGNORE, a) for a, b in zip(ids, labels, strict=True)):
        return list(labels)
    runs: list[Any] = []
    for place, label in enumerate(labels):
        if label == IGNORE:
            continue
        if runs and runs[-1][1] == place:
            runs[-1][1] = place + 1
        else:
            runs.append([place, place + 1])
    return runs or list(labels)
