"""The vLLM servers that isft started, on every host of the run, as one set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.generate.vllm_host import Abandoned
from iterative_sft_cli.generate.vllm_server import SERVED_NAME
from iterative_sft_cli.generate.vllm_weights import Announced, adapter_rank

MAX_RESTARTS = 3
"""How often a server of ours is started again within one shard."""


class Host(Protocol):
    """The servers of one host, this one or another; see `HostServers`. `begin` and `end` only say what is to happen, so that hosts
    do it at the same time; `ready` and `ended` return when it has. `pump` is called often by the thread that generates."""

    @property
    def addresses(self) -> list[str]: ...

    def open(self) -> None: ...

    def begin(self, weights: Announced) -> None: ...

    def ready(self, tick: Callable[[], None]) -> None: ...

    def restart(
        self, number: int, given_up: Callable[[], bool] = ..., *, force: bool = False, allowed: bool = True
    ) -> None: ...

    def pump(self) -> None: ...

    def end(self) -> None: ...

    def ended(self, tick: Callable[[], None]) -> None: ...

    def close(self) -> None: ...


class OurServers:
    """The servers of `hosts`, this one first. They share a device with the trainer: it leaves before `begin`, they before `end`
    returns."""

    apart = True

    def __init__(self, here: Host) -> None:
        self.hosts: list[Host] = [here]
        self.model_name = SERVED_NAME
        self._restarts: Counter[str] = Counter()

    @property
    def names(self) -> list[str]:
        """Every server: what `address_of` and `recover` take. A name stays when the address changes."""
        return [f"{place}/{number}" for place, host in enumerate(self.hosts) for number in range(len(host.addresses))]

    def _find(self, name: str) -> tuple[Host, int]:
        place, _, number = name.partition("/")
        return self.hosts[int(place)], int(number)

    def address_of(self, name: str) -> str:
        """Where a server is now."""
        host, number = self._find(name)
        return host.addresses[number]

    def open(self) -> None:
        """Raises ConfigError where a host's GPUs cannot be shared out."""
        for host in self.hosts:
            host.open()

    def pump(self) -> None:
        """Send and hear what there is from and for other hosts."""
        for host in self.hosts:
            host.pump()

    def begin(self, weights: Announced, tick: Callable[[], None]) -> None:
        """Have every server serve `weights`. Raises DataError."""
        for host in self.hosts:
            host.begin(weights)
        for host in self.hosts:
            host.ready(tick)
        adapter = adapter_rank(weights.folder) is not None
        self.model_name = f"{SERVED_NAME}-{weights.name}" if adapter else SERVED_NAME

    def leave_out(self, name: str, error: Any) -> bool:
        """Ours are started again, never left out."""
        return False

    def mend(self, name: str, problem: DataError, tick: Callable[[], None]) -> None:
        """Start a server that serves other weights again, on the right ones."""
        host, number = self._find(name)
        host.restart(number, force=True)

    def new_shard(self) -> None:
        """Count restarts from nought."""
        self._restarts.clear()

    def recover(self, name: str, given_up: Callable[[], bool]) -> bool:
        """Start a server again when it is gone; the others go on. Raises DataError when that does not help any more."""
        host, number = self._find(name)
        before = host.addresses[number]
        try:
            host.restart(number, given_up, allowed=self._restarts[name] < MAX_RESTARTS)
        except Abandoned:
            return False
        self._restarts[name] += host.addresses[number] != before
        return True

    def end(self, tick: Callable[[], None]) -> None:
        """Give the devices to the trainer."""
        for host in self.hosts:
            host.end()
        for host in self.hosts:
            host.ended(tick)

    def close(self) -> None:
        """End all of them."""
        for host in self.hosts:
            host.close()
