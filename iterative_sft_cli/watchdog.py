"""Ends a process whose engine has hung: stacks are dumped, the run is tried again once, then it is a named error.

A thread in a C call cannot be interrupted from Python, so the process itself is replaced: what was sealed stays, the lock goes
with the process, and the same command goes on from there.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from iterative_sft_cli.errors import EXIT_STORAGE

RETRIED = "ISFT_RETRIED_AFTER_HANG"
"""Environment variable that marks the second try."""


class Watchdog:
    """Calls `on_hang` from its own thread when `beat` was not called for `timeout_s` seconds; None never does."""

    def __init__(self, timeout_s: float | None, on_hang: Callable[[], None]) -> None:
        self._timeout_s = timeout_s
        self._on_hang = on_hang
        self._last = time.monotonic()
        self._ended = threading.Event()

    def beat(self) -> None:
        """Say that work goes on."""
        self._last = time.monotonic()

    def __enter__(self) -> Watchdog:
        if self._timeout_s is not None:
            threading.Thread(target=self._watch, args=(self._timeout_s,), name="isft-watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def _watch(self, timeout_s: float) -> None:
        while not self._ended.wait(min(1.0, timeout_s / 4)):
            if time.monotonic() - self._last > timeout_s:
                self._on_hang()
                return


def end_hung_process(run: Path, what: str, timeout_s: float) -> None:
    """Dump every thread's stack to stderr and to `telemetry-hang.txt` in the run, then start the command again, once.

    Never returns. The second time it exits 4.
    """
    again = RETRIED not in os.environ and bool(getattr(sys, "orig_argv", None))
    sys.stderr.write(f"\nisft: {what} has not made a token for {timeout_s:g} s; where it stands:\n")
    sys.stderr.flush()
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    try:
        with open(run / "hang.txt", "a", encoding="utf-8") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
    except OSError:
        pass  # the stacks are on stderr
    if again:
        sys.stderr.write("isft: starting again where it was, once\n")
        sys.stderr.flush()
        os.environ[RETRIED] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sys.stderr.write(
        f"isft: {what} hung twice\nhint: raise generate.timeout_s if it is only slow; the stacks are in {run / 'hang.txt'}\n"
    )
    sys.stderr.flush()
    os._exit(EXIT_STORAGE)
