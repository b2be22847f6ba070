"""The vLLM servers of ours on one host: how many, on which GPUs, and what they do from phase to phase.

Guarantee: weights reach the host once and are checked before a server is told to load them; when `begin` returns every server is
healthy, and when `end` has returned those that are to leave the device have left it.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.generate.http_client import ServerError, tell
from iterative_sft_cli.generate.vllm_server import (
    LOOPBACK,
    MARK,
    SERVED_NAME,
    Server,
    free_port,
    mark_of,
    serve_command,
)
from iterative_sft_cli.generate.vllm_weights import Announced, Stage, adapter_rank

TICK_S = 0.2


Look = Callable[[], None]
"""Called while something is waited for; raises when nobody waits for that any more."""


class Abandoned(Exception):
    """Nobody waits for the answer any more."""


def looking_at(given_up: Callable[[], bool]) -> Look:
    """A look that raises Abandoned once `given_up` is true."""

    def look() -> None:
        if given_up():
            raise Abandoned

    return look


def _never() -> bool:
    return False


@dataclass(eq=False)
class Slot:
    """One of a host's servers: its GPUs, its process, and what that process knows. `lock` is held by whoever changes it."""

    number: int
    gpus: Sequence[str]
    server: Server | None = None
    asleep: bool = False
    adapter: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class HostServers:
    """Starts nothing before `begin`. `section` is a `GenerateConfig`, `loaded` the trainer's `LoadedModel`.

    `logs` is the folder for the servers' output; None makes one in the system's folder for temporary files. `run_dir` names the run
    in their environment.
    """

    def __init__(self, section: Any, *, loaded: Any, run_dir: Path | None, logs: Path | None) -> None:
        self.section, self.settings = section, section.vllm
        self.on_gpu = str(loaded.device).startswith("cuda")
        self.base = loaded.folder
        self.dtype = str(loaded.compute_dtype).removeprefix("torch.")
        self.address = LOOPBACK
        self.slots: list[Slot] = []
        self._logs = logs
        self._mark = mark_of(run_dir or Path(f"/{os.getpid()}"))
        self._stage = Stage(Path(self.settings.stage_to) if self.settings.stage_to else None)
        self._weights: Announced | None = None
        self._folder: Path | None = None

    def open(self, gpus: Sequence[str] | None = None, address: str = LOOPBACK) -> None:
        """Share out `gpus` (None: those that this process sees) among servers at `address`. Raises ConfigError."""
        if not self.slots:
            self.address = address
            names = (visible_gpus() if gpus is None else gpus) if self.on_gpu else ()
            shares = share_gpus(self.settings, names, on_gpu=self.on_gpu)
            self.slots = [Slot(number, share) for number, share in enumerate(shares)]
            self.while_training()

    def while_training(self) -> str:
        """What `generate.vllm.while_training` means here: sleep, stop or keep. Raises ConfigError."""
        wanted = str(self.settings.while_training)
        if wanted == "sleep" and not self.on_gpu:
            raise ConfigError(
                "vLLM sleeps only on a GPU",
                where="generate.vllm.while_training",
                expected="auto, stop or keep on a CPU",
            )
        return wanted if wanted != "auto" else "sleep" if self.on_gpu else "keep"

    @property
    def addresses(self) -> list[str]:
        """Where the servers are, by number; a server that was started again is somewhere else."""
        return [slot.server.address if slot.server is not None else "" for slot in self.slots]

    # -- weights ---------------------------------------------------------------------------------------------------

    def begin(self, weights: Announced) -> None:
        """Nothing to send: `ready` does it."""
        self._weights = weights

    def ready(self, tick: Callable[[], None]) -> None:
        """Return when every server serves what `begin` announced; `tick` is called meanwhile. Raises DataError."""
        assert self._weights is not None
        self.open()
        self._folder = self._stage.take(self._weights, tick)
        self._together(self._serve, tick)
        self._stage.forget(self._weights, keep=True)

    def _together(self, call: Callable[[Slot, Look], None], tick: Callable[[], None]) -> None:
        """`call` for every server at once. When one fails, or `tick` raises, the others give up."""
        given_up = threading.Event()
        with ThreadPoolExecutor(len(self.slots), thread_name_prefix="isft-vllm") as pool:
            waiting = [pool.submit(call, slot, looking_at(given_up.is_set)) for slot in self.slots]
            try:
                while True:
                    done, left = wait(waiting, timeout=TICK_S, return_when=FIRST_EXCEPTION)
                    for one in done:
                        one.result()
                    if not left:
                        return
                    tick()
            finally:
                given_up.set()

    def _serve(self, slot: Slot, look: Look) -> None:
        """New weights in place where the server runs; else, and where that does not work, a start on them."""
        with slot.lock:
            if slot.server is not None and slot.server.running():
                try:
                    self._wake(slot)
                    self._load(slot)
                    return
                except ServerError:
                    slot.server.stop()
            self._start(slot, look)

    def _wake(self, slot: Slot) -> None:
        if slot.asleep and slot.server is not None:
            tell(f"{slot.server.address}/wake_up", timeout_s=600)
            slot.asleep = False

    def _serving(self) -> Path:
        assert self._folder is not None
        return self._folder

    def _load(self, slot: Slot) -> None:
        """Tell a server to take the weights; nothing else about it changes."""
        folder = self._serving()
        assert slot.server is not None and self._weights is not None
        if adapter_rank(folder) is None:
            reload_weights(slot.server.address, folder, self.section.startup_timeout_s)
            return
        load_adapter(slot.server.address, self._weights.name, folder, slot.adapter, self.section.startup_timeout_s)
        slot.adapter = self._weights.name

    # -- processes -------------------------------------------------------------------------------------------------

    def _start(self, slot: Slot, look: Look) -> None:
        folder = self._serving()
        rank = adapter_rank(folder)
        if rank is not None and self.base is None:
            raise ConfigError("vLLM serves an adapter only over a base model in a folder", where="generate.engine")
        port = free_port(self.address)
        command = serve_command(
            self.settings.python,
            folder if rank is None else self.base,
            port=port,
            settings=self.settings,
            adapter_rank=rank,
            dtype=self.dtype,
            host=self.address,
        )
        environment = {"VLLM_SERVER_DEV_MODE": "1", MARK: self._mark}
        if rank is not None:
            environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if self.on_gpu:
            command.append("--enable-sleep-mode")
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
        else:
            memory = self.section.memory_gb
            environment["VLLM_CPU_KVCACHE_SPACE"] = str(2 if memory == "auto" else max(int(memory), 1))
            names = [str(name).lstrip("-").replace("_", "-") for name in self.settings.args]
            if "enable-chunked-prefill" not in names:
                # vLLM 0.32 on a CPU ends at the first prompt that is cut between two steps when requests have seeds of their own
                command.append("--no-enable-chunked-prefill")
        log = self._log_of(slot)
        server = Server(command, port=port, log=log, environment=environment, host=self.address)
        slot.server, slot.asleep, slot.adapter = server, False, None
        try:
            server.wait(self.section.startup_timeout_s, look)
        except BaseException:
            server.end()
            raise
        if rank is not None:
            try:
                self._load(slot)
            except ServerError as error:
                raise DataError(
                    f"vLLM did not take the adapter: {error}",
                    where="generate.vllm",
                    hint=f"its whole output is in {log}; model.adapter: none trains and serves all weights",
                ) from error

    def _log_of(self, slot: Slot) -> Path:
        if self._logs is None:
            self._logs = Path(tempfile.mkdtemp(prefix="isft-vllm-"))
        return self._logs / ("vllm-server.log" if len(self.slots) == 1 else f"vllm-server-{slot.number}.log")

    def restart(
        self, number: int, given_up: Callable[[], bool] = _never, *, force: bool = False, allowed: bool = True
    ) -> None:
        """Start a server again, on the same weights, when it is gone (with `force` in any case), while the others go on.

        Raises DataError when it does not start or is not `allowed` to, and Abandoned when `given_up` says so before it is ready.
        """
        slot = self.slots[number]
        with slot.lock:
            server = slot.server
            if server is not None and not force and server.running() and server.healthy():
                return
            if server is not None:
                server.stop()
                if not allowed:
                    raise DataError(
                        f"vLLM on {socket.gethostname()} ended again and again in one shard:\n{server.log_tail()}",
                        where="generate.vllm",
                        hint=f"its whole output is in {server.log}",
                    )
            look = looking_at(given_up)
            look()  # who gave up before may be waiting for the lock to end this server for good
            self._start(slot, look)

    def pump(self) -> None:
        """Nothing comes from elsewhere."""

    # -- giving the device back ------------------------------------------------------------------------------------

    def end(self) -> None:
        """Begin to give the device to the trainer, as `generate.vllm.while_training` says; `ended` returns when it is given."""

    def ended(self, tick: Callable[[], None]) -> None:
        """Return when every server sleeps, or has ended where it is to or does not sleep."""
        mode = self.while_training()
        if not self.slots or mode == "keep":
            return
        self._together(self._sleep if mode == "sleep" else self._stop, tick)

    def _sleep(self, slot: Slot, look: Look) -> None:
        with slot.lock:
            if slot.server is None or slot.asleep or not slot.server.running():
                return
            try:
                # level 2 drops the weights, which new ones replace; a base model under an adapter is to be there again
                level = 2 if slot.adapter is None else 1
                tell(f"{slot.server.address}/sleep?level={level}", timeout_s=120)
                slot.asleep = True
            except ServerError:
                slot.server.stop()

    def _stop(self, slot: Slot, look: Look) -> None:
        with slot.lock:
            if slot.server is not None:
                slot.server.stop()
                slot.server, slot.asleep, slot.adapter = None, False, None

    def close(self) -> None:
        """End the servers, and remove copies of weights."""
        servers = [slot.server for slot in self.slots if slot.server is not None]
        for server in servers:
            server.end()
        for server in servers:
            server.stop()
        for slot in self.slots:
            slot.server, slot.asleep, slot.adapter = None, False, None
        if self._weights is not None:
            self._stage.forget(self._weights, keep=False)
        self._folder = None


def share_gpus(settings: Any, gpus: Sequence[str], *, on_gpu: bool) -> list[Sequence[str]]:
    """The GPUs of each server of a host (none without a GPU). Raises ConfigError where they cannot be shared out."""
    each, wanted = int(settings.tensor_parallel_size), settings.servers
    if not on_gpu:
        return [()] * (1 if wanted == "auto" else int(wanted))
    there = f"{len(gpus)} visible GPU{'s' if len(gpus) != 1 else ''} on {socket.gethostname()}"
    if wanted == "auto":
        if len(gpus) < each or len(gpus) % each:
            raise ConfigError(
                f"{there} cannot be shared out among servers of {each}",
                where="generate.vllm.tensor_parallel_size",
                expected=f"a number that divides {len(gpus)}" if gpus else "visible GPUs",
                hint="or say how many servers a host is to have: generate.vllm.servers",
            )
        wanted = len(gpus) // each
    if int(wanted) * each > len(gpus):
        raise ConfigError(
            f"{wanted} servers of {each} GPU{'s' if each != 1 else ''} need {int(wanted) * each}, and there are {there}",
            where="generate.vllm.servers",
            expected=f"at most {len(gpus) // each}, or auto",
        )
    return [tuple(gpus[number * each : (number + 1) * each]) for number in range(int(wanted))]


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that this process sees."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


def reload_weights(address: str, folder: Path, timeout_s: float) -> None:
    """Have a server take the weights in `folder` in place. Raises ServerError."""
    tell(
        f"{address}/collective_rpc",
        {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}},
        timeout_s=timeout_s,
    )
    try:
        tell(f"{address}/reset_prefix_cache", timeout_s=60)
    except ServerError as error:
        if error.status != 404:
            raise


def adapter_name(weights: str) -> str:
    """What requests call the adapter of announced weights."""
    return f"{SERVED_NAME}-{weights}"


def load_adapter(address: str, weights: str, folder: Path, before: str | None, timeout_s: float) -> None:
    """Have a server take the adapter in `folder` in the place of the one of earlier weights. Raises ServerError."""
    body = {"lora_name": adapter_name(weights), "lora_path": str(folder)}
    tell(f"{address}/v1/load_lora_adapter", body, timeout_s=timeout_s)
    if before not in (None, weights):
        tell(f"{address}/v1/unload_lora_adapter", {"lora_name": adapter_name(str(before))}, timeout_s=timeout_s)
