"""The OpenAI-compatible engine against a local server: text samples, retries, counters, and a key that goes nowhere else."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_vllm import FakeServer

from iterative_sft_cli.config import GenerateConfig
from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.generate import open_engine
from iterative_sft_cli.generate.openai import OpenAIEngine
from iterative_sft_cli.types import Completion, Decoding, Request, derive_seed

ENCODER = SimpleNamespace(
    messages=lambda prompt: [{"role": "system", "content": "s"}, {"role": "user", "content": prompt}]
)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    (tmp_path / "w.json").write_text('{"w": 0.1}')
    monkeypatch.setattr("iterative_sft_cli.generate.crew.FIRST_PAUSE_S", 0.01)
    return FakeServer(tmp_path).start()


def open_it(server: FakeServer | None, tmp_path: Path = Path("."), **settings: Any) -> OpenAIEngine:
    if server is not None:
        settings = {"base_url": f"{server.url}/v1/", "model": "teacher", **settings}
    section = GenerateConfig(engine="openai", openai=settings, timeout_s=5)
    engine = open_engine(section, loaded=None, encoder=ENCODER, base_dir=tmp_path, run_dir=None, seed=0)
    assert isinstance(engine, OpenAIEngine)
    engine.begin(None)
    return engine


def ask(engine: OpenAIEngine, num: int = 6, **decoding: Any) -> list[Completion]:
    request = Request("p0", "What?", (1, 2), tuple(range(num)), tuple(derive_seed(i) for i in range(num)))
    how = Decoding(**{"max_new_tokens": 20, **decoding})
    found = list(engine.generate([request], how, engine.plan([request], how)))
    assert sorted(c.sample_index for c in found) == list(range(num))
    return found


def test_samples_are_text(server: FakeServer) -> None:
    engine = open_it(server)
    beats: list[int] = []
    engine.heartbeat = beats.append
    for completion in ask(engine):
        assert completion.text == f"answer {derive_seed(completion.sample_index) % 2**31 % 100} to What?"
        assert (completion.finish_reason, completion.token_ids, completion.logprob) == ("eos", (), None)
    usage = engine.usage
    assert (usage.num_requests, usage.num_retries) == (6, 0)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cost) == (42, 24, 1.5)
    assert sum(beats) == 24


def test_what_is_sent(server: FakeServer) -> None:
    ask(open_it(server, extra_body={"thinking": False}), 1, temperature=0.5, top_p=0.8)
    path, body = server.requests[-1]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "What?"}]
    assert (body["model"], body["temperature"], body["top_p"], body["thinking"]) == ("teacher", 0.5, 0.8, False)
    assert not {"top_k", "min_p", "repetition_penalty", "stop", "logprobs"} & set(body)
    ask(open_it(server), 1, top_k=7, min_p=0.1, repetition_penalty=1.2, stop=("END",), keep_logprobs=True)
    body = server.requests[-1][1]
    assert (body["top_k"], body["min_p"], body["repetition_penalty"], body["stop"]) == (7, 0.1, 1.2, ["END"])


def test_finish_reasons_and_logprobs(server: FakeServer) -> None:
    assert ask(open_it(server), 1, max_new_tokens=2)[0].finish_reason == "length"
    stopped = ask(open_it(server), 1, stop=("END",), keep_logprobs=True)[0]
    assert stopped.finish_reason == "stop" and str(stopped.text).endswith("END")
    assert stopped.logprob == -2.0


def test_failures_are_asked_again_and_counted(server: FakeServer) -> None:
    server.answers += [(429, {"Retry-After": "0.2"}), (500, {}), (503, {})]
    engine = open_it(server)
    start = time.monotonic()
    ask(engine)
    assert time.monotonic() - start > 0.2
    assert (engine.usage.num_requests, engine.usage.num_retries) == (9, 3)


def test_a_failure_that_lasts_is_an_error_with_the_servers_words(server: FakeServer) -> None:
    server.answers += [(500, {})] * 3
    with pytest.raises(DataError, match="answered 500.*scripted.*asked 3 times") as error:
        ask(open_it(server, max_retries=2), 1)
    assert error.value.exit_code == 4
    server.answers += [(401, {})]
    with pytest.raises(DataError, match="answered 401"):
        ask(open_it(server), 1)


def test_an_address_where_nobody_listens(tmp_path: Path) -> None:
    engine = open_it(None, base_url="http://127.0.0.1:9/v1", model="m", max_retries=0)
    with pytest.raises(DataError, match="Connection"):
        ask(engine, 1)


def test_the_rate_is_kept(server: FakeServer) -> None:
    start = time.monotonic()
    ask(open_it(server, requests_per_minute=600), 6)
    assert time.monotonic() - start >= 0.5


def test_the_key_comes_from_the_environment_and_stays_there(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="TEACHER_KEY is not set"):
        open_it(server, api_key_env="TEACHER_KEY")
    monkeypatch.setenv("TEACHER_KEY", "key-of-a-teacher")
    seen: list[str | None] = []
    handler = server.RequestHandlerClass
    original = handler.do_POST  # type: ignore[attr-defined]

    def spy(self: Any) -> None:
        seen.append(self.headers.get("Authorization"))
        original(self)

    monkeypatch.setattr(handler, "do_POST", spy)
    engine = open_it(server, api_key_env="TEACHER_KEY", max_retries=0)
    ask(engine, 1)
    assert seen == ["Bearer key-of-a-teacher"]
    server.answers += [(500, {})]
    with pytest.raises(DataError) as error:
        ask(engine, 1)
    assert "key-of-a-teacher" not in str(error.value)


@pytest.mark.parametrize("missing", ["base_url", "model"])
def test_address_and_model_are_needed(missing: str) -> None:
    settings = {"base_url": "http://localhost/v1", "model": "m"}
    del settings[missing]
    with pytest.raises(ConfigError, match=f"needs generate.openai.{missing}"):
        open_it(None, **settings)
