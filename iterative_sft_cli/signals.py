"""SIGTERM, SIGUSR1 and Ctrl-C as requests to stop at the next safe point; a second one ends the process at once, which is safe too."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

from iterative_sft_cli.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, Interrupted, Preempted


class StopRequests:
    """Collects stop signals while the `with` block runs; `check` is cheap and is called at every safe point."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        names = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGBREAK")
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
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
            os._exit(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED)
        self._received = number
        name = signal.Signals(number).name
        os.write(sys.stderr.fileno(), f"\nisft: {name} received, saving and stopping; again to stop at once\n".encode())

    def check(self) -> None:
        """Raises Interrupted (130) after Ctrl-C and Preempted (75) after another stop signal; else returns."""
        if self._received is None:
            return
        name = signal.Signals(self._received).name
        kind = Interrupted if self._received == signal.SIGINT else Preempted
        raise kind(f"stopped by {name}, everything up to here is saved", hint=f"go on with: {self._command}")
