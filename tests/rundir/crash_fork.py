"""Any subject in forked children that are really killed: a start costs a fork instead of an interpreter and its imports.

The parent must not compute with torch, or its threads would be missing in the children.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from crash_base import Subject, Tally, empty
from crash_driver import KillNow

from iterative_sft_cli.rundir import fs

Prepare = Callable[[], object]

EARLIEST_S = 0.01
"""A child takes this long to become the command that is put to the test."""


def in_child(
    work: Callable[[], object],
    signals: list[tuple[float, int]] | None = None,
    *,
    prepare: Prepare | None = None,
) -> tuple[int, float, str]:
    """(exit code, seconds, what it said) of `work` in a forked child after `prepare`; `signals` are (seconds to wait, signal) to send it."""
    reader, writer = os.pipe()
    begun = time.monotonic()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(reader)
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            # pytest has put others in their place
            sys.stdout, sys.stderr = (open(fd, "w", buffering=1, encoding="utf-8", closefd=False) for fd in (1, 2))
            if prepare is not None:
                prepare()
            code = _call(work)
        finally:
            os._exit(code)
    os.close(writer)
    for delay_s, number in signals or ():
        time.sleep(delay_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
    told = b""
    while piece := os.read(reader, 1 << 16):
        told = (told + piece)[-4000:]
    os.close(reader)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - begun, told.decode(errors="replace")


def _call(work: Callable[[], object]) -> int:
    from iterative_sft_cli.errors import IsftError

    try:
        work()
    except IsftError as error:
        print(error.render(), flush=True)
        return error.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def kill_before(at: int) -> Prepare:
    """SIGKILL to the child before operation `at` of the file layer."""

    def prepare() -> None:
        fs.hook = KillNow(at)

    return prepare


def reference(subject: Subject, root: Path) -> tuple[float, dict[str, str]]:
    """(seconds, contents) of the uninterrupted run, which is left in `root`; done twice, for the first one is slow."""
    found: list[tuple[float, dict[str, str]]] = []
    for _ in range(2):
        run = empty(root) / "run"
        code, seconds, told = in_child(lambda run=run: subject.train(run))  # type: ignore[misc]
        if code != 0:
            raise AssertionError(f"the uninterrupted run ended with {code}:\n{told}")
        found.append((seconds, subject.contents(run)))
    if found[0][1] != found[1][1]:
        raise AssertionError("two uninterrupted runs differ")
    return found[1]


def go_on(subject: Subject, run: Path, gold: dict[str, str], tally: Tally, what: str) -> None:
    """Start once more, to the end, and compare."""
    tally.trials += 1
    code, _, told = in_child(lambda: subject.train(run))
    got = subject.contents(run)
    if code != 0:
        tally.fail(f"{what}: the next start ended with {code}: {told[-400:]}")
    elif got != gold:
        tally.fail(f"{what}: other bytes in {sorted(n for n in got | gold if got.get(n) != gold.get(n))[:4]}")


def kill_points(
    subject: Subject, root: Path, *, total: int, every: int, strike: Callable[[int], Prepare], seed: int = 0
) -> Tally:
    """SIGKILL at each of `total` points (or one in `every`), which `strike` knows how to reach, then a start that ends it."""
    _, gold = reference(subject, root)
    run = root / "run"
    tally = Tally()
    for at in range(seed % every, total, every):
        shutil.rmtree(run, ignore_errors=True)
        code, _, told = in_child(lambda: subject.train(run), prepare=strike(at))
        tally.count("killed" if code == -signal.SIGKILL else f"exit {code}")
        if code not in (0, -signal.SIGKILL):
            tally.fail(f"point {at}: {told[-400:]}")
        go_on(subject, run, gold, tally, f"point {at}")
    return tally


def kill_children(
    subject: Subject,
    root: Path,
    *,
    runs: int,
    kills: int = 1,
    signals: tuple[int, ...] = (signal.SIGKILL,),
    again_s: float | None = None,
    seed: int = 0,
) -> Tally:
    """Signals at random instants, `kills` starts in a row, then a start that ends it.

    A run that ended before one of its signals is counted as a miss and made again. From the second start on half of the signals come early,
    while it recovers. With `again_s` each start gets a second signal within so many seconds after the first. A stop that was asked for must
    be obeyed, and say the command that goes on.
    """
    rng = random.Random(seed)
    seconds, gold = reference(subject, root)
    run = root / "run"
    tally = Tally()
    number = 0
    while number < runs and tally.counts.get("misses", 0) < 5 * runs * kills:
        shutil.rmtree(run, ignore_errors=True)
        for kill in range(kills):
            sent = rng.choice(signals)
            early = kill and rng.random() < 0.5
            plan = [(EARLIEST_S + rng.random() * seconds * (0.25 if early else 1.0), sent)]
            if again_s is not None:
                plan.append((rng.random() * again_s, sent))
            code, _, told = in_child(lambda: subject.train(run), plan)
            tally.count(f"exit {code}" if code else "misses")
            asked = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}.get(signal.Signals(sent), 75)
            if code not in (0, asked):
                tally.fail(f"run {number}: {signal.Signals(sent).name} ended it with {code}: {told[-400:]}")
            elif code > 0 and again_s is None and "go on with: isft train" not in told:
                tally.fail(f"run {number}: {signal.Signals(sent).name}: it does not say how to go on: {told[-400:]}")
            if code == 0:
                break
        else:
            go_on(subject, run, gold, tally, f"run {number}")
            number += 1
    return tally
