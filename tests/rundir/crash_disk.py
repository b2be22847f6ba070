"""A real disk of 8 MB that is really full."""

from __future__ import annotations

import contextlib
import re
import subprocess
from pathlib import Path

import toy_loop
from crash_base import Tally, empty, finish

from iterative_sft_cli.errors import StorageError

DISK_BYTES = 8 << 20
PAGE = 4096
HIDDEN_SIZE = 224
"""A checkpoint of a tiny Llama of this width, with its optimizer, takes more than 8 MB."""

NAMED = {"config.yaml", "resolved.yaml"}
"""They say where the run is."""


def mounted(mount_point: Path) -> bool:
    """Mount the small disk; False when this user may not."""
    empty(mount_point)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(mount_point)]
    try:
        return subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def fill_disk(mount_point: Path, *, trials: int) -> Tally | None:
    """Runs on a tmpfs of 8 MB with less and less room; each goes on once there is some. None when mounting is not allowed."""
    if not mounted(mount_point):
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


def real_run(mount_point: Path, folder: Path) -> Tally | None:
    """`isft train` of a model whose checkpoints do not fit on 8 MB: exit 4 with path and bytes, again and again, until the disk is larger; then the
    same bytes as where there was room. None when mounting is not allowed."""
    from crash_fork import in_child
    from crash_tiny import tiny_subject

    if not mounted(mount_point):
        return None
    try:
        tally = Tally()
        gold = {}
        for run in (folder / "roomy", mount_point / "run"):
            subject = tiny_subject(folder / "model", run, hidden_size=HIDDEN_SIZE, try_run=run.parent == folder)
            code, _, told = in_child(lambda subject=subject, run=run: subject.train(run))
            if run.parent == folder:
                if code != 0:
                    raise AssertionError(f"the run with room ended with {code}:\n{told}")
                gold = subject.contents(run)
        for attempt in range(3):
            tally.trials += 1
            tally.count(f"exit {code}")
            if code != 4 or str(run) not in told or not re.search(r"\(\d+ more bytes needed, \d+ free\)", told):
                tally.fail(f"attempt {attempt}: exit {code}: {told[-600:]}")
            if "Traceback" in told or "No space left" not in told or "free some space" not in told:
                tally.fail(f"attempt {attempt}: {told[-600:]}")
            code, _, told = in_child(lambda: subject.train(run))
        subprocess.run(["mount", "-o", f"remount,size={8 * DISK_BYTES}", str(mount_point)], check=True)
        code, _, told = in_child(lambda: subject.train(run))
        tally.trials += 1
        tally.count(f"exit {code}")
        found = subject.contents(run)
        other = [name for name in found | gold if found.get(name) != gold.get(name) and name not in NAMED]
        if code != 0 or other:
            tally.fail(f"with room: exit {code}, other bytes in {other[:3]}: {told[-600:]}")
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
