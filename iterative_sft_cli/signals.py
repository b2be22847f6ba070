"""SIGTERM, SIGUSR1 and Ctrl-C as requests to stop at the next safe point; a second one ends the process at once, which is safe too."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from iterative_sft_cli.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, Interrupted, Preempted

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGBREAK")


def _numbers() -> list[int]:
    return [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


def _exit_code(number: int) -> int:
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED


def _say(text: str) -> None:
    # not through sys.stderr: the signal may have come in the middle of a write to it
    with contextlib.suppress(OSError):
        os.write(2, text.encode("utf-8", "backslashreplace"))


def obey_before_the_start(argv: Sequence[str]) -> None:
    """Until a `StopRequests` takes over, a stop signal ends the process at once: nothing is under way that could be saved.

    `argv` is the command line without the program; only commands that train are asked to stop in this way.
    """
    if not argv or argv[0] not in ("train", "resume"):
        return
    command = shlex.join(["isft", *argv])

    def end(number: int, frame: FrameType | None) -> None:
        _say(f"\nisft: stopped by {signal.Signals(number).name}, nothing was under way\nhint: go on with: {command}\n")
        os._exit(_exit_code(number))

    for number in _numbers():
        signal.signal(number, end)


def ignore_from_the_end_on() -> None:
    """All is said and done: a stop signal while the interpreter shuts down must not change the exit code."""
    for number in _numbers():
        signal.signal(number, signal.SIG_IGN)


class StopRequests:
    """Collects stop signals while the `with` block runs; `check` is cheap and is called at every safe point."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        for number in _numbers():
            try:
                self._before[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread: the caller owns the signals
                return self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            _say(f"\nisft: stopped at once; what was saved is safe\nhint: go on with: {self._command}\n")
            os._exit(_exit_code(number))
        self._received = number
        _say(f"\nisft: {signal.Signals(number).name} received, saving and stopping; again to stop at once\n")

    def check(self) -> None:
        """Raises Interrupted (130) after Ctrl-C and Preempted (75) after another stop signal; else returns."""
        if self._received is None:
            return
        name = signal.Signals(self._received).name
        kind = Interrupted if self._received == signal.SIGINT else Preempted
        raise kind(f"stopped by {name}, everything up to here is saved", hint=f"go on with: {self._command}")
