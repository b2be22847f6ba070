"""One writer a run across hosts whose file system may not know each other's locks: a file that its holder keeps renewing.

Guarantee: of any number of takers one wins; a holder that was given up finds out before it renews and ends at once. No clocks
are compared: a lease is stale when its text did not change for `expire_s` of the taker's own time.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import DataError, StorageError
from iterative_sft_cli.rundir.fs import TEMP_PREFIX, FileSystem, read_bytes

RENEW_S, EXPIRE_S = 10.0, 60.0
LOOK_S = 1.0
SETTINGS = "ISFT_LEASE_S"
"""Environment variable: renew and expire in seconds, for tests."""

LOCAL = frozenset(
    """ext2 ext3 ext4 xfs btrfs zfs tmpfs ramfs overlay f2fs jfs reiserfs ntfs ntfs3 vfat exfat apfs hfs ecryptfs bcachefs
    squashfs rootfs fuseblk""".split()
)
"""File systems that one kernel has to itself, so that its flock excludes everybody. Of any other nothing is proven."""


def file_system_of(path: Path, mounts: str) -> str | None:
    """The type of the file system that holds `path`; `mounts` is the text of /proc/self/mountinfo."""
    best: tuple[int, str] | None = None
    target = str(path)
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5 or not after:
            continue
        point = fields[4].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        # of two mounts at one point the later one is seen
        if inside and (best is None or len(point) >= best[0]):
            best = (len(point), after.split(" ")[0])
    return best[1] if best else None


def lock_is_enough(path: Path) -> bool:
    """Whether a kernel lock on a file in `path` is known to exclude every host that can see it."""
    wanted = os.environ.get("ISFT_LOCK", "")
    if wanted in ("flock", "lease"):
        return wanted == "flock"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True  # macOS and Windows run on one machine
    return file_system_of(path.resolve(), mounts) in LOCAL


class Lease:
    """The lease of one run directory, held and renewed by a thread until `close`."""

    def __init__(
        self, path: Path, fs: FileSystem, me: Mapping[str, Any], *, is_gone: Callable[[dict[str, Any]], bool]
    ) -> None:
        """Take it. `is_gone` says of a holder that it is known to have ended. Raises DataError when another host renews it."""
        self.path = path
        self._fs = fs
        self._token = uuid.uuid4().hex
        self._me = dict(me)
        self._is_gone = is_gone
        self._renewals = 0
        self._end = threading.Event()
        self._renew_s, self._expire_s = _times()
        self._take()
        self._thread = threading.Thread(target=self._keep, name="isft-lease", daemon=True)
        self._thread.start()

    def _text(self) -> bytes:
        record = {"token": self._token, "renewals": self._renewals, **self._me}
        return (json.dumps(record) + "\n").encode("ascii")

    def _take(self) -> None:
        seen: bytes | None = None
        since = time.monotonic()
        attempt = 0
        told = False
        while True:
            found = read_bytes(self.path)
            if found is None:
                if self._create(self.path):
                    return
                continue
            if found != seen:
                if seen is not None:
                    # a renewal is seen half-way through at times
                    raise DataError(
                        f"another process is working in this run: {describe(found if _record(found) else seen)}",
                        where=str(self.path.parent),
                        hint="wait for it, stop it, or choose another output_dir",
                    )
                seen, since = found, time.monotonic()
            holder = _record(found)
            if self._is_gone(holder) or time.monotonic() - since > self._expire_s:
                if self._take_over(seen, f"{TEMP_PREFIX}{self.path.name}.{_word(holder.get('token'))}.{attempt}"):
                    return
                attempt, since = attempt + 1, time.monotonic()
                continue
            if not told:
                told = True
                sys.stderr.write(
                    f"isft: {self.path.name} was held by {describe(found)}; watching for up to {self._expire_s:g} s "
                    "whether it still is\n"
                )
            time.sleep(min(LOOK_S, self._renew_s / 4))

    def _take_over(self, stale: bytes, name: str) -> bool:
        """Put our lease in the place of a stale one. Of all takers the one that makes the mark `name` may."""
        mark = self.path.with_name(name)
        begun = time.monotonic()
        if not self._create(mark):
            return False
        if read_bytes(self.path) == stale and time.monotonic() - begun < self._expire_s / 2:
            try:
                self._fs.rename(mark, self.path)
            except StorageError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    return False
                raise
            return self.is_ours()
        self._fs.discard(mark)
        return False

    def _create(self, path: Path) -> bool:
        try:
            self._fs.create(path, self._text(), sync="lease")
        except StorageError as error:
            if isinstance(error.__cause__, FileExistsError):
                return False
            raise
        return True

    def is_ours(self) -> bool:
        """Whether the lease on disk is this one."""
        return _record(read_bytes(self.path) or b"").get("token") == self._token

    def _keep(self) -> None:
        renewed = time.monotonic()
        while not self._end.wait(self._renew_s):
            try:
                if not self.is_ours():
                    _give_up(f"{self.path}: another host has taken this run over; nothing more is written here")
                self._renewals += 1
                self._renew()
                renewed = time.monotonic()
            except (OSError, StorageError) as error:
                if time.monotonic() - renewed > self._expire_s * 0.6:
                    _give_up(f"{self.path}: could not be renewed ({error}), so another host may take this run over")

    def _renew(self) -> None:
        # into the file that was ours a moment ago: where a taker has put its own in the place, this writes into nothing
        fd = self._fs.open_lock(self.path)
        try:
            if _record(os.read(fd, 4096)).get("token") != self._token:
                _give_up(f"{self.path}: another host has taken this run over; nothing more is written here")
            self._fs.replace_text(fd, self.path, self._text())
            os.fsync(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Give it back."""
        self._end.set()
        self._thread.join(self._expire_s)
        with contextlib.suppress(StorageError, OSError):
            if self.is_ours():
                self._fs.unlink(self.path)


def describe(text: bytes) -> str:
    """Who a lease's text says its holder is."""
    record = _record(text)
    if not record:
        return "a holder that has not written who it is"
    return f"pid {record.get('pid')} on {record.get('host')} since {record.get('since')}"


def _times() -> tuple[float, float]:
    text = os.environ.get(SETTINGS, "")
    if not text:
        return RENEW_S, EXPIRE_S
    renew, _, expire = text.partition(",")
    return float(renew), float(expire)


def _record(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _word(token: Any) -> str:
    return token if isinstance(token, str) and token.isalnum() and len(token) <= 64 else "unnamed"


def _give_up(text: str) -> None:
    sys.stderr.write(f"isft: {text}\n")
    sys.stderr.flush()
    os._exit(4)
