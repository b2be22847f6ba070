"""Rank 0's side of a run on several processes: starts or awaits the others, hands the loop a learner and an engine over all of them.

Guarantee: however rank 0's run ends, the others are told and end too.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from iterative_sft_cli.errors import EXIT_BUG, EXIT_OK, ConfigError, DataError, IsftError
from iterative_sft_cli.filters import ResolvedFilter
from iterative_sft_cli.ranks.collectives import close_collectives, open_collectives
from iterative_sft_cli.ranks.engine import RankedEngine
from iterative_sft_cli.ranks.learner import RankedLearner
from iterative_sft_cli.ranks.link import Link
from iterative_sft_cli.ranks.placement import Placement, find_placement
from iterative_sft_cli.ranks.servers import add_hosts

LEAVE_S = 10.0
"""How long a process that we started may take to end before it is killed."""


def choose_placement(gpus: str | None) -> Placement | None:
    """Where this process stands: as its launcher says, or rank 0 of `--gpus N` that start here; None alone.

    Raises ConfigError for a number of GPUs that is not there.
    """
    found = find_placement()
    if gpus is None:
        return found
    if found is not None:
        raise ConfigError(
            f"--gpus {gpus}, but {found.launcher} started {found.size} processes already",
            hint=f"leave --gpus out: under {found.launcher} its own options say how many processes there are",
        )
    if gpus != "all" and (not gpus.isdecimal() or int(gpus) < 1):
        raise ConfigError(f"--gpus {gpus}", expected="a number of GPUs, or all")
    if gpus == "1":
        return None
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = there if gpus == "all" else int(gpus)
    if there and wanted > there:
        raise ConfigError(f"--gpus {gpus}: there are {there} here", expected=f"1 to {there}, or all")
    if wanted < 2:
        return None
    return Placement(rank=0, size=wanted, local_rank=0, address="127.0.0.1", port=0, launcher="isft")


class Ranks:
    """All ranks of a run, in the hands of rank 0. Use as a context manager; the end of the block ends the others."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.size = placement.size
        self.link: Link | None = None
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Ranks:
        if self.placement.launcher != "isft":
            # before anything else: the others see at once that rank 0 lives, or that nothing begins
            self.link = Link(self.placement)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code = EXIT_OK if error is None else error.exit_code if isinstance(error, IsftError) else EXIT_BUG
        if self.link is not None:
            self.link.end(code, "" if error is None else str(error))
        self._reap()
        close_collectives()

    def _reap(self) -> None:
        deadline = time.monotonic() + LEAVE_S
        for child in self._children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def start(self, loaded: Any, run: Any) -> None:
        """Have the other ranks come and load the model. Raises RankError when they do not."""
        place = self.placement
        if place.launcher == "isft":
            share_threads(place.size)
        if self.link is None:
            self.link = Link(place)
        if place.launcher == "isft":
            place = replace(place, port=self.link.port)
            self._children = [start_worker(replace(place, rank=rank, local_rank=rank)) for rank in range(1, place.size)]
            self.link.children = self._children
        os.environ.setdefault("LOCAL_RANK", str(place.local_rank))
        path = run.path

        def stuck(error: Exception) -> None:
            text = error.render() if isinstance(error, IsftError) else str(error)
            sys.stderr.write(f"isft: {text}\n")
            sys.stderr.flush()
            with contextlib.suppress(Exception):
                run.outcome(4, text, f"isft resume {path}")

        self.link.on_stuck = stuck
        self.link.join()
        self.link.command(
            "setup",
            merged=loaded.merged,
            base_dir=str(loaded.base_dir.resolve()),
            run_dir=str(path.resolve()),
            timeout_s=float(loaded.config.generate.timeout_s),
        )

    def lead(self, parts: Any, filters: Sequence[ResolvedFilter]) -> tuple[Any, Any]:
        """(learner, engine) over all ranks, once each has loaded the model. Raises DataError when one has another model or filter."""
        link = self.link
        assert link is not None
        for rank in range(1, self.size):
            base_hash, hashes = link.take(f"ready/{rank}")
            name = link.names.get(rank, f"rank {rank}")
            if base_hash != parts.base_hash:
                raise DataError(
                    f"{name} has another base model than rank 0",
                    where="model.path",
                    hint="give every host the same files, or pin model.revision",
                )
            for one in filters:
                if hashes.get(one.name) != one.source_hash:
                    raise DataError(
                        f"{name} has another source of the filter `{one.name}` than rank 0",
                        where=one.key,
                        hint="give every host the same files and the same versions",
                    )
        open_collectives(link, parts)
        engine = RankedEngine(parts.engine, link) if parts.spreads else parts.engine
        if getattr(engine, "shares_device", False):
            add_hosts(link, engine)
        return RankedLearner(parts.learner, link), engine

    def check(self) -> None:
        """Raises RankError when a rank has gone and Preempted when one was asked to stop."""
        if self.link is not None:
            self.link.check()


def share_threads(size: int) -> None:
    """Give this process and those it starts an equal part of the processors, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    import torch

    threads = max(1, (os.cpu_count() or 1) // size)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def start_worker(place: Placement) -> subprocess.Popen[bytes]:
    """Another rank on this host. It is in a session of its own: Ctrl-C reaches rank 0 alone, which ends the others."""
    environ = {
        **os.environ,
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.size),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
        "ISFT_LAUNCHER": "isft",
    }
    command = [sys.executable, "-m", "iterative_sft_cli", "train", "-"]
    return subprocess.Popen(
        command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
