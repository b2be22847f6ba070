"""Batches of the filters that score with a model of their own: halved when memory runs out, each halving recorded before it is tried.

Scores can depend on the shape of a batch in their last bits, so a resumed round takes the sizes that were recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from iterative_sft_cli.errors import OutOfMemoryError
from iterative_sft_cli.filters.resolved import ResolvedFilter
from iterative_sft_cli.machine import is_out_of_memory
from iterative_sft_cli.types import Sample


class BatchSizes(Protocol):
    """Where halvings of one round are kept; `key` is the filter's place in the config, such as `filters[3]`."""

    def size(self, key: str) -> int | None:
        """The newest recorded size; None when memory never ran out."""

    def record(self, key: str, size: int) -> None:
        """Record a size before it is tried."""


class InMemory:
    """Sizes of a chain that leaves nothing behind."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}

    def size(self, key: str) -> int | None:
        """The newest size."""
        return self._sizes.get(key)

    def record(self, key: str, size: int) -> None:
        """Remember a size."""
        self._sizes[key] = size


def judge_in_batches(
    one: ResolvedFilter, batch: Callable[[list[Sample]], Any], samples: Sequence[Sample], sizes: BatchSizes
) -> Any:
    """What `batch`, the `judge_batch` of a built-in with a `batch_size`, says of all `samples`.

    Raises OutOfMemoryError when a single sample does not fit, and whatever else the filter raises.
    """
    instance = getattr(batch, "__self__", None)
    whole = getattr(instance, "batch_size", None)
    if instance is None or whole is None:
        return batch(list(samples))
    try:
        while True:
            instance.batch_size = min(whole, sizes.size(one.key) or whole)
            # no sample more than there are: a halving must change something
            tried = min(instance.batch_size, len(samples))
            try:
                return batch(list(samples))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if tried <= 1:
                    raise OutOfMemoryError(
                        f"memory ran out while the filter `{one.name}` looked at a single sample",
                        where=f"{one.key}: {one.use}",
                        hint="lower its max_length, take a smaller model, set `device: cpu` for it, or give the machine more memory",
                    ) from error
            _free_cache()
            sizes.record(one.key, tried // 2)
    finally:
        instance.batch_size = whole


def _free_cache() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
