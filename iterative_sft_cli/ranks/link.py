"""What passes between ranks: commands, answers, meetings and heartbeats, all over one TCP store.

Guarantee: a rank only ever waits on the store, where it sees within `dead_after_s` that another one has gone; a collective is
entered when every rank is at its door, so no rank spends its collective's time-out waiting for another's work.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from iterative_sft_cli.errors import IsftError, Preempted
from iterative_sft_cli.ranks.connect import open_store
from iterative_sft_cli.ranks.faults import PATIENCE, Ended, MeetingFailed, Patience, RankError, failure_of, first_line
from iterative_sft_cli.ranks.placement import Placement
from iterative_sft_cli.ranks.wire import pack, unpack

SLICE_S = 1.0
"""A wait on the store is cut into slices of this length; between them the rank looks whether the others are there."""
SURFACE_S = 15.0
"""How long a main thread has to raise what was found before the process is ended from beside it."""
ABSENT_S = 30.0
"""How long rank 0 stays at its end for ranks that have not come yet: they are to hear how it ended."""


class Link:
    """One rank's end. The thread that made it calls every method; a thread of its own beats and watches."""

    def __init__(self, placement: Placement, patience: Patience | None = None) -> None:
        """Connect. Raises RankError when the store cannot be reached within `join_s`."""
        self.placement, self.patience = placement, patience or Patience.of()
        self.rank, self.size = placement.rank, placement.size
        self.name = f"rank {self.rank} ({socket.gethostname()}, pid {os.getpid()})"
        self._store = self._connect(serve=self.rank == 0 and not _agent_serves())
        self._watch_store = self._connect(serve=False)
        # over a cut network an answer never comes
        self._watch_store.set_timeout(timedelta(seconds=self.patience.dead_after_s))
        self._meetings = self._commands = self._heard = 0
        self._swept = 0
        self._failure: Exception | None = None
        self._stop: str | None = None
        self._asked_to_stop: str | None = None
        self._dead: set[int] = set()
        self._closing = threading.Event()
        self._surfaced = threading.Event()
        self.names = {self.rank: self.name}
        self.children: Sequence[Any] = ()
        self.on_stuck: Callable[[Exception], None] = lambda _error: None
        for key, value in (("name", self.name), ("beat", "0"), ("here", "")):
            self._store.set(f"{key}/{self.rank}", value)
        self._looked = time.monotonic()
        threading.Thread(target=self._watch, name="isft-ranks", daemon=True).start()
        threading.Thread(target=self._guard, name="isft-ranks-guard", daemon=True).start()

    # --- joining --------------------------------------------------------------------------------------------------------

    def _connect(self, *, serve: bool) -> Any:
        place = self.placement
        port = self.port if hasattr(self, "_store") else place.port
        try:
            return open_store(place.address, port, serve=serve, wait_s=self.patience.join_s)
        except (RuntimeError, OSError) as error:
            raise RankError(
                f"rank {place.rank} cannot reach rank 0's store at {place.address}:{place.port}: {first_line(error)}",
                hint="is rank 0 running, and does the network let this port through? set MASTER_PORT for another one, "
                f"and {PATIENCE} to wait longer",
            ) from None

    @property
    def port(self) -> int:
        """The store's port, also when it was chosen by the system."""
        return int(self._store.port)

    @property
    def store(self) -> Any:
        """The store, for a process group beside what this class keeps in it."""
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        return PrefixStore("collectives", self._store)

    def join(self) -> None:
        """Wait until every rank is here. Raises RankError naming those that did not come."""
        deadline = time.monotonic() + self.patience.join_s
        absent = list(range(self.size))
        while absent:
            self.check()
            try:
                absent = [rank for rank in absent if not self._store.check([f"here/{rank}"])]
            except RuntimeError as error:
                raise self.blame(error) from None
            if absent and time.monotonic() > deadline:
                self._dead.update(absent)
                raise RankError(
                    f"{_ranks(absent)} of {self.size} did not come within {self.patience.join_s:g} s",
                    hint="look at their output; every host must reach "
                    f"{self.placement.address}:{self.port} and start the same command; {PATIENCE} waits longer",
                )
            if absent:
                time.sleep(0.05)

    # --- what both sides do ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises what has happened to the run: RankError, Preempted (another rank got a stop signal), on workers Ended."""
        if self._failure is not None:
            self._surfaced.set()
            raise self._failure
        if self._stop is not None and self.rank == 0:
            raise Preempted(
                f"stopped by {self._stop}, everything up to here is saved", hint="run the same command again"
            )

    def wait(self, key: str) -> bytes:
        """The value of `key`, as soon as another rank has set it."""
        while True:
            self.check()
            try:
                self._store.wait([key], timedelta(seconds=SLICE_S))
                return bytes(self._store.get(key))
            except RuntimeError as error:
                if not _timed_out(error):
                    raise self.blame(error) from None

    def _set(self, key: str, value: Any) -> None:
        try:
            self._store.set(key, value)
        except RuntimeError as error:
            raise self.blame(error) from None

    def meet(self, problem: dict[str, Any] | None = None) -> None:
        """Return when every rank has come to this meeting; meetings are counted. Raises MeetingFailed, everywhere, when one of
        them brought a problem."""
        number, self._meetings = self._meetings, self._meetings + 1
        if problem is not None:
            self._set(f"meet/{number}/bad", pack({**problem, "rank": self.rank, "name": self.name}))
        try:
            last = self._store.add(f"meet/{number}/n", 1) == self.size
            if last:
                bad = self._store.check([f"meet/{number}/bad"])
                self._store.set(f"meet/{number}/done", self._store.get(f"meet/{number}/bad") if bad else b"null")
        except RuntimeError as error:
            raise self.blame(error) from None
        found = unpack(self.wait(f"meet/{number}/done"))
        if self.rank == 0:
            # everybody has left the meeting before
            self.forget(*(f"meet/{number - 1}/{part}" for part in ("n", "done", "bad")))
        if found is not None:
            raise MeetingFailed(found)

    @property
    def meetings(self) -> int:
        """How many meetings this rank has been to."""
        return self._meetings

    def forget(self, *keys: str) -> None:
        """Remove keys that everybody has read, where they are there."""
        for key in keys:
            with contextlib.suppress(RuntimeError):
                self._store.delete_key(key)

    def blame(self, error: BaseException) -> Exception:
        """What is behind a broken connection: the rank that died, as soon as that is known; else `error` itself as RankError."""
        deadline = time.monotonic() + self.patience.dead_after_s + 2 * self.patience.beat_s
        while time.monotonic() < deadline and self._failure is None:
            time.sleep(0.05)
        self._surfaced.set()
        return self._failure or RankError(f"{self.name}: the connection between ranks broke: {first_line(error)}")

    # --- rank 0 ---------------------------------------------------------------------------------------------------------

    def command(self, do: str, *, parts: Sequence[Any] | None = None, **values: Any) -> None:
        """Have every other rank do something, in the order of the calls. `parts` holds what only rank r gets, at place r."""
        self.check()
        number, self._commands = self._commands, self._commands + 1
        for rank in range(1, self.size):
            if parts is not None:
                self._set(f"part/{number}/{rank}", pack(parts[rank]))
        self._set(f"do/{number}", pack({"do": do, "parts": parts is not None, **values}))

    def sweep(self) -> None:
        """Forget the commands that everybody has read: call it after a meeting that the newest command led to."""
        self.forget(*(f"do/{number}" for number in range(self._swept, self._commands)))
        self._swept = self._commands

    def hear(self, wait_s: float = 0.0) -> list[dict[str, Any]]:
        """What the others have said since the last call, waiting up to `wait_s` for the first of it."""
        found: list[dict[str, Any]] = []
        self.check()
        try:
            if wait_s:
                with contextlib.suppress(_Waited):
                    self._wait_briefly(f"said/{self._heard}", wait_s)
            while self._store.check([f"said/{self._heard}"]):
                found.append(unpack(self._store.get(f"said/{self._heard}")))
                self.forget(f"said/{self._heard}")
                self._heard += 1
        except RuntimeError as error:
            raise self.blame(error) from None
        return found

    def _wait_briefly(self, key: str, wait_s: float) -> None:
        try:
            self._store.wait([key], timedelta(seconds=wait_s))
        except RuntimeError as error:
            if not _timed_out(error):
                raise
            raise _Waited from None

    def end(self, code: int, text: str) -> None:
        """Tell the others that the run has ended with `code`, and wait a little for them to go."""
        self._closing.set()
        with contextlib.suppress(RuntimeError, OSError):
            self._end(code, text)

    def _end(self, code: int, text: str) -> None:
        self._store.set("end", pack({"code": code, "text": text}))
        start = time.monotonic()
        left = [rank for rank in range(1, self.size) if rank not in self._dead]
        while left:
            left = [rank for rank in left if not self._store.check([f"gone/{rank}"])]
            waited = time.monotonic() - start
            if waited > SURFACE_S:
                left = [rank for rank in left if waited < ABSENT_S and not self._store.check([f"here/{rank}"])]
            if all(child.poll() is not None for child in self.children) and self.children:
                return
            time.sleep(0.02)

    # --- the others -----------------------------------------------------------------------------------------------------

    def next_command(self) -> tuple[dict[str, Any], Any]:
        """(command, this rank's part of it) in the order in which rank 0 gave them. Raises Ended."""
        number, self._commands = self._commands, self._commands + 1
        command = unpack(self.wait(f"do/{number}"))
        part = None
        if command["parts"]:
            part = unpack(self.wait(f"part/{number}/{self.rank}"))
            self.forget(f"part/{number}/{self.rank}")
        return command, part

    def say(self, what: str, **values: Any) -> None:
        """Tell rank 0 something; it hears it in the order of all that is said."""
        try:
            number = self._store.add("said", 1) - 1
            self._store.set(f"said/{number}", pack({"say": what, "rank": self.rank, **values}))
        except RuntimeError as error:
            raise self.blame(error) from None

    def fail(self, problem: dict[str, Any]) -> None:
        """Tell rank 0 that this rank cannot go on; its watching thread raises it there."""
        self._set("failed", pack({**problem, "rank": self.rank, "name": self.name}))

    def count(self, key: str, amount: int = 1) -> int:
        """Add to a counter that all ranks share and return what it is then."""
        try:
            return int(self._store.add(key, amount))
        except RuntimeError as error:
            raise self.blame(error) from None

    def put(self, key: str, value: Any) -> None:
        """Set a key for another rank's `take`."""
        self._set(key, pack(value))

    def take(self, key: str) -> Any:
        """Wait for a key and remove it."""
        value = unpack(self.wait(key))
        self.forget(key)
        return value

    def leave(self) -> None:
        """Say that this rank goes."""
        self._closing.set()
        with contextlib.suppress(RuntimeError, OSError):
            self._store.set(f"gone/{self.rank}", b"")

    def ask_to_stop(self, number: int, frame: Any = None) -> None:
        """Signal handler of the other ranks: rank 0 is to save and stop."""
        self._asked_to_stop = f"{signal.Signals(number).name} on {self.name}"

    # --- the watching thread --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        beats: dict[int, tuple[bytes, float]] = {}
        number = 0
        failed_at: float | None = None
        while not self._closing.wait(min(self.patience.beat_s, 1.0) if failed_at is None else 0.2):
            if failed_at is not None:
                if self._surfaced.is_set():
                    failed_at = time.monotonic()
                    continue
                if time.monotonic() - failed_at > SURFACE_S:
                    self._end_from_beside()
                continue
            try:
                number += 1
                self._look(beats, number)
                self._looked = time.monotonic()
            except RuntimeError as error:
                if self._closing.is_set():
                    return
                self._failure = self._failure or RankError(
                    f"{self.name} lost the store of rank 0 ({self.placement.address}:{self.placement.port}): "
                    f"{first_line(error)}",
                    hint="rank 0 has died or the network is cut; run the same command again",
                )
            except (IsftError, Ended) as error:
                self._failure = self._failure or error
            if self._failure is not None:
                failed_at = time.monotonic()

    def _guard(self) -> None:
        """End this rank when the watching thread hangs: over a cut network the store neither answers nor fails."""
        longest = self.patience.dead_after_s + 2 * self.patience.beat_s
        while not self._closing.wait(1.0):
            if self._failure is None and time.monotonic() - self._looked > longest:
                self._failure = RankError(
                    f"{self.name} has had no answer from rank 0's store ({self.placement.address}) for {longest:g} s",
                    hint="rank 0 has died or the network is cut; run the same command again",
                )
                if not self._surfaced.wait(SURFACE_S) and not self._closing.is_set():
                    self._end_from_beside()

    def _end_from_beside(self) -> None:
        """End the process of a main thread that cannot raise what was found."""
        if isinstance(self._failure, Ended):
            # all is well: the network was cut after this had been heard
            os._exit(self._failure.code)
        self.on_stuck(self._failure or RankError("a rank has gone"))
        os._exit(4)

    def _look(self, beats: dict[int, tuple[bytes, float]], number: int) -> None:
        store, now = self._watch_store, time.monotonic()
        self._look_at_children()
        store.set(f"beat/{self.rank}", str(number).encode())
        if self._asked_to_stop is not None:
            store.set("stop", self._asked_to_stop)
        if store.check(["end"]) and self.rank != 0:
            raise Ended(int(unpack(store.get("end"))["code"]))
        if self.rank == 0 and store.check(["failed"]):
            raise failure_of(unpack(store.get("failed")))
        if self._stop is None and store.check(["stop"]):
            self._stop = store.get("stop").decode()
        for rank in range(1, self.size) if self.rank == 0 else (0,):
            if rank not in self.names:
                if not store.check([f"here/{rank}"]):
                    continue
                self.names[rank] = store.get(f"name/{rank}").decode()
            before, since = beats.get(rank, (b"", now))
            beat = bytes(store.get(f"beat/{rank}"))
            if beat != before:
                beats[rank] = (beat, time.monotonic())
            elif now - since > self.patience.dead_after_s:
                self._dead.add(rank)
                raise RankError(
                    f"{self.names[rank]} has not been heard of for {self.patience.dead_after_s:g} s",
                    hint="its process or host has died or the network is cut; run the same command again to go on",
                )

    def _look_at_children(self) -> None:
        for rank, child in enumerate(self.children, start=1):
            code = child.poll()
            if code is not None and not self._closing.is_set():
                self._dead.add(rank)
                # what it said last is worth more than its code
                time.sleep(0.2)
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                raise RankError(
                    f"{self.names.get(rank, f'rank {rank}')} {how}",
                    hint="its last words are above; run the same command again to go on",
                )


class _Waited(Exception):
    """Nothing came in time."""


def _timed_out(error: RuntimeError) -> bool:
    return "timeout" in str(error).lower() or "timed out" in str(error).lower()


def _agent_serves() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _ranks(numbers: Sequence[int]) -> str:
    return ("ranks " if len(numbers) > 1 else "rank ") + ", ".join(str(number) for number in numbers)
