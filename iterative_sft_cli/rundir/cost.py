"""What safety costs: seconds in which hashing and syncing kept a thread of the run from its work. For telemetry only.

Counted is every thread but those that hash and sync in the background; waiting for these counts where it happens.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

KINDS = ("hash", "sync", "wait")


class _Here(threading.local):
    depth = 0
    in_background = False


_here = _Here()
_guard = threading.Lock()
_seconds = dict.fromkeys(KINDS, 0.0)


def enter_background() -> None:
    """From here on, what this thread spends keeps nobody waiting."""
    _here.in_background = True


@contextlib.contextmanager
def blocking(kind: str) -> Iterator[None]:
    """Count the seconds of the block as `kind`; inside another such block they are its."""
    if _here.in_background or _here.depth:
        yield
        return
    _here.depth, begun = 1, time.perf_counter()
    try:
        yield
    finally:
        _here.depth = 0
        with _guard:
            _seconds[kind] += time.perf_counter() - begun


def blocked_seconds() -> dict[str, float]:
    """`{"hash_s": …, "sync_s": …, "wait_s": …}` of this process so far."""
    with _guard:
        return {f"{kind}_s": value for kind, value in _seconds.items()}


class CostMeter:
    """Takes readings: each `row` tells what was blocked, and what went by on the clock, since the one before."""

    def __init__(self, begun: float) -> None:
        self._last = begun
        self._before = dict.fromkeys(blocked_seconds(), 0.0)

    def row(self) -> dict[str, float]:
        """`hash_s`, `sync_s`, `wait_s` and `wall_s` since the last call; at first since `begun` (of `time.monotonic`)."""
        now, found = time.monotonic(), blocked_seconds()
        row = {name: found[name] - self._before[name] for name in found} | {"wall_s": now - self._last}
        self._last, self._before = now, found
        return row


def share_blocked(rows: list[dict[str, object]]) -> tuple[float, float] | None:
    """(seconds blocked, seconds in all) over the `safety` rows of a telemetry; None without any."""
    found = [row for row in rows if row.get("event") == "safety"]
    if not found:
        return None

    def total(*names: str) -> float:
        values = [row.get(name) for row in found for name in names]
        return sum(float(value) for value in values if isinstance(value, int | float))

    return total("hash_s", "sync_s", "wait_s"), total("wall_s")
