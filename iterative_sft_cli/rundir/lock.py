"""One writer a run: an exclusive lock on the open file `LOCK`, which the kernel frees the moment its holder dies.

Where that lock is not known to reach other hosts (a network file system), a lease is held beside it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from iterative_sft_cli import system
from iterative_sft_cli.errors import DataError, StorageError
from iterative_sft_cli.rundir import layout, lease
from iterative_sft_cli.rundir.fs import FileSystem, read_bytes

PATIENCE_S = 1.0
"""How long a loser waits for the winner to have written its name."""

_held: set[int] = set()
system.close_in_children(_held)


class RunLock:
    """The lock of one run directory, held until `close` or the end of the process."""

    def __init__(self, path: Path, fs: FileSystem) -> None:
        """Take it. Raises DataError naming the holder when another process has it."""
        self.path = path
        self._fs = fs
        self._held = False
        self._lease: lease.Lease | None = None
        self._fd = fs.open_lock(path)
        alone = lease.lock_is_enough(path.parent)
        try:
            if not _try_lock(self._fd, needed=alone):
                raise DataError(
                    f"another process is working in this run: {describe_holder(path)}",
                    where=str(path.parent),
                    hint="wait for it, stop it, or choose another output_dir; the lock is free as soon as that process has ended",
                )
            self._held = True
            _held.add(self._fd)
            fs.replace_text(self._fd, path, _me())
            if not alone:
                # whoever had this kernel's lock is gone, or we would not have it
                boot = system.boot_id()
                me = {**json.loads(_me()), "boot": boot}
                name = path.with_name(layout.LEASE)
                self._lease = lease.Lease(name, fs, me, is_gone=lambda one: bool(boot) and one.get("boot") == boot)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the lock, its text emptied first so that nobody is told of a holder that has gone."""
        if self._fd < 0:
            return
        try:
            if self._lease is not None:
                self._lease.close()
            if self._held:
                with contextlib.suppress(StorageError):
                    self._fs.replace_text(self._fd, self.path, b"")
        finally:
            _held.discard(self._fd)
            os.close(self._fd)
            self._fd = -1


def _try_lock(fd: int, *, needed: bool) -> bool:
    try:
        return system.try_lock(fd)
    except OSError:
        # some network file systems know no locks: the lease is then all there is
        if needed:
            raise
        return True


def describe_holder(path: Path) -> str:
    """Who holds the lock, as far as its text tells: pid, host and since when."""
    deadline = time.monotonic() + PATIENCE_S
    holder = _read(path)
    while (holder is None or _is_stale(holder)) and time.monotonic() < deadline:
        # the winner has the lock but has not yet written who it is
        time.sleep(0.02)
        holder = _read(path)
    if holder is None:
        return "its holder has not written who it is"
    return f"pid {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def _me() -> bytes:
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return (json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n").encode("ascii")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        holder = json.loads(read_bytes(path) or b"")
    except ValueError:
        return None
    return holder if isinstance(holder, dict) else None


def _is_stale(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    return holder.get("host") == socket.gethostname() and isinstance(pid, int) and not system.process_alive(pid)
