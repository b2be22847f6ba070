"""Real processes, really killed: at every operation, at every system call, at random instants; any command line."""

from __future__ import annotations

import collections
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import toy_loop
from crash_base import Tally, empty

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1]
DRIVER = [sys.executable, str(HERE / "crash_driver.py")]
MUTATING = "write,writev,pwrite64,fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,rmdir,truncate,ftruncate,chmod,fchmod,fchmodat,openat,close"

Contents = Callable[[Path], dict[str, str]]

CLOCKED = {"LOCK", "telemetry.jsonl", "quarantine", "isft-run.json", "environment.json", "outcome.json"}


def real_contents(run: Path) -> dict[str, str]:
    """Checksums of what two runs of one config must share: weights, optimizer, state, manifests, logs, shards."""
    found = {}
    for file in sorted(run.rglob("*")):
        parts = file.relative_to(run).parts
        if file.is_file() and parts[0] not in CLOCKED and parts[-1] != "run.json":
            found["/".join(parts)] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def spawn(words: Sequence[str], *, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    paths = [str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), PYTHONDONTWRITEBYTECODE="1")
    return subprocess.run(list(words), capture_output=True, text=True, env=env, timeout=timeout_s, check=False)


def golden(command: Sequence[str], run: Path, scratch: Path, contents: Contents) -> tuple[int, float, dict[str, str]]:
    """(operations, seconds, contents) of the uninterrupted run of `command`, which works in `run`."""
    begun = time.monotonic()
    done = spawn([*DRIVER, f"count:{scratch / 'count'}", *command])
    seconds = time.monotonic() - begun
    if done.returncode != 0:
        raise AssertionError(f"the uninterrupted run failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return int((scratch / "count").read_text()), seconds, contents(run)


def kill_operations(
    command: Sequence[str],
    run: Path,
    scratch: Path,
    *,
    points: int | None,
    kills: int = 1,
    contents: Contents = real_contents,
    seed: int = 0,
) -> Tally:
    """SIGKILL the process of `command` before operations of its file layer (all, or `points` of them), `kills` times in a row, then let it end."""
    rng = random.Random(seed)
    total, _, gold = golden(command, run, scratch, contents)
    chosen = range(total) if points is None else sorted(rng.sample(range(total), min(points, total)))
    tally = Tally()
    for at in chosen:
        shutil.rmtree(run)
        for at_kill in [at, *(rng.randrange(total) for _ in range(kills - 1))]:
            code = spawn([*DRIVER, f"kill:{at_kill}", *command]).returncode
            tally.count("killed" if code == -signal.SIGKILL else "ran to the end")
        _last_run(command, run, gold, contents, tally, f"kill at operation {at}")
    return tally


def kill_instants(
    command: Sequence[str],
    run: Path,
    scratch: Path,
    *,
    runs: int,
    kills: int = 1,
    signals: Sequence[int] = (signal.SIGKILL,),
    contents: Contents = real_contents,
    seed: int = 0,
) -> Tally:
    """Send a signal at instants spread evenly over the run's time, `kills` times in a row, then let the run end.

    A run that ended before one of its signals is counted as a miss and made again.
    """
    rng = random.Random(seed)
    _, seconds, gold = golden(command, run, scratch, contents)
    tally = Tally()
    number = 0
    while number < runs and tally.counts.get("misses", 0) < 5 * runs * kills:
        shutil.rmtree(run)
        for _ in range(kills):
            number_sent = rng.choice(list(signals))
            process = subprocess.Popen(
                [*DRIVER, "none", *command],
                env=dict(os.environ, PYTHONPATH=str(PACKAGE)),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            try:
                process.wait(rng.random() * seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(number_sent)
            _, told = process.communicate(timeout=600)
            tally.count(f"exit {process.returncode}" if process.returncode else "misses")
            allowed = {0, -number_sent, 75 if number_sent != signal.SIGINT else 130}
            if process.returncode not in allowed:
                tally.fail(
                    f"run {number}: {signal.Signals(number_sent).name} gave exit {process.returncode}: {told[-300:]}"
                )
            if process.returncode == 0:
                break
        else:
            _last_run(command, run, gold, contents, tally, f"run {number}")
            number += 1
    return tally


def _last_run(
    command: Sequence[str], run: Path, gold: dict[str, str], contents: Contents, tally: Tally, what: str
) -> None:
    tally.trials += 1
    done = spawn([*DRIVER, "none", *command])
    if done.returncode != 0:
        tally.fail(f"{what}: the next start exited {done.returncode}: {done.stderr[-300:]}")
        return
    got = contents(run)
    if got != gold:
        tally.fail(f"{what}: other bytes in {sorted(n for n in got | gold if got.get(n) != gold.get(n))[:4]}")


def strace_works() -> bool:
    if shutil.which("strace") is None:
        return False
    return spawn(["strace", "-f", "-qq", "-o", os.devnull, "true"]).returncode == 0


def kill_system_calls(root: Path, *, points: int | None, seed: int = 0) -> Tally:
    """The toy run under strace: SIGKILL at every (or `points` of the) system calls that can change the disk, below Python and its buffers."""
    run = empty(root) / "run"
    command = [sys.executable, "-B", str(HERE / "toy_loop.py"), str(run)]
    trace = root / "trace"
    spawn(["strace", "-f", "-qq", "-o", str(trace), "-e", f"trace={MUTATING}", *command])
    gold = toy_loop.contents(run)
    # the n-th call of a kind is where strace strikes; the first is the one that touches the run
    seen: collections.Counter[str] = collections.Counter()
    targets = []
    begun = False
    for line in trace.read_text(errors="replace").splitlines():
        found = re.match(r"\d+\s+(\w+)\(", line)
        if found is None:
            continue
        seen[found.group(1)] += 1
        begun = begun or str(run) in line
        if begun and found.group(1) != "close":
            targets.append((found.group(1), seen[found.group(1)]))
    rng = random.Random(seed)
    chosen = targets if points is None else rng.sample(targets, min(points, len(targets)))
    tally = Tally()
    for call, when in chosen:
        shutil.rmtree(run, ignore_errors=True)
        inject = f"inject={call}:signal=KILL:when={when}"
        spawn(["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={call}", "-e", inject, *command])
        tally.trials += 1
        done = spawn(command)
        if done.returncode != 0 or toy_loop.contents(run) != gold:
            tally.fail(f"killed at {call} number {when}: exit {done.returncode} {done.stderr[-300:]}")
    return tally


def quiet_when_finished(root: Path) -> Tally:
    """A finished run started again: not one system call that changes the disk, seen from the kernel."""
    run = empty(root) / "run"
    command = [sys.executable, "-B", str(HERE / "toy_loop.py"), str(run)]
    spawn(command)
    trace = root / "trace"
    spawn(["strace", "-f", "-qq", "-y", "-o", str(trace), "-e", f"trace={MUTATING}", *command])
    tally = Tally(trials=1)
    for line in trace.read_text(errors="replace").splitlines():
        changes = not re.search(r"\b(close|openat)\(", line) or re.search(r"O_(WRONLY|RDWR|CREAT|TRUNC)", line)
        if str(run) in line and changes:
            tally.fail(line)
    return tally
