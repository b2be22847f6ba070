"""Every call that changes a file of a run; after a failed fsync nothing more is written.

All other modules of the package change the disk only through `FileSystem`. Before each change the module's `hook` sees
an `Op`; a test can record it, raise an OSError in its place, or end the process there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from iterative_sft_cli import system
from iterative_sft_cli.errors import StorageError
from iterative_sft_cli.rundir import cost

TEMP_PREFIX = ".tmp-"
"""How the names of unfinished files and folders begin; recovery removes them."""


@dataclass(frozen=True, slots=True)
class Op:
    """One change about to happen: kind is mkdir, create, write, truncate, fsync, fsync_dir, rename, unlink, rmdir, chmod or ack.

    `label` names the purpose of an fsync (or what is acknowledged), `target` is where a rename leads, `data` what is written, `length` where a
    truncation cuts.
    """

    kind: str
    path: Path
    label: str = ""
    target: Path | None = None
    data: memoryview | None = None
    length: int = 0


Hook = Callable[[Op], int | None]

hook: Hook | None = None
"""Called before each change; for a write it may return how many bytes the first call is to take (a short write)."""

_DOING = {
    "mkdir": "cannot make the folder",
    "create": "cannot create the file",
    "write": "cannot write",
    "truncate": "cannot shorten the file",
    "fsync": "the disk did not confirm the file",
    "fsync_dir": "the disk did not confirm the folder",
    "rename": "cannot rename",
    "unlink": "cannot remove the file",
    "rmdir": "cannot remove the folder",
    "chmod": "cannot set the mode",
    "open": "cannot open",
    "read": "cannot read",
}

_AGAIN = "then run the same command again: it goes on where it was"

_HINTS = {
    errno.ENOSPC: f"free some space, {_AGAIN}",
    errno.EROFS: f"the file system is mounted read-only; mount it writable, {_AGAIN}",
    errno.EACCES: f"let this user write there, {_AGAIN}",
    errno.EPERM: f"let this user write there, {_AGAIN}",
    errno.EIO: f"the device reports errors; look at the system's log, move the run to a healthy disk, {_AGAIN}",
    errno.ELOOP: "a symbolic link stands where a file of the run belongs; remove it",
    errno.ENAMETOOLONG: "choose a shorter output_dir",
}
if hasattr(errno, "EDQUOT"):
    _HINTS[errno.EDQUOT] = f"your disk quota is used up; free some space or ask for more, {_AGAIN}"


def storage_error(error: OSError, kind: str, path: Path, needed: int | None = None) -> StorageError:
    """The operating system's refusal as a message with path, bytes needed and the mend."""
    code = error.errno or 0
    what = f"{_DOING.get(kind, kind)}: {os.strerror(code) if code else error}"
    if needed and code in (errno.ENOSPC, getattr(errno, "EDQUOT", -1)):
        what += f" ({needed} more bytes needed{_free_note(path)})"
    return StorageError(what, where=str(path), hint=_HINTS.get(code, f"see to the disk, {_AGAIN}"))


def foreign_error(error: Exception, path: Path, needed: int | None = None) -> StorageError | None:
    """The same for an exception of a library that writes by itself (safetensors says `os error 28`); None when it is no storage error."""
    if isinstance(error, OSError):
        return storage_error(error, "write", Path(str(error.filename)) if error.filename else path, needed)
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found is None:
        return None
    return storage_error(OSError(int(found.group(1)), ""), "write", path, needed)


def _free_note(path: Path) -> str:
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            return f", {system.free_bytes(folder)} free"
    return ""


def require_space(path: Path, needed: int) -> None:
    """Raise StorageError when the file system that holds (or will hold) `path` has less than `needed` bytes free."""
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            free = system.free_bytes(folder)
            break
    else:
        return
    if free < needed:
        raise StorageError(
            f"not enough space: {needed} bytes are needed, {free} are free",
            where=str(path),
            hint="free some space, or choose another output_dir",
        )


def read_bytes(path: Path) -> bytes | None:
    """The whole file, None when there is none. Raises StorageError when the disk cannot read it."""
    try:
        fd = os.open(path, os.O_RDONLY | system.OPEN_FLAGS)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error(error, "open", path) from error
    try:
        with os.fdopen(fd, "rb") as file:
            return file.read()
    except OSError as error:
        raise storage_error(error, "read", path) from error


def list_names(folder: Path) -> list[str]:
    """The names in `folder`, sorted; none when there is no such folder."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise storage_error(error, "read", folder) from error


class FileSystem:
    """The writer of one run directory. Not shared between processes; two threads may use it on different paths."""

    def __init__(self) -> None:
        self.failed: StorageError | None = None

    @contextlib.contextmanager
    def _change(self, op: Op, *, needed: int | None = None, cleanup: bool = False) -> Iterator[int | None]:
        if self.failed is not None and not cleanup:
            raise self.failed
        try:
            yield hook(op) if hook is not None else None
        except OSError as error:
            failure = storage_error(error, op.kind, op.path, needed)
            if op.kind in ("fsync", "fsync_dir"):
                # a second fsync can succeed with the bytes lost: this writer is done
                self.failed = failure
            raise failure from error

    def mkdir(self, path: Path) -> None:
        """Make one folder; its parent exists."""
        with self._change(Op("mkdir", path)):
            os.mkdir(path)

    def make_dirs(self, path: Path, label: str) -> None:
        """Make `path` and the parents it lacks, each name synced."""
        if path.is_dir():
            return
        self.make_dirs(path.parent, label)
        try:
            self.mkdir(path)
        except StorageError as error:
            if isinstance(error.__cause__, FileExistsError) and path.is_dir():
                return
            raise
        self.sync_dir(path.parent, label)

    def create(self, path: Path, data: bytes, *, sync: str | None) -> None:
        """Write a new file; with `sync`, its bytes are on the device on return."""
        with self._change(Op("create", path), needed=len(data)):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | system.OPEN_FLAGS, 0o666)
        try:
            self._write(fd, path, data)
            if sync is not None:
                with cost.blocking("sync"), self._change(Op("fsync", path, sync)):
                    system.sync_file(fd)
        finally:
            os.close(fd)

    def publish(self, path: Path, data: bytes, *, data_label: str, dir_label: str | None) -> None:
        """Put `data` at `path` in one step: readers, and any crash, see the old file or the new one."""
        temp = path.with_name(TEMP_PREFIX + path.name)
        if os.path.lexists(temp):
            self.unlink(temp)
        try:
            self.create(temp, data, sync=data_label)
        except StorageError:
            self.discard(temp)
            raise
        self.rename(temp, path)
        if dir_label is not None:
            self.sync_dir(path.parent, dir_label)

    def open_append(self, path: Path) -> int:
        """A descriptor that writes at the end of `path`, made when missing."""
        with self._change(Op("create", path) if not path.exists() else Op("open", path)):
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | system.OPEN_FLAGS, 0o666)

    def open_lock(self, path: Path) -> int:
        """A descriptor of the lock file, made when missing, not emptied."""
        with self._change(Op("create", path) if not path.exists() else Op("open", path)):
            return os.open(path, os.O_RDWR | os.O_CREAT | system.OPEN_FLAGS, 0o666)

    def append(self, fd: int, path: Path, data: bytes) -> None:
        """Write all of `data` to `fd`."""
        self._write(fd, path, data)

    def replace_text(self, fd: int, path: Path, data: bytes) -> None:
        """Make `data` the whole text of the open file (the lock's: never read as truth, so no sync)."""
        with self._change(Op("truncate", path)):
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
        self._write(fd, path, data)

    def _write(self, fd: int, path: Path, data: bytes) -> None:
        view = memoryview(data)
        while view:
            with self._change(Op("write", path, data=view), needed=len(view)) as limit:
                view = view[os.write(fd, view if limit is None else view[:limit]) :]

    def truncate(self, path: Path, length: int) -> None:
        """Cut the file to its first `length` bytes."""
        with self._change(Op("truncate", path, length=length)):
            fd = os.open(path, os.O_RDWR | system.OPEN_FLAGS)
            try:
                os.ftruncate(fd, length)
            finally:
                os.close(fd)

    def sync_fd(self, fd: int, path: Path, label: str) -> None:
        """Return when the bytes of the open file are on the device."""
        with cost.blocking("sync"), self._change(Op("fsync", path, label)):
            system.sync_file(fd)

    def sync_file(self, path: Path, label: str) -> None:
        """Return when the bytes of `path`, whoever wrote them, are on the device."""
        with cost.blocking("sync"), self._change(Op("fsync", path, label)):
            fd = os.open(path, os.O_RDWR | system.OPEN_FLAGS)
            try:
                system.sync_file(fd)
            finally:
                os.close(fd)

    def sync_dir(self, path: Path, label: str) -> None:
        """Return when the names in `path` are on the device."""
        with cost.blocking("sync"), self._change(Op("fsync_dir", path, label)):
            system.sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        """Give `source` the name `target`; a file there is replaced, a folder that is not empty is an error."""
        with self._change(Op("rename", source, target=target)):
            os.replace(source, target)

    def chmod(self, path: Path, mode: int) -> None:
        """Set the permission bits of a file."""
        with self._change(Op("chmod", path)):
            os.chmod(path, mode)

    def unlink(self, path: Path) -> None:
        """Remove one name."""
        with self._change(Op("unlink", path), cleanup=True):
            os.unlink(path)

    def remove(self, path: Path) -> None:
        """Remove a file, a link, or a folder with all that is in it; links are not followed."""
        if stat.S_ISDIR(os.lstat(path).st_mode):
            for name in list_names(path):
                self.remove(path / name)
            with self._change(Op("rmdir", path), cleanup=True):
                os.rmdir(path)
        else:
            self.unlink(path)

    def discard(self, path: Path) -> None:
        """Remove our own unfinished thing if the disk lets us; recovery does it otherwise."""
        with contextlib.suppress(StorageError, OSError):
            self.remove(path)

    def acknowledge(self, path: Path, what: str) -> None:
        """Tell the hook that `what` has been promised to the user as saved."""
        if hook is not None:
            hook(Op("ack", path, what))
