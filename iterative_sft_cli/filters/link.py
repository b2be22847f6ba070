"""One worker process as the main process sees it: frames in and out, a deadline, bounded output, a sure end.

Every way a worker can end is told in words; no call here blocks for longer than the deadline that is set.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.filters import processes
from iterative_sft_cli.filters.wire import MAX_REPLY_BYTES, BrokenWire, read_frame
from iterative_sft_cli.filters.worker import FORK_NOTE, MAX_FORKS
from iterative_sft_cli.temporary import TemporaryFolder

TICK_S = 0.05
MAX_OUTPUT_BYTES = 64 * 1024 * 1024
"""What one call may print before the worker is ended; only the last 4 KB are kept."""
TAIL_BYTES = 4096
MAX_PROCESSES = 128
"""Processes that one worker may have in its session at a time."""

_numbers = itertools.count()


class Died(Exception):
    """A worker ended, or was ended; the message is the cause in words."""


class Link:
    """A running worker. `receive` and `write` belong to one thread; `kill` may be called from any."""

    def __init__(
        self,
        watchdog: Watchdog,
        *,
        env: Sequence[str] = (),
        device: str | None = None,
        memory_gb: float | None = None,
        threads: int | None = None,
    ) -> None:
        self.memory_gb = memory_gb
        self.deadline: float | None = None
        self._limit_text = ""
        self._cause: str | None = None
        self._printed = 0
        self._stacks = False
        self._tail = bytearray()
        self._lock = threading.Lock()
        self._closed = False
        self._watchdog = watchdog
        self._frames: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._mark = f"{os.getpid()}-{next(_numbers)}-{time.time_ns()}"
        self._scratch = TemporaryFolder("filter")
        # a limit on address space would forbid CUDA, which reserves far more than it uses
        data = int(memory_gb * 2**30) if memory_gb and device in (None, "cpu") else None
        given = processes.environment(env, device=device, threads=threads, mark=self._mark)
        self.process = processes.start(given, Path(self._scratch.name), data_bytes=data)
        assert self.process.stdout is not None and self.process.stderr is not None
        # each reader owns its descriptor, so that none is closed, and its number used again, under a reader
        replies, output = os.dup(self.process.stdout.fileno()), os.dup(self.process.stderr.fileno())
        self.process.stdout.close()
        self.process.stderr.close()
        self._readers = [
            threading.Thread(target=self._read_replies, args=(replies,), daemon=True),
            threading.Thread(target=self._read_output, args=(output,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        watchdog.add(self)

    @property
    def scratch(self) -> str:
        """The folder the worker runs in; it is removed with the worker."""
        return self._scratch.name

    @property
    def overdue(self) -> bool:
        """Whether the deadline has passed and no answer is waiting."""
        deadline = self.deadline
        return deadline is not None and time.monotonic() > deadline and self._frames.empty()

    def watch(self, seconds: float | None, key: str = "timeout_s") -> None:
        """Allow so many seconds from now; None for no limit. Restarts the count of what is printed."""
        self._printed = 0
        self._limit_text = "" if seconds is None else f"it took longer than {seconds:g} s ({key})"
        self.deadline = None if seconds is None else time.monotonic() + seconds

    def write(self, frame: bytes) -> None:
        """Send a frame. A worker that is gone is noticed by `receive`."""
        assert self.process.stdin is not None
        view = memoryview(frame)
        with contextlib.suppress(OSError, ValueError):
            while view:
                view = view[self.process.stdin.write(view) :]

    def receive(self) -> dict[str, Any]:
        """The next reply. Raises Died."""
        reply = self._frames.get()
        if isinstance(reply, dict) and self._cause is None:
            return reply
        if self._cause is None and isinstance(reply, Died):
            raise reply
        raise Died(self._how_it_ended())

    def _how_it_ended(self) -> str:
        if self._cause is None:
            for _ in range(100):
                if self.process.poll() is not None:
                    break
                time.sleep(0.01)
            code = self.process.poll()
            if FORK_NOTE.encode() in self.peek():
                self._cause = f"one call started more than {MAX_FORKS} processes"
            elif code is None:
                self._cause = "it closed the connection to isft"
            else:
                # a limit may have ended it while we looked
                self._cause = self._cause or processes.how_it_ended(code)
        return self._cause

    def kill(self, cause: str) -> None:
        """End the process and all that it started; `receive` then reports `cause`."""
        with self._lock:
            self._cause = self._cause or cause
        processes.end(self.process, self._mark)
        # a descendant that escaped may still hold the pipe open
        self._frames.put(None)

    def check_limit(self) -> None:
        """End the worker because it is overdue, once it has said where it stands (if it still can)."""
        cause = self._limit_text or "it took too long"
        with self._lock:
            # an answer from here on comes too late, also one that our question has shaken loose
            self._cause = self._cause or cause
        printed = self._printed
        if processes.ask_for_stacks(self.process):
            for _ in range(20):
                time.sleep(0.01)
                if printed == self._printed > 0:
                    break
                printed = self._printed
            self._stacks = True
        self.kill(cause)

    def peek(self) -> bytes:
        """The last bytes that were printed, once the reader has caught up."""
        gone = self.process.poll() is not None
        self._readers[1].join(0.3 if gone else 0.02)
        return bytes(self._tail)

    def take_tail(self) -> str:
        """The last lines that were printed (more when the stacks are among them), and forget them."""
        text = self.peek().decode("utf-8", "replace").strip()
        self._tail = bytearray()
        lines, size = (40, TAIL_BYTES) if self._stacks else (12, 1500)
        return "\n".join(text.splitlines()[-lines:])[-size:]

    def close(self) -> None:
        """End the process, wait for it, and remove its folder."""
        if self._closed:
            return
        self._closed = True
        self._watchdog.remove(self)
        self.deadline = None
        processes.end(self.process, self._mark)
        with contextlib.suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        self._scratch.cleanup()

    def _read_replies(self, descriptor: int) -> None:
        try:
            with os.fdopen(descriptor, "rb") as stream:
                while (reply := read_frame(stream, MAX_REPLY_BYTES)) is not None:
                    self._frames.put(reply)
        except (BrokenWire, OSError, ValueError) as error:
            self._frames.put(Died(f"it wrote into the connection to isft ({error})"))
        self._frames.put(None)

    def _read_output(self, descriptor: int) -> None:
        with contextlib.suppress(OSError, ValueError), os.fdopen(descriptor, "rb", buffering=0) as stream:
            while chunk := stream.read(1 << 16):
                self._tail = (self._tail + chunk)[-TAIL_BYTES:]
                self._printed += len(chunk)
                if self._printed > MAX_OUTPUT_BYTES and not self._closed:
                    self.kill(f"it printed more than {MAX_OUTPUT_BYTES >> 20} MB in one call")


class Watchdog:
    """One thread that ends workers which are overdue, too large or too many; it sleeps while there are none."""

    def __init__(self) -> None:
        self._links: set[Link] = set()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, link: Link) -> None:
        """Watch a worker."""
        with self._lock:
            self._links.add(link)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="isft-filter-watchdog", daemon=True)
                self._thread.start()
        self._wake.set()

    def remove(self, link: Link) -> None:
        """Stop watching a worker."""
        with self._lock:
            self._links.discard(link)

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._wake.set()

    def _run(self) -> None:
        overdue: set[Link] = set()
        tick = 0
        while not self._closed:
            with self._lock:
                links = [link for link in self._links if link.deadline is not None]
                nothing = not self._links
            if nothing:
                self._wake.wait()
                self._wake.clear()
                continue
            time.sleep(TICK_S)
            tick += 1
            # twice in a row: a machine that was suspended gets a moment to answer
            late = {link for link in links if link.overdue}
            for link in late & overdue:
                link.check_limit()
            overdue = late - overdue
            if tick % 5 == 0:
                self._check_size(links)

    def _check_size(self, links: Sequence[Link]) -> None:
        running = {link.process.pid: link for link in links}
        for session, (count, resident) in processes.usage(list(running)).items() if running else ():
            link = running[session]
            if link.memory_gb is not None and resident > link.memory_gb * 2**30:
                used = resident / 2**30
                link.kill(f"it used {used:.1f} GB of memory, more than {link.memory_gb:g} (memory_gb)")
            elif count > MAX_PROCESSES:
                link.kill(f"it runs {count} processes, more than {MAX_PROCESSES}")
