"""Kills and refused operations at every point of a run. Every suite returns a `Tally`; its `wrong` is empty when the promise held."""

from __future__ import annotations

import errno
import gc
import random
from pathlib import Path

from crash_base import TOY, CountOps, FailAt, KillAt, Killed, Subject, Tally, empty, finish, hooked

from iterative_sft_cli.errors import StorageError

ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES")


def count_ops(root: Path, subject: Subject) -> tuple[int, dict[str, str]]:
    counter = CountOps()
    with hooked(counter):
        subject.train(root / "run")
    return len(counter.kinds), subject.contents(root / "run")


def killed(run: Path, at: int, subject: Subject) -> bool:
    """Run until operation `at`; whether it was reached."""
    try:
        with hooked(KillAt(at)):
            subject.train(run)
    except Killed:
        gc.collect()
        return True
    return False


def kill_every_op(root: Path, *, every: int = 1, kills: int = 1, seed: int = 0, subject: Subject = TOY) -> Tally:
    """Kill at each operation that changes the disk (and again at random ones, in recovery too), then go on: the same bytes."""
    rng = random.Random(seed)
    total, gold = count_ops(empty(root), subject)
    tally = Tally()
    for at in range(seed % every, total, every):
        run = empty(root) / "run"
        killed(run, at, subject)
        for _ in range(kills - 1):
            killed(run, rng.randrange(total // 2), subject)
        problem = finish(run, gold, subject)
        tally.trials += 1
        if problem is not None:
            tally.fail(f"kill at {at}: {problem}")
    return tally


def fail_every_op(
    root: Path, *, every: int = 1, codes: tuple[str, ...] = ERRORS, seed: int = 0, subject: Subject = TOY
) -> Tally:
    """Each operation refused once with each error: exit 4 naming a path (and the bytes needed when the disk is full), then the same bytes."""
    total, gold = count_ops(empty(root), subject)
    tally = Tally()
    for index, (code, at) in enumerate((code, at) for code in codes for at in range(total)):
        if index % every != seed % every:
            continue
        tally.trials += 1
        run = empty(root) / "run"
        hook = FailAt(at, getattr(errno, code))
        told = ""
        try:
            with hooked(hook):
                subject.train(run)
        except StorageError as error:
            told = error.render()
        except Exception as error:  # noqa: BLE001 - anything else is the finding
            tally.fail(f"{code} at {at}: {type(error).__name__}: {error}")
            continue
        # (the lock's text is emptied at the very end: that it could not be is nobody's concern)
        if hook.met is None or hook.met.path.name != "LOCK" or told:
            full = code in ("ENOSPC", "EDQUOT") and hook.met is not None and hook.met.kind == "write"
            if str(root) not in told or (full and "bytes needed" not in told):
                tally.fail(f"{code} at {at} ({hook.met}): it said {told!r}")
        problem = finish(run, gold, subject)
        if problem is not None:
            tally.fail(f"{code} at {at} ({hook.met.kind} {hook.met.path.name}): {problem}")
    return tally
