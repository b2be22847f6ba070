"""Verdicts that were paid for once: a file of JSON lines for each plug-in source and set of arguments.

A line is used only when it is whole; a torn one is passed over and the verdict is made again.
"""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any, BinaryIO

from iterative_sft_cli.filters.resolve import ResolvedFilter
from iterative_sft_cli.filters.wire import to_json


class ResultCache:
    """Outcome rows by the hash of what the filter saw. Thread-safe."""

    def __init__(self, folder: Path, one: ResolvedFilter) -> None:
        what = to_json([one.source_hash, str(one.location), one.kind, one.arguments])
        label = "".join(c if c.isalnum() or c in "_-" else "_" for c in one.name)[:40]
        self._path = folder / f"{label}-{hashlib.sha256(what).hexdigest()[:20]}.jsonl"
        self._rows: dict[bytes, Any] = {}
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._load()

    @staticmethod
    def key(raw: bytes) -> bytes:
        """The key of what the filter is shown."""
        return hashlib.blake2b(raw, digest_size=16).digest()

    def get(self, key: bytes) -> Any | None:
        """The stored outcome rows."""
        return self._rows.get(key)

    def put(self, key: bytes, rows: Any) -> None:
        """Store outcome rows; a full disk costs the cache, never the run."""
        line = to_json({"key": key.hex(), "rows": rows}) + b"\n"
        with self._lock:
            self._rows[key] = rows
            try:
                if self._file is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = open(self._path, "ab")  # noqa: SIM115
                    # a torn last line must not swallow the next one
                    self._file.write(b"\n")
                self._file.write(line)
                self._file.flush()
            except OSError:
                return

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _load(self) -> None:
        try:
            data = self._path.read_bytes()
        except OSError:
            return
        for line in data.split(b"\n"):
            try:
                row = json.loads(line)
                self._rows[bytes.fromhex(row["key"])] = row["rows"]
            except (ValueError, KeyError, TypeError):
                continue
