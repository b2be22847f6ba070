"""Append-only JSONL of one writer: rows are history only up to the length that a checkpoint has recorded.

`AppendLog` (ledger, stats) is deterministic, synced inside a commit only, and cut back by recovery; `Telemetry` carries
the clock and is never read by resume.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import DataError, StorageError
from iterative_sft_cli.rundir import jsonl
from iterative_sft_cli.rundir.fs import FileSystem, read_bytes
from iterative_sft_cli.rundir.integrity import Stamp


class AppendLog:
    """One deterministic log; `path` holds exactly what was appended, in order."""

    def __init__(self, path: Path, fs: FileSystem) -> None:
        self.path = path
        self._fs = fs
        data = read_bytes(path) or b""
        self._size = len(data)
        self._digest = hashlib.sha256(data)
        self._fd = fs.open_append(path)
        self._dirty = True
        self._failed: StorageError | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row. Raises ValueError or TypeError for a row that is not strict JSON, StorageError when the disk refuses."""
        if self._failed is not None:
            raise self._failed
        line = jsonl.encode_row(row)
        try:
            self._fs.append(self._fd, self.path, line)
        except StorageError as error:
            # the tail may be torn: what came after it would be glued to it
            self._failed = error
            raise
        self._size += len(line)
        self._digest.update(line)
        self._dirty = True

    def rows(self) -> list[dict[str, Any]]:
        """Everything appended so far, by this process or an earlier one."""
        return read_log(self.path)

    def stamp(self) -> Stamp:
        """Length and checksum as of now."""
        return Stamp(self._size, self._digest.copy().hexdigest())

    def sync(self, label: str) -> None:
        """Return when all rows so far are on the device."""
        if self._dirty:
            self._dirty = False
            self._fs.sync_fd(self._fd, self.path, label)

    def close(self) -> None:
        """Give up the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Telemetry:
    """Times, speed and memory, as they come; any thread may append."""

    def __init__(self, path: Path, fs: FileSystem) -> None:
        self.path = path
        self._fs = fs
        self._fd = -1
        self._guard = threading.Lock()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row, with the time (seconds since 1970) as its first key."""
        line = jsonl.encode_row({"time": round(time.time(), 3), **row})
        with self._guard:
            if self._fd < 0:
                self._fd = open_after_newline(self._fs, self.path)
            self._fs.append(self._fd, self.path, line)

    def rows(self) -> list[dict[str, Any]]:
        """The readable rows; a torn one is skipped."""
        return read_loose(self.path)

    def close(self) -> None:
        """Give up the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_after_newline(fs: FileSystem, path: Path) -> int:
    """A descriptor that appends whole lines: a torn last line is ended first, so that nothing is glued to it."""
    data = read_bytes(path)
    fd = fs.open_append(path)
    if data and not data.endswith(b"\n"):
        fs.append(fd, path, b"\n")
    return fd


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a log; bytes behind the last newline are not yet a row. Raises DataError for a bad line before that."""
    try:
        rows, _ = jsonl.split_rows(read_bytes(path) or b"")
    except jsonl.BadLine as error:
        raise DataError(
            f"line {error.line} is damaged: {error.problem}", where=str(path), hint="isft verify RUN lists all damage"
        ) from error
    return rows


def read_loose(path: Path) -> list[dict[str, Any]]:
    """Every line that is a record, the others left out."""
    rows = []
    for line in (read_bytes(path) or b"").split(b"\n"):
        try:
            rows.append(jsonl.decode_row(line))
        except jsonl.BadLine:
            continue
    return rows
