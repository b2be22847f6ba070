"""Reaching rank 0's TCP store, or opening it there.

Guarantee: it takes the time that was given and `2 * ANSWER_S` at most, whatever listens at the other end.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import timedelta
from typing import Any

ANSWER_S = 15.0
"""How long a store that was reached may take to answer; torch tries twice, and waits for ever for one that says nothing."""


def open_store(address: str, port: int, *, serve: bool, wait_s: float) -> Any:
    """A `TCPStore`, which this process serves or looks for up to `wait_s`. Raises RuntimeError or OSError."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    limit = timedelta(seconds=ANSWER_S)
    if serve:
        store = TCPStore(address, port, None, True, limit, wait_for_workers=False)
    else:
        reach(address, port, wait_s)
        store = within(2 * ANSWER_S, lambda: TCPStore(address, port, None, False, limit, wait_for_workers=False))
    store.set_timeout(timedelta(seconds=wait_s))
    return store


def reach(address: str, port: int, wait_s: float) -> None:
    """Return as soon as something listens there. Raises OSError after `wait_s`, where torch's own waits add up."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            socket.create_connection((address, port), timeout=max(1.0, deadline - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises. Raises TimeoutError when it takes longer; nobody waits for it then."""
    found: Future[Any] = Future()

    def run() -> None:
        try:
            found.set_result(call())
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=run, name="isft-connect", daemon=True).start()
    try:
        return found.result(seconds)
    except FutureTimeout:
        raise TimeoutError(f"no answer for {seconds:g} s") from None
