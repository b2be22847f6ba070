"""A real disk of 8 MB that is really full."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import toy_loop
from crash_base import Tally, empty, finish

from iterative_sft_cli.errors import StorageError

DISK_BYTES = 8 << 20
PAGE = 4096


def fill_disk(mount_point: Path, *, trials: int) -> Tally | None:
    """Runs on a tmpfs of 8 MB with less and less room; each goes on once there is some. None when mounting is not allowed."""
    empty(mount_point)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(mount_point)]
    try:
        if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            return None
    except FileNotFoundError:
        return None
    try:
        tally = Tally()
        work = mount_point / "work"
        toy_loop.train(empty(work) / "run")
        gold = toy_loop.contents(work / "run")
        used = sum(-(-path.stat().st_size // PAGE) * PAGE for path in work.rglob("*") if path.is_file())
        for trial in range(trials):
            tally.trials += 1
            _one(empty(work), mount_point / "filler", used // PAGE * trial // trials * PAGE, gold, tally)
        return tally
    finally:
        subprocess.run(["umount", str(mount_point)], capture_output=True, check=False)


def _one(work: Path, filler: Path, room: int, gold: dict[str, str], tally: Tally) -> None:
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * PAGE)
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - room)
    try:
        toy_loop.train(work / "run")
        tally.count("had room")
    except StorageError as error:
        tally.count("refused")
        if str(work) not in error.render() or "No space left" not in error.render() or error.exit_code != 4:
            tally.fail(f"room {room}: {error.render()}")
    except Exception as error:  # noqa: BLE001 - anything else is the finding
        tally.fail(f"room {room}: {type(error).__name__}: {error}")
    filler.unlink()
    problem = finish(work / "run", gold)
    if problem is not None:
        tally.fail(f"room {room}: {problem}")
