"""`Run.open(path)`: everything a run directory holds, for readers; it takes no lock and changes nothing, also while the run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.rundir import RunView, peek
from iterative_sft_cli.samples import GENERATED, StoredSample, iter_round


class Run:
    """A run directory as a reader sees it."""

    def __init__(self, view: RunView) -> None:
        self.view = view
        self.path = view.path

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """The run at `path`. Raises DataError when there is none."""
        view = peek(path)
        if view is None:
            raise DataError("there is no run here", where=str(path), expected="a folder that `isft train` made")
        return cls(view)

    @property
    def config(self) -> dict[str, Any]:
        """The config with its defaults, as plain data."""
        return self.view.resolved

    @property
    def stats(self) -> list[dict[str, Any]]:
        """One row a round, oldest first."""
        return self.view.stats_rows()

    @property
    def rounds(self) -> list[int]:
        """The rounds that have generated samples, oldest first."""
        return [index for index in self.view.rounds if self.view.shards.names(index, GENERATED)]

    def iter_samples(self, rounds: Sequence[int] | None = None) -> Iterator[StoredSample]:
        """The judged samples of the given rounds (all by default), one shard in memory at a time."""
        for round_index in self.rounds if rounds is None else rounds:
            yield from iter_round(self.view.shards, round_index)
