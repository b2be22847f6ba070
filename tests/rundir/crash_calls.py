"""SIGKILL before any call of libc that can change the disk, counted over all threads and libraries of a real run.

`crash_calls.c` does the counting. It has to be there from the start of the process (`preloaded`), so the suites restart
themselves with it; without a C compiler they are left out.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

from crash_base import Subject, Tally
from crash_fork import Prepare, in_child, kill_points, reference

SOURCE = Path(__file__).with_suffix(".c")
PRELOAD = "LD_PRELOAD"


def preloaded() -> bool:
    """Whether this process counts calls."""
    return hasattr(ctypes.CDLL(None), "isft_arm")


def restart_counting(folder: Path) -> bool:
    """Start this command again with calls counted; returns False where that cannot be."""
    library = folder / "crash_calls.so"
    build = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    try:
        if subprocess.run(build, capture_output=True, check=False).returncode != 0:
            return False
    except FileNotFoundError:
        return False
    os.environ[PRELOAD] = str(library)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def before_call(at: int) -> Prepare:
    """SIGKILL to the child before call `at`."""
    return lambda: ctypes.CDLL(None).isft_arm(ctypes.c_long(at))


def count_calls(subject: Subject, root: Path) -> int:
    """Calls of one uninterrupted run that can change the disk."""
    reference(subject, root)
    note = root / "calls"

    def work() -> None:
        before_call(-1)()
        try:
            subject.train(root / "run")
        finally:
            note.write_text(str(ctypes.CDLL(None).isft_seen()))

    shutil.rmtree(root / "run")
    code, _, told = in_child(work)
    if code != 0:
        raise AssertionError(f"the run that counts ended with {code}:\n{told}")
    return int(note.read_text())


def kill_calls(subject: Subject, root: Path, *, points: int | None, seed: int = 0) -> Tally:
    """SIGKILL before every call that can change the disk (or `points` of them, evenly), then a start that ends it."""
    total = count_calls(subject, root)
    every = 1 if points is None else max(1, total // points)
    tally = kill_points(subject, root, total=total, every=every, strike=before_call, seed=seed)
    tally.counts["calls in a run"] = total
    return tally
