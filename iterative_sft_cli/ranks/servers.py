"""vLLM servers on the other hosts of a run: one rank of each host starts and tends them, rank 0 says what they are to do.

Guarantee: what takes long is done between commands and answers over the store, where every rank goes on beating; a host's servers
end with the rank that started them.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from iterative_sft_cli import system
from iterative_sft_cli.generate.vllm_host import Abandoned, HostServers, visible_gpus
from iterative_sft_cli.generate.vllm_server import address_towards
from iterative_sft_cli.generate.vllm_weights import Announced
from iterative_sft_cli.ranks.link import Link

WAIT_S, PUMP_S = 0.2, 0.1


def host_key() -> str:
    """What the ranks of one host have in common: the kernel that runs, and the network in which 127.0.0.1 is the same."""
    try:
        return f"{system.boot_id()} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return socket.gethostname()


# --- the others ----------------------------------------------------------------------------------------------------------


def tell_host(link: Link, servers: HostServers | None) -> None:
    """Say where this rank is and which GPUs it sees, for `add_hosts`; without servers of ours nobody asks."""
    if servers is not None:
        link.put(f"host/{link.rank}", [host_key(), visible_gpus() if servers.on_gpu else []])


def do_errand(link: Link, servers: HostServers, what: str, values: dict[str, Any]) -> Any:
    """Do what an `OtherHost` asks; the answer is what it waits for."""

    def over() -> bool:
        link.check()
        return False

    if what == "open":
        place = link.placement
        servers.open(values["gpus"], address_towards(place.address, place.port))
    elif what == "begin":
        servers.begin(Announced.from_json(values["weights"]))
        servers.ready(link.check)
    elif what == "restart":
        servers.restart(values["server"], over, force=values["force"], allowed=values["allowed"])
    else:
        servers.ended(link.check)
    return servers.addresses


# --- rank 0 --------------------------------------------------------------------------------------------------------------


def add_hosts(link: Link, engine: Any) -> None:
    """Give an engine over servers of ours those of the other hosts: on each, the first of its ranks starts them."""
    here: HostServers = engine.servers.hosts[0]
    seen: dict[str, tuple[int, list[str]]] = {host_key(): (0, visible_gpus() if here.on_gpu else [])}
    for rank in range(1, link.size):
        key, gpus = link.take(f"host/{rank}")
        named = seen.setdefault(key, (rank, []))[1]
        named += [gpu for gpu in gpus if gpu not in named]
    errands = Errands(link)
    if link.placement.launcher == "isft":
        # --gpus N: every rank sees them all, and N are ours
        seen = {key: (rank, gpus[: link.size]) for key, (rank, gpus) in seen.items()}
    for rank, gpus in seen.values():
        if rank == 0:
            here.open(gpus)
        else:
            engine.servers.hosts.append(OtherHost(errands, rank, gpus))


@dataclass(frozen=True, slots=True)
class Posted:
    """An errand of another thread: `then` is called with the answer, and nothing is sent once `given_up` is true."""

    rank: int
    what: str
    values: dict[str, Any]
    then: Callable[[Any], None]
    given_up: Callable[[], bool]


class Errands:
    """Commands to single ranks and their answers. Made and pumped by the thread that the link belongs to; others `post`."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._number = 0
        self._answers: dict[int, Any] = {}
        self._posted: queue.SimpleQueue[Posted] = queue.SimpleQueue()
        self._waiting: dict[int, Posted] = {}
        self._pumped = 0.0
        self.owner = threading.get_ident()

    def send(self, rank: int, what: str, **values: Any) -> int:
        """Have a rank do something; the number is what `wait` takes."""
        self._number += 1
        self._link.command("servers", rank=rank, what=what, number=self._number, values=values)
        return self._number

    def post(self, errand: Posted) -> None:
        """The same from another thread."""
        self._posted.put(errand)

    def pump(self, wait_s: float = 0.0) -> None:
        """Send what was posted, and hand on what has been answered; without a wait, at most every PUMP_S seconds."""
        now = time.monotonic()
        if not wait_s and now - self._pumped < PUMP_S:
            return
        self._pumped = now
        while not self._posted.empty():
            one = self._posted.get()
            if not one.given_up():
                self._waiting[self.send(one.rank, one.what, **one.values)] = one
        for said in self._link.hear(wait_s):
            if said["say"] != "servers":
                continue
            posted = self._waiting.pop(said["number"], None)
            if posted is None:
                self._answers[said["number"]] = said["answer"]
            else:
                posted.then(said["answer"])

    def wait(self, number: int, tick: Callable[[], None]) -> Any:
        """The answer to an errand. Raises what that rank failed of."""
        while number not in self._answers:
            tick()
            self.pump(WAIT_S)
        return self._answers.pop(number)


class OtherHost:
    """A `Host` whose servers `rank` tends."""

    def __init__(self, errands: Errands, rank: int, gpus: Sequence[str]) -> None:
        self._errands, self._rank, self._gpus = errands, rank, list(gpus)
        self._sent = 0
        self.addresses: list[str] = []

    def _ask(self, what: str, **values: Any) -> None:
        self._sent = self._errands.send(self._rank, what, **values)

    def _hear(self, tick: Callable[[], None]) -> None:
        self.addresses = self._errands.wait(self._sent, tick)

    def open(self) -> None:
        """See `HostServers.open`; an address is there once a server was started."""
        self._ask("open", gpus=self._gpus)
        self._hear(_nothing)

    def begin(self, weights: Announced) -> None:
        """Announce weights to the host."""
        self._ask("begin", weights=weights.to_json())

    def ready(self, tick: Callable[[], None]) -> None:
        """Return when its servers serve them."""
        self._hear(tick)

    def restart(
        self, number: int, given_up: Callable[[], bool] = lambda: False, *, force: bool = False, allowed: bool = True
    ) -> None:
        """See `HostServers.restart`; any thread may call it."""
        values = {"server": number, "force": force, "allowed": allowed}
        if threading.get_ident() == self._errands.owner:
            self._ask("restart", **values)
            self._hear(_nothing)
            return
        answered = threading.Event()

        def then(addresses: list[str]) -> None:
            self.addresses = addresses
            answered.set()

        self._errands.post(Posted(self._rank, "restart", values, then, given_up))
        while not answered.wait(WAIT_S):
            if given_up():
                raise Abandoned

    def pump(self) -> None:
        """Send and hear."""
        self._errands.pump()

    def end(self) -> None:
        """Have its servers leave their devices."""
        self._ask("end")

    def ended(self, tick: Callable[[], None]) -> None:
        """Return when they have."""
        self._hear(tick)

    def close(self) -> None:
        """Nothing to do: its rank ends them when the run ends."""


def _nothing() -> None:
    """No one to tell."""
