"""What the run directory asks of a POSIX kernel; `windows.py` answers the same questions, `system.py` picks one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import sys
from pathlib import Path

OPEN_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC
"""Added to every open: a symlink in the last component is an error, no descriptor leaks into a plug-in."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that ask a run to save and stop."""

_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}


def try_lock(fd: int) -> bool:
    """Take the exclusive lock of the open file `fd`, without waiting; False when another process holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def close_in_children(fds: set[int]) -> None:
    """See to it that a child made by fork drops the descriptors that are in `fds` then, so that it cannot keep a dead parent's lock."""

    def drop() -> None:
        while fds:
            with contextlib.suppress(OSError):
                os.close(fds.pop())

    os.register_at_fork(after_in_child=drop)


def sync_file(fd: int) -> None:
    """Return when the file's bytes are on the device; raises OSError."""
    if sys.platform == "darwin":
        # fsync on macOS leaves the bytes in the drive's cache
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def sync_directory(path: Path) -> None:
    """Return when the names in `path` are on the device; file systems that know no such call are trusted."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | OPEN_FLAGS)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(fd)


def free_bytes(path: Path) -> int:
    """Bytes this user may still write on the file system of `path`."""
    info = os.statvfs(path)
    return info.f_bavail * info.f_frsize


def boot_id() -> str | None:
    """What names this run of this kernel, the same in all its containers; None where there is nothing of the kind."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def process_alive(pid: int) -> bool:
    """Whether a process of this machine has the number `pid`."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def peak_memory() -> int | None:
    """The most memory that this process held, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
