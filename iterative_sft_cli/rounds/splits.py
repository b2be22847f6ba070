"""Batches of scoring filters that memory forced to be smaller, as sealed decisions of a round."""

from __future__ import annotations

import re
from typing import Any


class FilterSplits:
    """The halvings of one round's filters; `purpose` keeps those of the evaluation apart from those of the samples."""

    def __init__(self, shards: Any, round_index: int, purpose: str) -> None:
        self._shards, self._round_index, self._purpose = shards, round_index, purpose

    def _prefix(self, key: str) -> str:
        return f"split-{self._purpose}-{'-'.join(re.findall('[A-Za-z0-9_]+', key))}-"

    def size(self, key: str) -> int | None:
        """The newest size; None when memory never ran out."""
        names = self._shards.names(self._round_index, self._prefix(key))
        found = self._shards.read(self._round_index, names[-1]) if names else None
        return int(found[0][0]["batch_size"]) if found is not None else None

    def record(self, key: str, size: int) -> None:
        """Seal a size before it is tried."""
        prefix = self._prefix(key)
        number = len(self._shards.names(self._round_index, prefix))
        self._shards.seal(self._round_index, f"{prefix}{number:03d}", [{"filter": key, "batch_size": size}], {})
