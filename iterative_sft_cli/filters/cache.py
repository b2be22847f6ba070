"""Verdicts that were paid for once: a file of JSON lines for each plug-in source and set of arguments.

A line is used only when it is whole and holds the very key that is asked for; a torn one is passed over and the verdict is
made again. Memory holds where a line begins, never what it says.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from iterative_sft_cli.filters.resolved import ResolvedFilter
from iterative_sft_cli.filters.wire import to_json

FOLDER = "cache"
"""The folder of a run directory with what may be removed at any time: it saves work and decides nothing."""
_HEAD = b'{"key":"'
_KEY_CHARS = 32


class ResultCache:
    """Outcome rows by the hash of what the filter saw. Thread-safe; several processes may add to one file."""

    def __init__(self, folder: Path, one: ResolvedFilter) -> None:
        what = to_json([one.source_hash, one.location.attribute, one.kind, one.arguments])
        label = "".join(c if c.isascii() and c.isalnum() or c in "_-" else "_" for c in one.name)[:40]
        self._path = folder / f"{label}-{hashlib.sha256(what).hexdigest()[:20]}.jsonl"
        # (offset, length) in one number: a tuple each would take twice the memory
        self._places: dict[int, int] = {}
        self._lock = threading.Lock()
        self._reading: int | None = None
        self._writing: int | None = None
        self._index()

    @staticmethod
    def key(raw: bytes) -> bytes:
        """The key of what the filter is shown."""
        return hashlib.blake2b(raw, digest_size=_KEY_CHARS // 2).digest()

    def get(self, key: bytes) -> Any | None:
        """The stored outcome rows."""
        with self._lock:
            place = self._places.get(_short(key))
            if place is None:
                return None
            try:
                if self._reading is None:
                    self._reading = os.open(self._path, os.O_RDONLY)
                os.lseek(self._reading, place >> 32, os.SEEK_SET)
                line = os.read(self._reading, place & 0xFFFFFFFF)
            except OSError:
                return None
        try:
            row = json.loads(line)
            return row["rows"] if row["key"] == key.hex() else None
        except (ValueError, KeyError, TypeError):
            return None

    def put(self, key: bytes, rows: Any) -> None:
        """Store outcome rows; a full disk costs the cache, never the run."""
        line = to_json({"key": key.hex(), "rows": rows}) + b"\n"
        with self._lock:
            try:
                if self._writing is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    self._writing = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                    # a torn last line must not swallow the next one
                    os.write(self._writing, b"\n")
                if os.write(self._writing, line) < len(line):
                    return
                end = os.lseek(self._writing, 0, os.SEEK_CUR)
            except OSError:
                return
            self._places[_short(key)] = (end - len(line)) << 32 | len(line)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            for descriptor in (self._reading, self._writing):
                if descriptor is not None:
                    os.close(descriptor)
            self._reading = self._writing = None

    def _index(self) -> None:
        try:
            with open(self._path, "rb") as file:
                start = 0
                for line in file:
                    if line.startswith(_HEAD) and line.endswith(b"}\n"):
                        try:
                            key = bytes.fromhex(line[len(_HEAD) : len(_HEAD) + _KEY_CHARS].decode("ascii"))
                            self._places[_short(key)] = start << 32 | len(line)
                        except ValueError:
                            pass
                    start += len(line)
        except OSError:
            return


def _short(key: bytes) -> int:
    """What the index is searched by; the line itself holds the whole key."""
    return int.from_bytes(key[:8], "big")
