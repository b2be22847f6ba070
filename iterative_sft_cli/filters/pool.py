"""Worker processes of one plug-in: tasks go to whichever worker is free, a failing worker is replaced, nothing hangs.

A task ends in outcomes or in a named error: filter, prompt, cause, and the last lines that the plug-in printed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from iterative_sft_cli import errors
from iterative_sft_cli.config.secrets import hide
from iterative_sft_cli.errors import IsftError, PluginError, StorageError
from iterative_sft_cli.filters import processes
from iterative_sft_cli.filters.contract import Outcome
from iterative_sft_cli.filters.link import Died, Link, Watchdog
from iterative_sft_cli.filters.resolved import Location, ResolvedFilter
from iterative_sft_cli.filters.wire import encode
from iterative_sft_cli.types import Verdict

DEPTH = 16
"""Samples sent ahead to a worker, so that it never waits for us; only the first of them is under its time limit."""

HUNG = "(timeout_s)"
"""Stands in the cause of a call that was ended because it took too long."""


@dataclass(slots=True)
class Task:
    """One call of the filter: its frame, what it is about, and where the outcomes go."""

    frame: bytes
    subject: str
    count: int
    future: Future[list[Outcome]]
    era: int = 0
    attempts: int = 0
    outcomes: list[Outcome] = field(default_factory=list)


class WorkerPool:
    """The workers of one filter with one set of arguments. Thread-safe; workers start when there is work."""

    def __init__(self, one: ResolvedFilter, watchdog: Watchdog) -> None:
        self.one = one
        self.watchdog = watchdog
        self.size = one.workers or (1 if one.device not in (None, "cpu") else processes.cores())
        self._tasks: deque[Task] = deque()
        self._changed = threading.Condition()
        self._workers: list[Worker] = []
        self._idle = 0
        self._closed = False
        self._era = 0
        self._broken: IsftError | None = None

    def submit(self, frame: bytes, subject: str, count: int) -> Future[list[Outcome]]:
        """Queue one call; `subject` names it in errors, `count` is the number of outcomes it gives."""
        task = Task(frame, subject, count, Future())
        with self._changed:
            if self._broken is not None or self._closed:
                task.future.set_exception(self._broken or self.error("was not asked", "the run is ending", ""))
                return task.future
            task.era = self._era
            self._tasks.append(task)
            if not self._idle and len(self._workers) < self.size:
                worker = Worker(self, len(self._workers))
                self._workers.append(worker)
                worker.thread.start()
            self._changed.notify()
        return task.future

    def take(self, *, block: bool, held: int = 0) -> Task | None:
        """The next task for a worker that holds `held` already; None when there is none for it, or the pool closes."""
        with self._changed:
            self._idle += 1
            try:
                while True:
                    while self._tasks:
                        if not block and held >= min(DEPTH, len(self._tasks) // self.size + 1):
                            return None
                        task = self._tasks.popleft()
                        if task.attempts or task.future.set_running_or_notify_cancel():
                            return task
                    if self._closed or not block:
                        return None
                    self._changed.wait()
            finally:
                self._idle -= 1

    def give_back(self, tasks: list[Task]) -> None:
        """Put tasks that were sent ahead to a lost worker at the front of the queue, unless they were given up since."""
        refused = []
        with self._changed:
            for task in reversed(tasks):
                task.attempts = task.attempts or -1
                task.outcomes.clear()
                if task.era < self._era:
                    refused.append(task)
                else:
                    self._tasks.appendleft(task)
            self._changed.notify_all()
        for task in refused:
            task.future.set_exception(self.error("was not asked", "another sample failed before", ""))

    def failed(self, task: Task, cause: str, tail: str, explained: IsftError | None = None) -> None:
        """Apply `on_error` to a call that failed; one that hung is tried once more unless its sample may be dropped."""
        current = task.era == self._era and not self._closed
        hung = HUNG in cause
        again = self.one.on_error == "retry" or (hung and self.one.on_error == "fail")
        if again and task.attempts <= 0 and current:
            task.attempts, task.outcomes = 1, []
            with self._changed:
                self._tasks.appendleft(task)
                self._changed.notify()
        elif self.one.on_error == "drop" and explained is None:
            reason = "timeout" if hung else "plugin_error"
            verdict = Verdict(False, None, reason, {"error": hide(cause, self.one.env)[:300]})
            task.future.set_result([Outcome(verdict)] * task.count)
        else:
            if hung and task.attempts > 0:
                cause += ", twice"
            task.future.set_exception(explained or self.error(f"failed on {task.subject}", cause, tail))

    def error(self, what: str, cause: str, tail: str) -> PluginError:
        """The named error of this filter."""
        text = f"the filter `{self.one.name}` {what}: {cause}"
        if tail:
            text += f"\nits last output:\n{tail}"
        hint = "`isft filters test` runs it over stored samples" if not self.one.builtin else None
        return PluginError(hide(text, self.one.env), where=f"{self.one.key}: {self.one.use}", hint=hint)

    def break_down(self, error: IsftError) -> None:
        """The filter cannot be started at all: every call fails with `error`."""
        self._broken = self._broken or error
        self._refuse_all(self._broken)

    def cancel(self) -> None:
        """Give up every call, also those under way; the pool can be used again."""
        with self._changed:
            self._era += 1
        self._refuse_all(self.error("was not asked", "another sample failed before", ""))
        for worker in self._workers:
            worker.interrupt("another sample failed before")

    def close(self) -> None:
        """End all workers; calls that are queued or under way fail."""
        with self._changed:
            self._closed = True
        self._refuse_all(self.error("was not asked", "the run is ending", ""))
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.thread.join(10)

    def _refuse_all(self, error: IsftError) -> None:
        with self._changed:
            tasks, self._tasks = list(self._tasks), deque()
            self._changed.notify_all()
        for task in tasks:
            if task.attempts or task.future.set_running_or_notify_cancel():
                task.future.set_exception(error)


class Worker:
    """The thread that feeds one worker process at a time."""

    def __init__(self, pool: WorkerPool, number: int) -> None:
        self.pool = pool
        self.thread = threading.Thread(target=self._run, name=f"isft-filter-{pool.one.name}-{number}", daemon=True)
        self._link: Link | None = None
        self._stopped = False

    def stop(self) -> None:
        """End the process because the pool closes."""
        self._stopped = True
        link = self._link
        if link is not None:
            link.kill("the run is ending")

    def interrupt(self, cause: str) -> None:
        """End the process if a call is under way."""
        link = self._link
        if link is not None and link.deadline is not None:
            link.kill(cause)

    def _run(self) -> None:
        try:
            while (task := self.pool.take(block=True)) is not None:
                self._serve(task)
        except IsftError as error:
            self.pool.break_down(error)
        except Exception as error:
            self.pool.break_down(IsftError(f"a worker of the filter `{self.pool.one.name}` broke: {error!r}"))
        finally:
            self._discard()

    def _serve(self, first: Task) -> None:
        """Work off `first` and what can be sent ahead behind it."""
        held: deque[Task] = deque([first])
        try:
            self._work_off(held)
        except IsftError:
            self.pool.give_back(list(held))
            raise
        except Exception as error:
            # a fault of ours: no call may be left without an answer
            for task in held:
                if not task.future.done():
                    task.future.set_exception(error)
            raise

    def _work_off(self, held: deque[Task]) -> None:
        """A task leaves `held` when its call is answered, or when it is handed back to the pool."""
        try:
            if self._link is not None and self._link.process.poll() is not None:
                # it ended between two calls, which is no sample's fault
                self._discard()
            link = self._link or self._start()
            link.watch(self.pool.one.timeout_s)
            link.write(held[0].frame)
            while held:
                while (more := self.pool.take(block=False, held=len(held))) is not None:
                    held.append(more)
                    link.write(more.frame)
                if not self._settle(link, held, link.receive()):
                    return
        except Died as death:
            tail = self._link.take_tail() if self._link is not None else ""
            self._discard()
            head = held.popleft()
            self.pool.give_back(list(held))
            held.clear()
            self.pool.failed(head, str(death), tail)

    def _settle(self, link: Link, held: deque[Task], reply: dict[str, Any]) -> bool:
        """Apply a reply to the first task held; False when the process must not be used again."""
        task = held[0]
        if "part" in reply:
            task.outcomes += map(outcome_from_row, reply["part"])
            return True
        held.popleft()
        if "outcomes" in reply:
            task.outcomes += map(outcome_from_row, reply["outcomes"])
            if len(task.outcomes) != task.count:
                held.appendleft(task)
                raise Died("it wrote into the connection to isft: the wrong number of verdicts")
            link.watch(self.pool.one.timeout_s if held else None)
            task.future.set_result(task.outcomes)
            return True
        link.watch(self.pool.one.timeout_s if held else None)
        if "explained" in reply:
            kind, what, hint = reply["explained"]
            where = f"{self.pool.one.key}: {self.pool.one.use}"
            found: IsftError = getattr(errors, kind, PluginError)(what, where=where, hint=hint)
            self.pool.failed(task, what, "", found)
            return True
        tail = link.take_tail()
        again = self.pool.one.on_error == "retry"
        if again:
            self.pool.give_back(list(held))
            held.clear()
            self._discard()
        self.pool.failed(task, reply["error"], tail)
        return not again

    def _start(self) -> Link:
        """A process with the filter loaded. Raises PluginError when that fails; a lost process is tried once more."""
        one = self.pool.one
        for attempt in (1, 2):
            if self._stopped:
                raise self.pool.error("did not start", "the run is ending", "")
            try:
                link = self._link = Link(
                    self.pool.watchdog,
                    env=one.env,
                    device=one.device,
                    memory_gb=one.memory_gb,
                    threads=1 if self.pool.size > 1 else None,
                )
            except OSError as error:
                raise StorageError(
                    f"no worker process can be started for the filter `{one.name}`: {error.strerror or error}",
                    where=f"{one.key}: {one.use}",
                    hint="check the limits on processes, memory and space in the temporary folder",
                ) from error
            link.watch(one.startup_timeout_s, "startup_timeout_s")
            link.write(encode(start_message(one.location, link.scratch, one.env) | {"arguments": one.arguments}))
            try:
                reply = link.receive()
            except Died as death:
                tail = link.take_tail()
                self._discard()
                if attempt == 2:
                    raise self.pool.error("did not start", str(death), tail) from None
                continue
            link.watch(None)
            if "ready" not in reply:
                raise self.pool.error("cannot be used", reply["message"], link.take_tail())
            return link
        raise AssertionError

    def _discard(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()


def start_message(location: Location, scratch: str, env: Sequence[str]) -> dict[str, Any]:
    """The first message to a worker: which filter to load, and the names whose values must not come back."""
    return {
        "scratch": scratch,
        "module": location.module,
        "path": location.path,
        "attribute": location.attribute,
        "describe": False,
        "env": list(env),
    }


def outcome_from_row(row: list[Any]) -> Outcome:
    """The inverse of the worker's `outcome_to_row`."""
    keep, score, reason, extra, bare_float = row
    return Outcome(Verdict(keep, score, reason, extra), bare_float)
