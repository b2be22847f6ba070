"""Temporary folders that a killed process leaves no trace of: the next one that needs such a folder removes it.

Guarantee: a folder is removed only by its owner, or when a lock of the kernel that runs here, under which it was made, shows that its
owner has ended; what another host or an earlier start of the machine left stays.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from iterative_sft_cli import system

PREFIX = "isft-"
HELD = "held"
"""A file that its process has locked, beside the folder that is used; it names the kernel that keeps the lock."""

_held: set[int] = set()
_swept: set[str] = set()
system.close_in_children(_held)


class TemporaryFolder:
    """An empty folder, `name`, until `cleanup` or until the process has ended. Raises OSError when none can be made."""

    def __init__(self, purpose: str) -> None:
        """`purpose`: a word for its name."""
        self._outer = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}-"))
        self.name = str(self._outer / "files")
        fresh = self._outer / "new"
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | system.OPEN_FLAGS, 0o600)
        _held.add(fd)
        with contextlib.suppress(OSError):
            # locked before it has the name by which others look for it
            if system.try_lock(fd):
                os.write(fd, kernel().encode())
                os.replace(fresh, self._outer / HELD)
        os.mkdir(self.name, 0o700)
        self._remove = weakref.finalize(self, remove, self._outer, fd, os.getpid())
        sweep(self._outer)

    def cleanup(self) -> None:
        """Remove it, as far as that goes."""
        self._remove()

    def __enter__(self) -> str:
        return self.name

    def __exit__(self, *error: object) -> None:
        self.cleanup()


def remove(outer: Path, fd: int, owner: int) -> None:
    """Remove a folder that is held through `fd`; in a child made by fork it is the parent's, and stays."""
    if os.getpid() != owner:
        return
    _held.discard(fd)
    with contextlib.suppress(OSError):
        os.close(fd)
    shutil.rmtree(outer, ignore_errors=True)


def kernel() -> str:
    """What names the kernel that runs; empty where it has no name."""
    return system.boot_id() or ""


def sweep(mine: Path) -> None:
    """Remove the folders beside `mine` whose processes have ended, once a process."""
    if str(mine.parent) in _swept:
        return
    _swept.add(str(mine.parent))
    with contextlib.suppress(OSError):
        owner = mine.stat().st_uid
        with os.scandir(mine.parent) as entries:
            found = [Path(entry.path) for entry in entries if entry.name.startswith(PREFIX)]
        for path in found:
            with contextlib.suppress(OSError):
                if path != mine and path.lstat().st_uid == owner:
                    remove_if_left(path)


def remove_if_left(folder: Path) -> None:
    """Remove a folder of this kind when nobody holds it. Raises OSError for what is none."""
    fd = os.open(folder / HELD, os.O_RDWR | system.OPEN_FLAGS)
    try:
        ours = kernel()
        left = bool(ours) and os.read(fd, 200).decode("utf-8", "replace") == ours and system.try_lock(fd)
    finally:
        os.close(fd)
    if left:
        shutil.rmtree(folder, ignore_errors=True)
