"""Many requests in flight over a few servers: bounded concurrency, retries with growing pauses, every job answered once.

Guarantee: each job's result is yielded exactly once, or the crew stops with the first error that no retry mends; leaving the
generator early stops every worker.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.generate.http_client import ServerError

Job = TypeVar("Job")
Result = TypeVar("Result")

FIRST_PAUSE_S = 0.5
MOST_PAUSE_S = 60.0


@dataclass(slots=True)
class Counters:
    """What happened, for telemetry: never part of a result."""

    num_requests: int = 0
    num_retries: int = 0
    num_tokens: int = 0


class Crew(Generic[Job, Result]):
    """`ask(server, job, on_tokens, stopped)` does one job; `on_tokens(n)` reports progress, `stopped()` says to give up.

    A server that refuses connections rests while others are there. `recover(server, given_up)` is called in a thread of its own,
    one a server, when no answer came at all from it; it may restart it and returns whether the server is worth asking again. Until
    then its jobs go to the others.
    """

    def __init__(
        self,
        servers: Sequence[str],
        ask: Callable[[str, Job, Callable[[int], None], Callable[[], bool]], Result],
        *,
        concurrency: int,
        max_retries: int,
        requests_per_minute: int | None = None,
        recover: Callable[[str, Callable[[], bool]], bool] | None = None,
    ) -> None:
        self.servers = list(servers)
        self.ask = ask
        self.concurrency = concurrency
        self.max_retries = max_retries
        self.interval_s = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self.recover = recover
        self.counters = Counters()
        self._lock = threading.Lock()
        self._back = threading.Condition(self._lock)
        self._away: set[str] = set()
        self._load = dict.fromkeys(self.servers, 0)
        self._resting: dict[str, float] = {}
        self._next_start = 0.0
        self._tokens = 0
        self._stop = threading.Event()

    def run(self, jobs: Sequence[Job], heartbeat: Callable[[int], None]) -> Iterator[Result]:
        """Yield results as they come. `heartbeat` is called at least twice a second with the tokens made since."""
        waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            waiting.put(job)
        done: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()
        self._done = done
        self._stop.clear()
        count = min(self.concurrency * len(self.servers), len(jobs))
        workers = [threading.Thread(target=self._work, args=(waiting, done), daemon=True) for _ in range(count)]
        for worker in workers:
            worker.start()
        try:
            left = len(jobs)
            while left:
                try:
                    result = done.get(timeout=0.5)
                except queue.Empty:
                    heartbeat(self._take_tokens())
                    continue
                if isinstance(result, BaseException):
                    raise result
                left -= 1
                heartbeat(self._take_tokens())
                yield result
        finally:
            self._stop.set()
            with self._back:
                self._back.notify_all()

    def _take_tokens(self) -> int:
        with self._lock:
            tokens, self._tokens = self._tokens, 0
            self.counters.num_tokens += tokens
        return tokens

    def _count(self, tokens: int) -> None:
        with self._lock:
            self._tokens += tokens

    def _work(self, waiting: queue.SimpleQueue[Job], done: queue.SimpleQueue[Result | BaseException]) -> None:
        while not self._stop.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put(self._do(job))
            except BaseException as error:  # noqa: BLE001 - it is raised again where the results are read
                done.put(error)
                return

    def _do(self, job: Job) -> Result:
        failures = 0
        while True:
            server = self._choose()
            self._wait_for_rate()
            try:
                return self.ask(server, job, self._count, self._stop.is_set)
            except ServerError as error:
                failures += 1
                with self._lock:
                    self.counters.num_retries += 1
                if not error.retryable or self._stop.is_set():
                    raise DataError(str(error), where=f"server {server}") from error
                recovered = error.status is None and self._mend(server)
                if failures > self.max_retries:
                    raise DataError(
                        f"{error} (asked {failures} times)",
                        where=f"server {server}",
                        hint="run the same command again when it answers: what is finished is kept",
                    ) from error
                if not recovered:
                    self._pause(failures, error.retry_after_s)
            finally:
                with self._lock:
                    self._load[server] -= 1

    def _choose(self) -> str:
        """The server with the fewest requests among those not resting; waits while every one of them is being recovered."""
        with self._back:
            self.counters.num_requests += 1
            while len(self._away) == len(self.servers) and not self._stop.is_set():
                self._back.wait(0.5)
            now = time.monotonic()
            there = [s for s in self.servers if s not in self._away] or self.servers
            awake = [s for s in there if self._resting.get(s, 0.0) <= now] or there
            server = min(awake, key=lambda s: self._load[s])
            self._load[server] += 1
            return server

    def _mend(self, server: str) -> bool:
        """Whether another try may come at once: the server is being recovered, or another one is awake."""
        with self._back:
            self._resting[server] = time.monotonic() + 10.0
            if self.recover is None:
                return len(self.servers) > 1 and any(
                    self._resting.get(s, 0.0) <= time.monotonic() for s in self.servers if s != server
                )
            if server not in self._away and not self._stop.is_set():
                self._away.add(server)
                threading.Thread(target=self._recover, args=(server,), name="isft-recover", daemon=True).start()
        return True

    def _recover(self, server: str) -> None:
        assert self.recover is not None
        try:
            mended = self.recover(server, self._stop.is_set)
        except BaseException as error:  # noqa: BLE001 - it is raised again where the results are read
            self._done.put(error)
            return
        with self._back:
            self._away.discard(server)
            if mended:
                self._resting.pop(server, None)
            self._back.notify_all()

    def _wait_for_rate(self) -> None:
        if self.interval_s:
            with self._lock:
                start = max(self._next_start, time.monotonic())
                self._next_start = start + self.interval_s
            self._stop.wait(max(start - time.monotonic(), 0.0))

    def _pause(self, failures: int, asked_s: float | None) -> None:
        pause = min(FIRST_PAUSE_S * 2 ** (failures - 1), MOST_PAUSE_S)
        # spread, so that rows that failed together do not come back together; no result depends on it
        self._stop.wait(max(pause * random.uniform(0.75, 1.25), asked_s or 0.0))
