"""Kernels in C: compiled with the machine's own compiler at first use, kept in the user's cache, optional.

Guarantee: without a compiler, on another kind of machine or with ISFT_NATIVE=0, `load` returns None and the caller computes the
same with torch. Only a library that this user's compiler made from the sources beside this file is loaded.
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

from iterative_sft_cli import system

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
"""A folder for each library, and what they share in headers beside them."""
FLAGS = "-O3 -march=native -fno-math-errno -fassociative-math -fno-signed-zeros -fno-trapping-math -fPIC".split()
"""As fast as -ffast-math makes it, without what that does to NaN and to the whole process's denormal numbers."""
FLAGS_OF = {"training": ["-fopenmp"]}
"""What a library needs beyond these; a compiler without OpenMP still serves the others."""
_COMPILE_S = 120


@functools.cache
def load(name: str, version: int) -> ctypes.CDLL | None:
    """The library made of the folder `name` beside this file, compiled when it is not there yet; None where there is none.

    Its `isft_<name>_version()` must return `version`. It runs on the threads that torch has, so torch is imported before.
    """
    if os.environ.get("ISFT_NATIVE", "1") == "0" or sys.platform == "win32":
        return None
    compiler = shlex.split(os.environ.get("CC", "")) or [c for c in ("cc", "gcc", "clang") if shutil.which(c)][:1]
    if not compiler or shutil.which(compiler[0]) is None:
        log.debug("no C compiler: %s uses torch alone", name)
        return None
    try:
        library = ctypes.CDLL(str(_built(compiler, name)))
        found = library[f"isft_{name}_version"]
        found.restype = ctypes.c_int64
        if found() != version:
            raise OSError("the compiled library is of another version")
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        log.debug("the kernels of %s could not be built: %s", name, error)
        return None
    return library


def fingerprint(library: ctypes.CDLL | None) -> str | None:
    """Its name and what it was made from (sources, flags, compiler, processor); None for None. Bytes depend on it."""
    return None if library is None else Path(library._name).stem


def _built(compiler: Sequence[str], name: str) -> Path:
    """Path of the compiled library, made if needed."""
    flags = [*FLAGS, *FLAGS_OF.get(name, [])]
    folder = _folder()
    library = folder / f"{name}-{_key(compiler, flags, SOURCES / name)}.so"
    if library.exists() and _is_ours(library):
        return library
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "made.so"
        objects = []
        for source in sorted((SOURCES / name).glob("*.c")):
            objects.append(str(Path(scratch) / f"{source.stem}.o"))
            _run([*compiler, *flags, "-c", "-o", objects[-1], str(source)])
        # linked without -fopenmp: the names are found in the OpenMP library that torch has loaded, whose threads are shared
        _run([*compiler, "-shared", "-o", str(made), *objects, "-lm"])
        os.chmod(made, 0o700)
        with made.open("rb") as whole:  # a library that a power cut left torn would end the process that loads it
            os.fsync(whole.fileno())
        os.replace(made, library)
    return library


def _run(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_S).stdout


def _key(compiler: Sequence[str], flags: Sequence[str], sources: Path) -> str:
    """What the compiled code depends on: sources, flags, compiler and processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        processor = "".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    except OSError:
        processor = " ".join(os.uname())
    files = [*sorted(sources.glob("*.[ch]")), *sorted(SOURCES.glob("*.h"))]
    parts = [path.read_bytes() for path in files]
    parts += [" ".join([*compiler, *flags]).encode(), _run([*compiler, "--version"]), processor.encode()]
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
    return system.belongs_to_this_user(status) and not writable and not stat.S_ISLNK(status.st_mode)
