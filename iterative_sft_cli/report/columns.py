"""Samples as columns, for data frames and data sets: one type a column, scores and extras of every filter in columns of their own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from iterative_sft_cli.report.sample_text import sample_row
from iterative_sft_cli.samples import StoredSample

FIRST = (
    "sample_id",
    "round",
    "prompt_id",
    "sample_index",
    "accepted",
    "rejected_by",
    "reason",
    "prompt",
    "completion",
    "answer",
    "finish_reason",
    "num_tokens",
    "logprob",
    "seed",
    "hinted",
    "row",
)
_PLAIN = ({bool}, {int}, {int, float}, {float}, {str})


def flat_row(stored: StoredSample) -> dict[str, Any]:
    """A sample without nesting: `score/FILTER` and `FILTER/EXTRA` beside the columns of `FIRST`."""
    row = sample_row(stored)
    row["row"] = json.dumps(row["row"], ensure_ascii=False)
    for says in row.pop("says"):
        if says.get("score") is not None:
            row[f"score/{says['filter']}"] = float(says["score"])
        for name, value in (says.get("extra") or {}).items():
            row[f"{says['filter']}/{name}"] = value
    return row


def columns_of(samples: Iterable[StoredSample]) -> dict[str, list[Any]]:
    """The samples column by column, None where a sample has no value; a column of several types becomes JSON text."""
    columns: dict[str, list[Any]] = {name: [] for name in FIRST}
    count = 0
    for stored in samples:
        row = flat_row(stored)
        for name in row.keys() - columns.keys():
            columns[name] = [None] * count
        for name, values in columns.items():
            values.append(row.get(name))
        count += 1
    ordered = [*FIRST, *sorted(columns.keys() - set(FIRST))]
    return {name: _uniform(columns[name]) for name in ordered}


def _uniform(values: list[Any]) -> list[Any]:
    kinds = {type(value) for value in values if value is not None}
    if not kinds or any(kinds <= plain for plain in _PLAIN):
        return [float(value) if kinds == {int, float} and value is not None else value for value in values]
    if kinds == {list} and all(set(map(type, value)) <= {dict} for value in values if value):
        fields = {tuple(sorted(message)) for value in values if value for message in value}
        texts = all(isinstance(v, str) for value in values if value for message in value for v in message.values())
        if len(fields) <= 1 and texts:
            return values
    return [
        value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values
    ]
