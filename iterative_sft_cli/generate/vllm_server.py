"""A vLLM server of ours: started from its own environment, waited for, watched, and never left behind.

Guarantee: the server ends with the process that started it, even when that one is killed: a guard process between them ends
the server's process group when the pipe to it closes. Its development endpoints are bound to loopback or the job's network.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.generate.http_client import ServerError, request_json

SERVED_NAME = "isft"
"""Name of the model in requests."""
LOOPBACK = "127.0.0.1"
GUARD = """
import os, signal, subprocess, sys, threading
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
def watch():
    while os.read(0, 1):
        pass
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(15)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
threading.Thread(target=watch, daemon=True).start()
code = child.wait()
try:
    os.killpg(child.pid, signal.SIGKILL)
except ProcessLookupError:
    pass
os._exit(code if code >= 0 else 128 - code)
"""
"""Runs the server in a session of its own and ends all of it when standard input closes."""


LAUNCHER = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_.*|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_.*"
)
"""Variables of whoever started us as one of several processes: a server is none of them."""


MARK = "ISFT_SERVES"
"""Environment variable of a server and all that it starts: the run that it serves."""


def mark_of(run_dir: Path) -> str:
    """What `MARK` says for a run."""
    return hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]


def await_earlier(run_dir: Path, timeout_s: float = 60.0) -> None:
    """Return when no server is left of an earlier process of this run: the guard of one that was killed takes a moment.

    Linux only; after `timeout_s` whatever is left is left.
    """
    mark = f"{MARK}={mark_of(run_dir)}".encode()
    deadline = time.monotonic() + timeout_s
    while any(mark in environ.split(b"\0") for environ in _environments()) and time.monotonic() < deadline:
        time.sleep(0.2)


def _environments() -> Iterator[bytes]:
    """Of every process of this user that can be read."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            yield path.read_bytes()


def free_port(host: str = LOOPBACK) -> int:
    """A port of `host`'s address nobody listens on at the moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def address_towards(master: str, port: int) -> str:
    """The address of the interface by which this host reaches `master`: its own in the job's network. Raises DataError."""
    try:
        family, kind, protocol, _, there = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(there)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise DataError(
            f"no interface of {socket.gethostname()} leads to {master}: {error}", where="MASTER_ADDR"
        ) from error


def serve_command(
    python: str | None,
    model: Path,
    *,
    port: int,
    settings: Any,
    adapter_rank: int | None,
    dtype: str,
    host: str = LOOPBACK,
) -> list[str]:
    """The command line of `vllm serve`; `settings` is a `VllmConfig`."""
    # the module, not the command line around it: that one fails where the distribution is not called vllm (the CPU build's is not)
    start = [python, "-m", "vllm.entrypoints.openai.api_server", "--model"] if python else ["vllm", "serve"]
    options: dict[str, Any] = {
        "host": host,
        "port": port,
        "served-model-name": SERVED_NAME,
        "generation-config": "vllm",
        "dtype": dtype,
        "tensor-parallel-size": settings.tensor_parallel_size,
        "gpu-memory-utilization": settings.gpu_memory_utilization,
    }
    if settings.max_model_len is not None:
        options["max-model-len"] = settings.max_model_len
    if adapter_rank is not None:
        options |= {"enable-lora": True, "max-lora-rank": max(adapter_rank, 8), "max-loras": 1}
    options |= {str(name).lstrip("-").replace("_", "-"): value for name, value in settings.args.items()}
    command = [*start, str(model)]
    for name, value in options.items():
        if value is True:
            command.append(f"--{name}")
        elif value is False:
            command.append(f"--no-{name}")
        elif value is not None:
            command += [f"--{name}", str(value)]
    return command


class Server:
    """One running `vllm serve`. `log` takes its output; `address` is its base url."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        log: Path,
        environment: Mapping[str, str],
        host: str = LOOPBACK,
    ) -> None:
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if not LAUNCHER.fullmatch(name)}
        env = {**kept, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **environment}
        env.pop("PYTHONPATH", None)
        with open(log, "ab") as stream:
            try:
                self._guard = subprocess.Popen(
                    [sys.executable, "-c", GUARD, *command],
                    stdin=subprocess.PIPE,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=env,
                    # Ctrl-C reaches us alone; we end the server when we are ready to
                    start_new_session=True,
                )
            except OSError as error:
                raise DataError(f"vLLM could not be started: {error}", where="generate.vllm.python") from error

    def running(self) -> bool:
        """Whether the process is alive."""
        return self._guard.poll() is None

    def healthy(self, timeout_s: float = 5.0) -> bool:
        """Whether it answers."""
        try:
            request_json("GET", f"{self.address}/health", timeout_s=timeout_s)
        except ServerError:
            return False
        return True

    def wait(self, timeout_s: float, tick: Callable[[], None]) -> None:
        """Return when the server is healthy. Raises DataError with the end of its log when it exits or takes too long."""
        start = time.monotonic()
        while not self.healthy(timeout_s=2.0):
            if not self.running():
                raise DataError(
                    f"vLLM ended with exit code {self._guard.returncode} before it was ready:\n{self.log_tail()}",
                    where="generate.vllm",
                    hint=f"its whole output is in {self.log}",
                )
            if time.monotonic() - start > timeout_s:
                tail = self.log_tail()
                self.stop()
                raise DataError(
                    f"vLLM was not ready after {timeout_s:g} s:\n{tail}",
                    where="generate.startup_timeout_s",
                    hint=f"its whole output is in {self.log}",
                )
            tick()
            time.sleep(0.2)

    def log_tail(self, num_lines: int = 15) -> str:
        """The last lines it wrote."""
        try:
            lines = self.log.read_text("utf-8", "replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-num_lines:])

    def end(self) -> None:
        """Have the server and everything it started end; returns at once."""
        if self._guard.stdin is not None:
            self._guard.stdin.close()

    def stop(self) -> None:
        """End the server and everything it started; returns when they are gone."""
        self.end()
        try:
            self._guard.wait(40)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
