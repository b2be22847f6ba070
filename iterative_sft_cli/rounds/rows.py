"""The rows that a round trains on, in a form that a large round can hold.

Guarantee: what is taken out equals what was put in.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from iterative_sft_cli.types import TrainRow


class PackedRows(Sequence[TrainRow]):
    """Training rows as flat arrays of 32-bit numbers: 8 bytes a token, where tuples take 16 and up to 28 more for each number.

    A row is made when it is asked for. Token ids and labels lie in the range of a 32-bit number; OverflowError for others.
    """

    def __init__(self, rows: Iterable[TrainRow] = ()) -> None:
        self._names: list[str] = []
        self._weights = array("d")
        self._ends = array("q", [0])
        self._ids = array("i")
        self._labels = array("i")
        self._ref_logprobs: dict[int, array[float]] = {}
        for row in rows:
            self.append(row)

    def append(self, row: TrainRow) -> None:
        """Add a row at the end."""
        if row.ref_logprobs is not None:
            self._ref_logprobs[len(self)] = array("d", row.ref_logprobs)
        self._ids.extend(row.input_ids)
        self._labels.extend(row.labels)
        self._ends.append(len(self._ids))
        self._weights.append(row.weight)
        self._names.append(row.sample_id)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start, end = self._ends[index], self._ends[index + 1]
        logprobs = self._ref_logprobs.get(index)
        return TrainRow(
            self._names[index],
            tuple(self._ids[start:end]),
            tuple(self._labels[start:end]),
            self._weights[index],
            None if logprobs is None else tuple(logprobs),
        )
