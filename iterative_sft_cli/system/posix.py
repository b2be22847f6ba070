"""What run directory and worker processes ask of a POSIX kernel; `windows.py` answers the same questions, `system.py` picks one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import sys
from pathlib import Path

OPEN_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC
"""Added to every open: a symlink in the last component is an error, no descriptor leaks into a plug-in."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that ask a run to save and stop."""

STACKS_SIGNAL: int | None = signal.SIGUSR1
"""Asks a worker process where its threads stand; None where there is no such signal."""

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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def belongs_to_this_user(status: os.stat_result) -> bool:
    """Whether this user owns what `status` is of."""
    return status.st_uid == os.getuid()


def end_process(pid: int) -> None:
    """End a process at once; one that is gone or another user's is no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def end_group(leader: int) -> None:
    """End the process group that `leader` leads (0: this process's own); one that is gone is no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def limit_process(*, file_bytes: int, data_bytes: int | None) -> None:
    """From now on no core files, and files and memory of so many bytes at most; on Linux this process ends with the thread that
    started it."""
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, file_bytes)
    if data_bytes is not None:
        _lower(resource.RLIMIT_DATA, data_bytes)
    if sys.platform.startswith("linux"):
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            # PR_SET_PDEATHSIG
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def _lower(what: int, value: int) -> None:
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(what, (value, hard))
