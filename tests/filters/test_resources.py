"""The long form's resources in whole runs: a grader with a key, one with a model of a GPU's size, one that needs the network."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from iterative_sft_cli.cli import run as isft

pytestmark = pytest.mark.skipif(os.name != "posix", reason="limits on memory are POSIX")

GRADERS = """
import json, mmap, os, time, urllib.request
from iterative_sft_cli.types import Verdict

def note(log, **what):
    with open(log, "a") as file:
        file.write(json.dumps({"pid": os.getpid(), **what}) + "\\n")

class WithKey:
    def __init__(self, url: str, log: str):
        self.url, self.log = url, log
    def setup(self):
        self.key = os.environ["GRADER_KEY"]
        note(self.log, did="setup")
    def __call__(self, sample):
        request = urllib.request.Request(self.url, sample.completion.encode(), {"Authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(request, timeout=5) as reply:
            return Verdict(True, json.load(reply)["score"])

class LargeModel:
    def __init__(self, log: str, megabytes: int = 200, seconds: float = 0.0):
        self.log, self.megabytes, self.seconds = log, megabytes, seconds
    def setup(self):
        # as CUDA does: far more address space than memory
        self.reserved = mmap.mmap(-1, 64 << 30, flags=mmap.MAP_PRIVATE | 0x4000)  # MAP_NORESERVE
        self.weights = bytearray(os.urandom(1 << 20)) * self.megabytes
        note(self.log, did="load", gpu=os.environ.get("CUDA_VISIBLE_DEVICES"))
    def __call__(self, sample):
        time.sleep(self.seconds)
        note(self.log, did="judge", gpu=os.environ.get("CUDA_VISIBLE_DEVICES"))
        return Verdict(True, float(len(sample.completion)))

def networked(sample, url: str):
    with urllib.request.urlopen(url, sample.completion.encode()) as reply:
        return Verdict(json.load(reply)["score"] > 0.5, reason="graded_low")
"""


class Server:
    """Grades what it is sent: 0.9; sleeps first when told to."""

    def __init__(self) -> None:
        self.keys: set[str | None] = set()
        self.asleep = 0.0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                server.keys.add(self.headers.get("Authorization"))
                time.sleep(server.asleep)
                self.send_response(200)
                self.send_header("Content-Length", "14")
                self.end_headers()
                with contextlib.suppress(OSError):  # it was given up
                    self.wfile.write(b'{"score": 0.9}')

            def log_message(self, *args: Any) -> None:
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *args: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.http.shutdown()
    one.http.server_close()


@pytest.fixture
def train(
    toy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Train the toy with one grader between its filters; (exit code, stderr)."""
    (tmp_path / "graders.py").write_text(GRADERS)

    def run(
        name: str, args: dict[str, Any], *, reads: bool = True, rounds: int = 1, **resources: Any
    ) -> tuple[int, str]:
        entry = {"use": f"graders.py:{name}", "args": args, "name": "grader", **resources}
        threshold = [{"threshold": {"by": "grader", "min": 0.5}}] if reads else []
        config = toy(rounds=rounds, eval=None, filters=["finished", entry, *threshold], prompts={"limit": 4})
        return isft(["train", str(config)]), capsys.readouterr().err

    return run


def log_of(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def verdicts(tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "run" / "rounds" / "0001" / "verdicts-00000.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [next(says for says in row["says"] if says["filter"] == "grader") for row in rows]


def test_a_grader_with_an_api_key(train: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = {"url": server.url, "log": str(tmp_path / "log")}
    monkeypatch.delenv("GRADER_KEY", raising=False)
    code, err = train("WithKey", args, workers=2, env=["GRADER_KEY"])
    assert code == 2 and "the environment variable GRADER_KEY (listed in `env`) is not set" in err
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("GRADER_KEY", "key-of-the-grader")
    code, err = train("WithKey", args, workers=2)
    assert code == 5 and "its set-up raised KeyError: 'GRADER_KEY'" in err
    code, err = train("WithKey", args, workers=2, env=["GRADER_KEY"], rounds=2)
    assert code == 0, err
    assert server.keys == {"Bearer key-of-the-grader"}
    assert {says["score"] for says in verdicts(tmp_path)} == {0.9}
    assert 1 <= len([row for row in log_of(tmp_path) if row["did"] == "setup"]) <= 2
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(b"key-of-the-grader" in path.read_bytes() for path in files)


def test_a_grader_with_a_model_of_a_gpus_size(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in reserves 64 GB of addresses as CUDA does, holds 200 MB, waits for the engine to leave, and is gone afterwards."""
    from iterative_sft_cli.rounds.weights import EngineSession

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    left: list[float] = []
    close = EngineSession.close

    def note(self: Any) -> None:
        left.append(time.time())
        close(self)

    monkeypatch.setattr(EngineSession, "close", note)
    code, err = train("LargeModel", {"log": str(tmp_path / "log")}, device="cuda", memory_gb=0.5, timeout_s=20)
    assert code == 0, err
    rows = log_of(tmp_path)
    assert [row["did"] for row in rows] == ["load"] + ["judge"] * 16
    assert {row["gpu"] for row in rows} == {"3"} and left[0] < (tmp_path / "log").stat().st_ctime
    assert not Path(f"/proc/{rows[0]['pid']}").exists()


def test_a_model_that_is_larger_than_it_may_be_is_named(train: Any, tmp_path: Path) -> None:
    args = {"log": str(tmp_path / "log"), "megabytes": 500, "seconds": 3.0}
    code, err = train("LargeModel", args, device="cuda", memory_gb=0.3)
    assert code == 5 and "GB of memory, more than 0.3 (memory_gb)" in err and "filters[1]" in err


def test_a_grader_without_a_device_sees_no_gpu(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert train("LargeModel", {"log": str(tmp_path / "log"), "megabytes": 1}, workers=1)[0] == 0
    assert {row["gpu"] for row in log_of(tmp_path)} == {""}


def test_a_grader_that_needs_the_network(train: Any, server: Server, tmp_path: Path) -> None:
    assert train("networked", {"url": server.url}, reads=False, workers=2)[0] == 0
    assert all(says["keep"] for says in verdicts(tmp_path))
    (tmp_path / "run").rename(tmp_path / "good")
    server.asleep = 5.0
    code, err = train("networked", {"url": server.url}, reads=False, workers=4, timeout_s=0.3, on_error="drop")
    assert code == 3 and "timeout" in err
    assert {(says["keep"], says["reason"], says.get("score")) for says in verdicts(tmp_path)} == {
        (False, "timeout", None)
    }
    (tmp_path / "run").rename(tmp_path / "asleep")
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    code, err = train("networked", {"url": f"http://127.0.0.1:{port}/"}, reads=False, workers=1, on_error="retry")
    assert code == 5 and "Connection refused" in err and "on prompt" in err
