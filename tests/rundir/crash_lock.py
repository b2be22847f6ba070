"""Two starts on one directory: one wins, the other is told by whom; a killed holder leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from pathlib import Path

import toy_loop
from crash_base import Tally, empty

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.rundir import RunDir


def lock_races(root: Path, *, races: int) -> Tally:
    """`races` of two starts at the same moment; the winner is then killed with -9 and the directory opened at once."""
    run = empty(root) / "run"
    toy_loop.train(run, 1)
    tally = Tally()
    for race in range(races):
        tally.trials += 1
        problem = _race(run)
        if problem is not None:
            tally.fail(f"race {race}: {problem}")
    return tally


def _race(run: Path) -> str | None:
    start_r, start_w = os.pipe()
    racers = [_racer(run, start_r, start_w) for _ in range(2)]
    os.close(start_r)
    os.close(start_w)  # both see the end of the pipe at the same moment: they are off
    told = {pid: os.read(pipe, 4096).decode() for pid, pipe in racers}
    winners = [pid for pid, text in told.items() if text == "won"]
    problem = None
    if len(winners) != 1:
        problem = f"{len(winners)} winners: {told}"
    else:
        lost = next(text for pid, text in told.items() if pid != winners[0])
        seconds, _, message = lost.partition(" ")
        if float(seconds) > 2 or f"pid {winners[0]} on {socket.gethostname()} since 2" not in message:
            problem = f"the loser was told after {seconds} s: {message}"
    for pid, pipe in racers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(pipe)
    begun = time.monotonic()
    RunDir.open(run).close()
    if time.monotonic() - begun > 1:
        problem = problem or "the lock was not free at once after the kill"
    return problem


def _racer(run: Path, start_r: int, start_w: int) -> tuple[int, int]:
    result_r, result_w = os.pipe()
    pid = os.fork()
    if pid:
        os.close(result_w)
        return pid, result_r
    try:
        os.close(start_w)
        os.read(start_r, 1)
        begun = time.monotonic()
        try:
            held = RunDir.open(run)
        except DataError as error:
            text = re.sub(r"\s+", " ", error.render())
            os.write(result_w, f"{time.monotonic() - begun:.2f} {text}".encode())
        else:
            os.write(result_w, b"won")
            time.sleep(60)
            held.close()
    except BaseException as error:  # noqa: BLE001 - a child of a test run never returns into it
        os.write(result_w, f"failed: {error!r}".encode())
    finally:
        os._exit(0)
