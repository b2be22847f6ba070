"""Where damaged and torn things go: moved, never deleted, each with a line that says why."""

from __future__ import annotations

import os
import time
from pathlib import Path

from iterative_sft_cli.rundir import jsonl
from iterative_sft_cli.rundir.fs import FileSystem
from iterative_sft_cli.rundir.layout import QUARANTINE
from iterative_sft_cli.rundir.ledger import open_after_newline

REASONS = "reasons.jsonl"


class Quarantine:
    """The folder `quarantine/` of one run, made when first needed."""

    def __init__(self, run: Path, fs: FileSystem) -> None:
        self._run = run
        self._fs = fs
        self.moved: list[tuple[str, str]] = []

    def move(self, path: Path, reason: str) -> Path:
        """Take `path` (a file or folder inside the run) out of the way; returns where it is now."""
        target = self._target(path)
        # the reason first: a thing in quarantine always has one, after a crash in between as well
        self._note(path, target, reason)
        self._fs.rename(path, target)
        return target

    def keep(self, path: Path, data: bytes, reason: str) -> Path:
        """Save a copy of bytes that are about to be cut off `path`."""
        target = self._target(path)
        self._note(path, target, reason)
        self._fs.create(target, data, sync=None)
        return target

    def _target(self, path: Path) -> Path:
        folder = self._run / QUARANTINE
        if not folder.is_dir():
            self._fs.mkdir(folder)
        name = "__".join(path.relative_to(self._run).parts)
        number = 0
        while os.path.lexists(folder / f"{number:03d}-{name}"):
            number += 1
        return folder / f"{number:03d}-{name}"

    def _note(self, path: Path, target: Path, reason: str) -> None:
        relative = path.relative_to(self._run).as_posix()
        row = {
            "path": relative,
            "moved_to": target.relative_to(self._run).as_posix(),
            "reason": reason,
            "time": round(time.time(), 3),
        }
        notes = self._run / QUARANTINE / REASONS
        fd = open_after_newline(self._fs, notes)
        try:
            self._fs.append(fd, notes, jsonl.encode_row(row))
        finally:
            os.close(fd)
        self.moved.append((relative, reason))
