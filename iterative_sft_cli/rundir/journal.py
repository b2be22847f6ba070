"""Finished rows of a shard that is still being made, for makers that would not make the same again.

Guarantee: a row that was appended is on the device within `SYNC_S` seconds of the next `append` or `tick`, and comes back
after a crash as it was, or not at all; rows made for other work never come back. Sealing the shard removes its journal.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iterative_sft_cli.rundir import jsonl
from iterative_sft_cli.rundir.fs import FileSystem, read_bytes
from iterative_sft_cli.rundir.layout import JOURNAL, check_name, round_folder
from iterative_sft_cli.rundir.ledger import open_after_newline, read_loose
from iterative_sft_cli.rundir.quarantine import Quarantine

SYNC_S = 10.0


class Journal:
    """The journal of one shard. `rows` are those of earlier processes that were made for the same work, which `key` names."""

    def __init__(
        self, run: Path, fs: FileSystem, quarantine: Quarantine, round_index: int, name: str, key: str
    ) -> None:
        folder = round_folder(run, round_index)
        self._path = folder / (check_name(name) + JOURNAL)
        self._fs = fs
        self._dirty_since: float | None = None
        self.rows: list[dict[str, Any]] = []
        data = read_bytes(self._path)
        if data:
            found = [row for entry in read_loose(self._path) if (row := _unpack(entry)) is not None]
            if found and found[0] == {"key": key}:
                self.rows = found[1:]
            else:
                quarantine.move(self._path, "finished rows of other work than the shard's as it is now")
                data = None
        fs.make_dirs(folder, "round.dir")
        self._fd = open_after_newline(fs, self._path)
        if not data:
            self.append({"key": key})
            self.sync()
            fs.sync_dir(folder, "journal.dir")

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a finished row. Raises StorageError when the disk refuses."""
        self._fs.append(self._fd, self._path, _pack(row))
        if self._dirty_since is None:
            self._dirty_since = time.monotonic()
        self.tick()

    def tick(self) -> None:
        """Called now and then: brings rows to the device that have waited for `SYNC_S`."""
        if self._dirty_since is not None and time.monotonic() - self._dirty_since >= SYNC_S:
            self.sync()

    def sync(self) -> None:
        """Bring all rows to the device."""
        self._dirty_since = None
        self._fs.sync_fd(self._fd, self._path, "journal.data")

    def close(self) -> None:
        """Give up the descriptor; what is not on the device yet is brought there when the disk lets us."""
        if self._fd >= 0:
            try:
                if self._dirty_since is not None and self._fs.failed is None:
                    self.sync()
            finally:
                os.close(self._fd)
                self._fd = -1


def _pack(row: Mapping[str, Any]) -> bytes:
    return jsonl.encode_row({"crc": zlib.crc32(jsonl.encode_row(row)), "row": dict(row)})


def _unpack(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    row = entry.get("row")
    if not isinstance(row, dict) or entry.get("crc") != zlib.crc32(jsonl.encode_row(row)):
        return None
    return row
