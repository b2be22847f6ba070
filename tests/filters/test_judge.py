"""The judge against a real OpenAI-compatible server on this machine: requests, retries, cost, keys, unusable answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from filter_samples import new_sample

from iterative_sft_cli.errors import ConfigError, DataError, PluginError
from iterative_sft_cli.filters import Judged

Judge = Callable[..., list[Judged]]


class Server:
    """Answers chat completions with what `script` returns for the request: a status and content, or only content."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.script: Callable[[dict[str, Any], int], Any] = lambda request, count: json.dumps(
            {"reason": "fine", "score": 7}
        )
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(request)
                server.headers.append({key.lower(): value for key, value in self.headers.items()})
                answer = server.script(request, len(server.requests))
                status, content = answer if isinstance(answer, tuple) else (200, answer)
                body = json.dumps(
                    {
                        "id": "x",
                        "object": "chat.completion",
                        "created": 0,
                        "model": "m",
                        "choices": [
                            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
                        ],
                        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
                    }
                    if status == 200
                    else {"error": {"message": content}}
                ).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", server.url + "/elsewhere")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                server.followed.append(self.headers.get("Authorization"))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                return

        self.followed: list[str | None] = []
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.http.shutdown()
    one.http.server_close()


def entry(server: Server, **more: Any) -> dict[str, Any]:
    long = {key: more.pop(key) for key in ("workers", "on_error", "timeout_s") if key in more}
    return {"use": "judge", "args": {"base_url": server.url, "model": "m", "retry_s": 5.0, **more}, **long}


def test_it_scores_and_counts(judge: Judge, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    samples = [new_sample(f"answer {i}", i=i, prompt=f"p{i}") for i in range(10)]
    judged = judge(samples, entry(server, prices=[1.0, 10.0]), {"threshold": {"by": "judge", "min": 6.5}})
    assert all(one.kept and one.says[0].score == 7.0 for one in judged)
    assert judged[0].says[0].extra == {"reason": "fine", "prompt_tokens": 100, "completion_tokens": 20, "cost": 0.0003}
    request = server.requests[0]
    assert request["model"] == "m" and request["temperature"] == 0.0
    schema = request["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["score"] == {"type": "number", "minimum": 1, "maximum": 10}
    text = next(r["messages"][0]["content"] for r in server.requests if "answer 3" in r["messages"][0]["content"])
    assert "What is 2 + 2?" in text and "from 1 to 10" in text


def test_fields_inside_a_completion_stay_text(judge: Judge, server: Server) -> None:
    judge([new_sample("{answer} {rubric} {0} %s", "SECRET ANSWER")], entry(server, template="Judge: {completion}"))
    assert server.requests[0]["messages"][0]["content"] == "Judge: {answer} {rubric} {0} %s"


def test_votes_are_averaged(judge: Judge, server: Server) -> None:
    server.script = lambda request, count: json.dumps({"reason": "r", "score": count})
    said = judge([new_sample("x")], entry(server, votes=3))[0].says[0]
    assert (said.score, said.extra["votes"], said.extra["prompt_tokens"]) == (2.0, [1.0, 2.0, 3.0], 300)
    assert len({request["seed"] for request in server.requests}) == 3


def test_overload_is_waited_out(judge: Judge, server: Server) -> None:
    server.script = lambda request, count: (503, "busy") if count < 3 else json.dumps({"reason": "r", "score": 5})
    assert judge([new_sample("x")], entry(server))[0].says[0].score == 5.0
    assert len(server.requests) == 3


def test_an_unusable_answer_is_asked_again_then_an_error(judge: Judge, server: Server) -> None:
    bad = ["no json", '{"score": "7"}', '{"score": 99}']
    server.script = lambda request, count: bad[count - 1]
    with pytest.raises(PluginError) as caught:
        judge([new_sample("x")], entry(server))
    assert "gave no usable answer for sample 1-p0-0: the score 99 is outside 1 to 10" in caught.value.what
    assert len(server.requests) == 3
    server.requests.clear()
    said = judge([new_sample("x")], entry(server, on_error="drop"))[0].says[0]
    assert (said.keep, said.score, said.reason) == (False, None, "plugin_error")
    server.requests.clear()
    server.script = lambda request, count: bad[0] if count == 1 else 'Sure: ```json\n{"reason": "ok", "score": 3}\n```'
    assert judge([new_sample("x")], entry(server))[0].says[0].score == 3.0


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "refuses"),
        (403, "refuses"),
        (404, "refuses"),
        (400, "refuses"),
        (302, "refuses"),
        (500, "does not answer"),
    ],
)
def test_a_server_that_refuses_is_no_samples_fault(judge: Judge, server: Server, status: int, message: str) -> None:
    server.script = lambda request, count: (status, "no")
    for on_error in ("fail", "drop"):
        with pytest.raises(DataError, match=message):
            judge([new_sample("x")], entry(server, on_error=on_error, retry_s=0.2))
    assert not server.followed


def test_nobody_there(judge: Judge) -> None:
    with pytest.raises(DataError, match="does not answer"):
        judge([new_sample("x")], {"judge": {"base_url": "http://127.0.0.1:9/v1", "model": "m", "retry_s": 0.1}})


def test_only_the_named_key_is_sent(
    judge: Judge, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s" * 30)
    judge([new_sample("x")], entry(server))
    assert "ssss" not in json.dumps(server.headers)
    monkeypatch.setenv("GRADER_KEY", "grader-secret")
    judge([new_sample("x")], entry(server, api_key_env="GRADER_KEY"), cache_dir=tmp_path)
    assert server.headers[-1]["authorization"] == "Bearer grader-secret"
    assert not any(b"grader-secret" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    server.script = lambda request, count: (401, "bad key")
    with pytest.raises(DataError) as caught:
        judge([new_sample("x")], entry(server, api_key_env="GRADER_KEY"))
    assert "grader-secret" not in str(caught.value) and "check the key in GRADER_KEY" in str(caught.value)


def test_answers_are_paid_for_once(judge: Judge, server: Server, tmp_path: Path) -> None:
    samples = [new_sample(f"a{i}", i=i) for i in range(5)]
    first = judge(samples, entry(server), cache_dir=tmp_path)
    assert judge(samples, entry(server), cache_dir=tmp_path) == first
    assert len(server.requests) == 5
    judge(samples, entry(server, rubric="Another."), cache_dir=tmp_path)
    assert len(server.requests) == 10


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_url": "ftp://x"},
        {"base_url": "http://user:pass@host/v1"},
        {"scale": [5, 1]},
        {"api_key_env": "NOT_SET_ANYWHERE"},
        {"template": "no field"},
        {"prices": [1.0]},
        {"votes": 0},
    ],
)
def test_what_cannot_work_is_refused(judge: Judge, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        judge([], {"judge": {"base_url": "http://h/v1", "model": "m", **wrong}})
