"""Decoding kernels in C: compiled with the machine's own compiler at first use, kept in the user's cache, optional.

Guarantee: without a compiler, on another kind of machine or with ISFT_NATIVE=0, `load_kernels` returns None and the engine
computes the same with torch. Only a library that this user's compiler made from the source beside this file is loaded.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
VERSION = 1
FLAGS = (
    "-O3 -march=native -fno-math-errno -fassociative-math -fno-signed-zeros -fno-trapping-math -fPIC -shared".split()
)
"""As fast as -ffast-math makes it, without what that does to NaN and to the whole process's denormal numbers."""
_COMPILE_S = 120


@functools.cache
def load_kernels() -> ctypes.CDLL | None:
    """The library, compiled when it is not there yet; None where there is none."""
    if os.environ.get("ISFT_NATIVE", "1") == "0" or sys.platform == "win32":
        return None
    compiler = shlex.split(os.environ.get("CC", "")) or [c for c in ("cc", "gcc", "clang") if shutil.which(c)][:1]
    if not compiler or shutil.which(compiler[0]) is None:
        log.debug("no C compiler: decoding uses torch alone")
        return None
    try:
        library = ctypes.CDLL(str(_built(compiler)))
        library.isft_version.restype = ctypes.c_int64
        if library.isft_version() != VERSION:
            raise OSError("the compiled library is of another version")
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        log.debug("the decoding kernels could not be built: %s", error)
        return None
    return library


def kernels_fingerprint() -> str | None:
    """What the kernels in use were made from (source, flags, compiler, processor); None without them. Bytes depend on it."""
    library = load_kernels()
    return None if library is None else Path(library._name).stem.removeprefix("kernels-")


def _built(compiler: Sequence[str]) -> Path:
    """Path of the compiled library, made if needed."""
    folder = _folder()
    library = folder / f"kernels-{_key(compiler)}.so"
    if library.exists() and _is_ours(library):
        return library
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "kernels.so"
        subprocess.run(
            [*compiler, *FLAGS, "-o", str(made), str(SOURCE)], check=True, capture_output=True, timeout=_COMPILE_S
        )
        os.chmod(made, 0o700)
        with made.open("rb") as whole:
            # one that a power cut left torn would end the process that loads it
            os.fsync(whole.fileno())
        os.replace(made, library)
    return library


def _key(compiler: Sequence[str]) -> str:
    """What the compiled code depends on: source, flags, compiler and processor."""
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, timeout=_COMPILE_S).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        processor = "".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    except OSError:
        processor = " ".join(os.uname())
    parts = (SOURCE.read_bytes(), " ".join([*compiler, *FLAGS]).encode(), version, processor.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _folder() -> Path:
    """A folder that only this user can write to: in their cache, else a fresh temporary one."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "isft"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_ours(folder) and os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    scratch = Path(tempfile.mkdtemp(prefix="isft-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return scratch


def _is_ours(path: Path) -> bool:
    """Whether the path belongs to this user, and nobody else may write to it."""
    status = path.lstat()
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid == os.getuid() and not writable and not stat.S_ISLNK(status.st_mode)
