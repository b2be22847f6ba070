"""What the crash suites share: hooks that count, kill and fail, the tally, and the question whether a run ended right."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import toy_loop

from iterative_sft_cli.rundir import fs, peek, verify


@dataclass
class Tally:
    """How many trials of a suite there were, and a line for each that broke the promise."""

    trials: int = 0
    wrong: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def fail(self, text: str) -> None:
        self.wrong.append(text)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


class Killed(BaseException):
    """Stands for SIGKILL inside one process: from then on the hook lets nothing more happen."""


@contextlib.contextmanager
def hooked(hook: fs.Hook | None) -> Iterator[None]:
    before, fs.hook = fs.hook, hook
    try:
        yield
    finally:
        fs.hook = before


class CountOps:
    """A hook that only counts the operations that change something."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def __call__(self, op: fs.Op) -> None:
        if op.kind != "ack":
            self.kinds.append(op.kind)


class KillAt:
    """Ends the process (raises `Killed`) before operation `at`, and at every later one."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, op: fs.Op) -> None:
        if op.kind == "ack":
            return
        self.left -= 1
        if self.left < 0:
            raise Killed


class KillAfter:
    """Ends the process after `label` was acknowledged and pruning is over: before the next operation outside of `checkpoints/`."""

    def __init__(self, label: str) -> None:
        self.label, self.armed = label, False

    def __call__(self, op: fs.Op) -> None:
        if op.kind == "ack":
            self.armed = self.armed or op.label == self.label
        elif self.armed and "checkpoints" not in op.path.parts:
            raise Killed


class FailAt:
    """Answers operation `at` with an error of the operating system."""

    def __init__(self, at: int, code: int) -> None:
        self.left, self.code = at, code
        self.met: fs.Op | None = None

    def __call__(self, op: fs.Op) -> None:
        if op.kind == "ack":
            return
        self.left -= 1
        if self.left == -1:
            self.met = op
            raise OSError(self.code, "injected")


def empty(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


@dataclass(frozen=True)
class Subject:
    """What is put to the test: `train(run)` begins, goes on or finds finished; `contents(run)` is what must not differ."""

    train: Callable[[Path], object] = toy_loop.train
    contents: Callable[[Path], dict[str, str]] = toy_loop.contents


TOY = Subject()


def finish(run: Path, gold: dict[str, str], subject: Subject = TOY) -> str | None:
    """Start once more, to the end; what is wrong then, None when nothing is."""
    try:
        subject.train(run)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        return f"the next start failed: {type(error).__name__}: {error}"
    found = subject.contents(run)
    if found != gold:
        return f"other bytes in {sorted(name for name in found | gold if found.get(name) != gold.get(name))[:4]}"
    view = peek(run)
    if view is None or not view.finished:
        return "it ended without being complete"
    bad = [finding for finding in verify(run) if finding.damage]
    return f"verify: {bad[:2]}" if bad else None
