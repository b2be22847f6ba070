"""A stand-in for `vllm serve` with the standard library: a unigram "model" whose one weight lies in FOLDER/w.json.

    python fake_vllm.py serve FOLDER --port N [--host ADDRESS] [--fault NAME] ...

A FOLDER without w.json holds a Llama, which tiny_numpy.py computes. Faults: `never_healthy`, `exit` (at once), `die_after=N` (kills
itself at the N-th completion, once per FOLDER), `dies=N` (at its N-th completion, always), `deaf` (reload_weights does nothing),
`wrong` (serves other weights whatever it is told), `restless` (does not sleep), `hang_after=N` (stops answering in mid-stream, once).
FAKE_VLLM_JOURNAL names a file to which it appends what it does, FAKE_VLLM_PAUSE_S how long it thinks about a completion,
FAKE_VLLM_END_S how long it takes to end. Within a test it runs as a thread.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

VOCAB = 50
EOS = 2


def logprob(weight: float, token: int) -> float:
    total = sum(math.exp(weight * (t % 7)) for t in range(VOCAB))
    return weight * (token % 7) - math.log(total)


def completion_of(prompt: list[int], seed: int, limit: int) -> tuple[list[int], str]:
    """What the fake generates: a pure function of prompt and seed, so that a request asked twice gets the same answer."""
    length = seed % 9 + 1
    ids = [(sum(prompt) + seed + i) % 40 + 5 for i in range(length - 1)] + [EOS]
    return (ids, "stop") if length <= limit else (ids[:limit], "length")


def note(event: str, **more: Any) -> None:
    """A line for the journal of who has weights in memory."""
    path = os.environ.get("FAKE_VLLM_JOURNAL")
    if path:
        line = json.dumps({"at": time.time(), "pid": os.getpid(), "who": "server", "event": event, **more}) + "\n"
        with open(path, "a") as file:
            file.write(line)


def die(code: int = 1, **more: Any) -> None:
    note("stop", **more)
    os._exit(code)


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder: Path, *, host: str = "127.0.0.1", port: int = 0, fault: str = "") -> None:
        super().__init__((host, port), Handler)
        self.folder = folder
        self.llama = None if (folder / "w.json").exists() or (folder / "adapter_config.json").exists() else load(folder)
        self.weight = read_weight(folder) - (0.02 if fault == "rounds" else 0.0) if self.llama is None else 0.1
        if fault == "wrong":
            self.weight += 0.4
        self.asleep = False
        self.adapted = 0.0
        """What is wrong with the model under an adapter."""
        self.adapters: dict[str, float] = {}
        self.fault, _, number = fault.partition("=")
        self.number = int(number or 0)
        self.completions = 0
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.requests: list[tuple[str, Any]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def start(self) -> FakeServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self


def load(folder: Path) -> Any:
    from tiny_numpy import Llama

    return Llama(folder)


def read_weight(folder: Path) -> float:
    return float(json.loads((folder / "w.json").read_text())["w"])


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None, *, text: str | None = None) -> None:
        # vLLM answers some requests in plain words
        data = json.dumps(body).encode() if text is None else text.encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        server = self.server
        if self.path == "/health":
            self.answer(503 if server.fault == "never_healthy" else 200, {})
        elif self.path == "/v1/models":
            self.answer(200, {"data": [{"id": "their-model"}]})
        else:
            self.answer(404, {})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null")
        with server.lock:
            server.requests.append((self.path, body))
            scripted = server.answers.pop(0) if server.answers and "completions" in self.path else None
        if scripted is not None:
            self.answer(scripted[0], {"error": "scripted"}, scripted[1])
        elif self.path == "/collective_rpc":
            folder = Path(body["kwargs"]["weights_path"])
            note("load", folder=str(folder))
            if server.llama is not None and server.fault != "deaf":
                server.llama = load(folder)
            elif server.fault != "deaf":
                rounding = 0.02 if server.fault == "rounds" else -0.4 if server.fault == "wrong" else 0.0
                server.weight = read_weight(folder) - rounding
            self.answer(200, {})
        elif self.path == "/v1/load_lora_adapter":
            if server.fault == "no_adapters":
                self.answer(400, {"error": "LoRA is not enabled"})
                return
            server.adapters[body["lora_name"]] = read_weight(Path(body["lora_path"]))
            self.answer(200, None, text=f"Success: LoRA adapter '{body['lora_name']}' added successfully.")
        elif self.path == "/v1/unload_lora_adapter":
            server.adapters.pop(body["lora_name"])
            self.answer(200, {})
        elif self.path.startswith("/sleep") and server.fault == "restless":
            self.answer(500, {"error": "no memory allocator"})
        elif self.path in ("/sleep?level=1", "/sleep?level=2"):
            server.asleep = True
            if self.path.endswith("2"):
                # what it served is gone until it is loaded again
                server.weight, server.adapted = 1.7, 1.7
            note("sleep")
            self.answer(200, {})
        elif self.path == "/wake_up":
            server.asleep = False
            note("wake")
            self.answer(200, {})
        elif self.path == "/reset_prefix_cache":
            self.answer(200, {})
        elif self.path == "/v1/completions":
            self.complete(body)
        elif self.path == "/v1/chat/completions":
            self.chat(body)
        else:
            self.answer(404, {})

    def complete(self, body: dict[str, Any]) -> None:
        server = self.server
        weight = server.adapters[body["model"]] + server.adapted if body["model"] in server.adapters else server.weight
        if server.asleep:
            self.answer(500, {"error": "asleep"})
            return
        if "prompt_logprobs" in body:
            if server.adapters:
                # as vLLM 0.32 does
                die()
            choices = []
            for row in body["prompt"]:
                found = server.llama.logprobs(row) if server.llama else [logprob(weight, t) for t in row[1:]]
                said = [{str(t): {"logprob": float(one)}} for t, one in zip(row[1:], found, strict=True)]
                choices.append({"prompt_logprobs": [None, *said]})
            self.answer(200, {"choices": choices})
            return
        if "allowed_token_ids" in body:
            found = logprob(weight, body["allowed_token_ids"][0])
            self.answer(200, {"choices": [{"logprobs": {"token_logprobs": [found]}}]})
            return
        with server.lock:
            server.completions += 1
            number = server.completions
        once = server.folder / f"{server.fault}.done"
        if server.fault == "die_after" and number >= server.number and not once.exists():
            once.touch()
            die(died=True)
        if server.fault == "dies" and number >= server.number:
            die(died=True)
        time.sleep(float(os.environ.get("FAKE_VLLM_PAUSE_S", "0")))
        ids, reason = completion_of(body["prompt"], body["seed"], body["max_tokens"])
        if body["stop"] and reason == "stop" and len(ids) > 3:
            ids, stop_reason = ids[:3], body["stop"][0]
        else:
            stop_reason = None
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        step = body["stream_interval"]
        for at in range(0, len(ids), step):
            part = ids[at : at + step]
            choice: dict[str, Any] = {
                "token_ids": part,
                "logprobs": {"token_logprobs": [logprob(weight, t) for t in part]},
            }
            if at + step >= len(ids):
                choice |= {"finish_reason": reason, "stop_reason": stop_reason}
            if server.fault == "hang_after" and number == server.number:
                time.sleep(5)
                return
            if server.fault == "break_after" and number == server.number:
                return
            self.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def chat(self, body: dict[str, Any]) -> None:
        text = f"answer {body['seed'] % 100} to {body['messages'][-1]['content']}"
        choice: dict[str, Any] = {"message": {"content": text}, "finish_reason": "stop"}
        if body.get("stop"):
            choice["stop_reason"] = body["stop"][0]
        if body["max_tokens"] < 4:
            choice["finish_reason"] = "length"
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [{"logprob": -0.5}, {"logprob": -1.5}]}
        usage = {"prompt_tokens": 7, "completion_tokens": 4, "cost": 0.25}
        self.answer(200, {"choices": [choice], "usage": usage})


def main() -> None:
    arguments = sys.argv[1:]
    options = dict(pairwise(arguments))
    fault = options.get("--fault", "")
    print("fake vllm", *arguments, "on", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
    if fault == "exit":
        sys.exit("no such architecture")

    def end(*_: object) -> None:
        time.sleep(float(os.environ.get("FAKE_VLLM_END_S", "0")))
        die(0)

    signal.signal(signal.SIGTERM, end)
    note("start", folder=arguments[1], host=options.get("--host"))
    host = options.get("--host", "127.0.0.1")
    FakeServer(Path(arguments[1]), host=host, port=int(options["--port"]), fault=fault).serve_forever()


if __name__ == "__main__":
    main()
