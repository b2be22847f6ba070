"""Two "hosts": network namespaces joined by a cable that can be cut in one direction or both, each with a zygote of its own."""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from forking import Forks

ADDRESSES = ("10.231.7.1", "10.231.7.2")
DEVICES = ("isft-va", "isft-vb")
NOBODY = "02:00:00:00:00:99"
CUTS = ("unplugged", "to rank 0 lost", "from rank 0 lost")
"""Unplugged: no carrier on one side, no route on the other. Lost: packets in one direction go to a host that is not there."""
NAMED = ("unshare", "--uts", "sh", "-c", 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"')
"""The command before this one's next word and a command: runs it on a host of that name."""
GIVEN_UP_S = 150
"""A rank that has not ended after so long is killed; the test sees -9."""


def ip(*arguments: str) -> bool:
    """Whether `ip` could do it."""
    try:
        return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0
    except OSError:
        return False


class Hosts:
    """Rank 0 runs on the first host, rank 1 on the second. `close` removes them."""

    def __init__(self) -> None:
        """Raises OSError where namespaces cannot be made."""
        self.names = tuple(f"isft-{os.getpid()}-{letter}" for letter in "ab")
        self._ports = itertools.count(20_000 + os.getpid() % 10_000)
        self._forks: list[Forks] = []
        try:
            self._make()
        except OSError:
            self.close()
            raise

    def _make(self) -> None:
        (a, b), (va, vb) = self.names, DEVICES
        made = all(ip("netns", "add", name) for name in self.names)
        if not made or not ip("link", "add", va, "netns", a, "type", "veth", "peer", "name", vb, "netns", b):
            raise OSError("network namespaces cannot be made here (needs root and iproute2)")
        for name, device, address in zip(self.names, DEVICES, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            for one in (device, "lo"):
                if not ip("-n", name, "link", "set", one, "up"):
                    raise OSError(f"{one} of {name} does not come up")
        self._forks = [Forks("ip", "netns", "exec", name, *NAMED, name) for name in self.names]

    def close(self) -> None:
        """End the zygotes and remove the namespaces."""
        for one in self._forks:
            one.close()
        for name in self.names:
            ip("netns", "del", name)

    # --- ranks ----------------------------------------------------------------------------------------------------------

    def start(self, folder: Path, *argv: str, before: Path | None = None, **env: str) -> list[int]:
        """The pids of both ranks of one `isft` command; see `Forks.start`."""
        place = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(next(self._ports)), "LOCAL_RANK": "0"}
        return [
            forks.start(folder, 2, *argv, before=before, ranks=[rank], **{**place, **env})[0]
            for rank, forks in enumerate(self._forks)
        ]

    def wait(self, pids: Sequence[int]) -> list[tuple[int, float]]:
        """Of each rank its exit code and when it ended (`time.monotonic`)."""

        def one(forks: Forks, pid: int) -> tuple[int, float]:
            killer = threading.Timer(GIVEN_UP_S, os.kill, (pid, 9))
            killer.start()
            try:
                return forks.wait([pid])[0], time.monotonic()
            finally:
                killer.cancel()

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, self._forks, pids))

    def run(self, folder: Path, *argv: str, **options: Any) -> list[int]:
        """Start and wait: the exit codes."""
        return [code for code, _ in self.wait(self.start(folder, *argv, **options))]

    # --- the cable ------------------------------------------------------------------------------------------------------

    def cut(self, kind: str) -> None:
        """Cut the network in one of the ways of `CUTS`."""
        assert self._change(kind, "down", ("replace", "lladdr", NOBODY, "nud", "permanent")), kind

    def mend(self, kind: str) -> None:
        """Undo `cut`."""
        assert self._change(kind, "up", ("del",)), kind

    def _change(self, kind: str, state: str, neighbour: Sequence[str]) -> bool:
        if kind == "unplugged":
            return ip("-n", self.names[1], "link", "set", DEVICES[1], state)
        at = CUTS.index(kind) % 2  # who sends what is lost: host 1 towards rank 0, host 0 from it
        what, *more = neighbour
        return ip("-n", self.names[at], "neigh", what, ADDRESSES[1 - at], *more, "dev", DEVICES[at])
