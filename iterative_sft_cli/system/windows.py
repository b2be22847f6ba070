"""What run directory and worker processes ask of Windows; the twin of `posix.py`, function by function."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
from pathlib import Path

OPEN_FLAGS = getattr(os, "O_BINARY", 0) | getattr(os, "O_NOINHERIT", 0)
"""Added to every open: no newline translation, no descriptor leaks into a plug-in."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals that ask a run to save and stop."""

STACKS_SIGNAL: int | None = None
"""Windows has no signal that asks a process for its stacks."""

_LOCKED_BYTE = 1 << 30


def try_lock(fd: int) -> bool:
    """Lock one byte far behind the end of the open file `fd`, so that others can still read its text; False when it is taken."""
    if sys.platform != "win32":
        raise NotImplementedError("this lock needs Windows")
    import msvcrt

    position = os.lseek(fd, 0, os.SEEK_CUR)
    os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    finally:
        os.lseek(fd, position, os.SEEK_SET)
    return True


def close_in_children(fds: set[int]) -> None:
    """Nothing to do: Windows has no fork, and `O_NOINHERIT` keeps the descriptor out of new processes."""


def sync_file(fd: int) -> None:
    """Return when the file's bytes are on the device; raises OSError."""
    os.fsync(fd)


def sync_directory(path: Path) -> None:
    """Nothing to do: NTFS journals names, and Windows has no call to wait for it."""


def free_bytes(path: Path) -> int:
    """Bytes that are free on the volume of `path`."""
    return shutil.disk_usage(path).free


def boot_id() -> str | None:
    """None: Windows has nothing of the kind."""
    return None


def process_alive(pid: int) -> bool:
    """Whether a process has the number `pid` (`os.kill(pid, 0)` would end it here)."""
    if sys.platform != "win32":
        raise NotImplementedError("this look-up needs Windows")
    kernel = ctypes.windll.kernel32
    handle = kernel.OpenProcess(0x1000, False, pid)
    if not handle:
        return False
    kernel.CloseHandle(handle)
    return True


def peak_memory() -> int | None:
    """Not told without a library that is not here."""
    return None


def belongs_to_this_user(status: os.stat_result) -> bool:
    """True: owners are no numbers here, and a user's folders are not others' to write to."""
    return True


def end_process(pid: int) -> None:
    """End a process at once; one that is gone or another user's is no error."""
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGTERM)


def end_group(leader: int) -> None:
    """Nothing to do: Windows has no such groups."""


def limit_process(*, file_bytes: int, data_bytes: int | None) -> None:
    """Nothing to do: Windows has no such limits."""
