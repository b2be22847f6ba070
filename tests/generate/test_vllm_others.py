"""The vLLM engine over servers that somebody else started: balanced, asked again, left out, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import EOS, FakeServer
from helpers_generate import requests_of
from vllm_helpers import check, open_vllm, run_all

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.generate.vllm import VllmEngine
from iterative_sft_cli.types import Decoding, Request


def test_another_model_at_the_address_is_refused(loaded: Any, tmp_path: Path, engines: list[VllmEngine]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "w.json").write_text('{"w": 0.9}')
    server = FakeServer(other).start()
    engine = open_vllm(loaded, tmp_path, engines, base_urls=[server.url])
    with pytest.raises(DataError, match="serves other weights"):
        engine.begin(None)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_servers_of_others_are_balanced_and_asked_again(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iterative_sft_cli.generate.crew.FIRST_PAUSE_S", 0.02)
    servers = [FakeServer(loaded.folder).start() for _ in range(2)]
    engine = open_vllm(loaded, tmp_path, engines, base_urls=[s.url + "/v1" for s in servers], reload="http")
    engine.begin(None)
    servers[0].answers += [(status, {}), (status, {"Retry-After": "0.1"})]
    requests = requests_of([3, 4, 5], samples=20)
    check(run_all(engine, requests), requests)
    assert min(server.completions for server in servers) > 10
    assert engine._crew is not None and engine._crew.counters.num_retries == 2


@pytest.mark.parametrize("fault", ["break_after=3", "hang_after=3"])
def test_a_stream_that_breaks_or_hangs_is_asked_again(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iterative_sft_cli.generate.crew.FIRST_PAUSE_S", 0.02)
    server = FakeServer(loaded.folder, fault=fault).start()
    engine = open_vllm(loaded, tmp_path, engines, base_urls=[server.url], timeout_s=0.5)
    engine.begin(None)
    requests = requests_of([3, 4], samples=5)
    check(run_all(engine, requests), requests)


def test_a_server_that_is_gone_is_left_out_and_the_last_one_is_an_error(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iterative_sft_cli.generate.crew.FIRST_PAUSE_S", 0.02)
    servers = [FakeServer(loaded.folder).start() for _ in range(2)]
    engine = open_vllm(loaded, tmp_path, engines, base_urls=[s.url for s in servers])
    engine.begin(None)
    servers[0].shutdown()
    servers[0].server_close()
    requests = requests_of([3, 4], samples=10)
    check(run_all(engine, requests), requests)
    servers[1].shutdown()
    servers[1].server_close()
    with pytest.raises(DataError, match="asked"):
        run_all(engine, requests)


def test_a_server_that_died_is_left_out_of_later_phases_until_it_is_back(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine], caplog: pytest.LogCaptureFixture
) -> None:
    servers = [FakeServer(loaded.folder).start() for _ in range(2)]
    port = servers[0].server_address[1]
    engine = open_vllm(loaded, tmp_path, engines, base_urls=[s.url for s in servers], reload="http")
    engine.begin(None)
    servers[0].shutdown()
    servers[0].server_close()
    requests = requests_of([3, 4], samples=10)
    for weight in (0.15, 0.2):
        with torch.no_grad():
            loaded.model.w.fill_(weight)
        engine.begin(None)
        assert list(engine.proof) == [servers[1].url]
        check(run_all(engine, requests), requests, weight)
    assert f"{servers[0].url} does not answer any more" in caplog.text
    back = FakeServer(loaded.folder, port=port).start()
    engine.begin(None)
    assert sorted(engine.proof) == sorted([back.url, servers[1].url])
    check(run_all(engine, requests), requests, 0.2)
    assert back.completions
    for server in (back, servers[1]):
        server.shutdown()
        server.server_close()
    with pytest.raises(DataError, match="start the server first"):
        engine.begin(None)


def test_one_of_two_servers_with_old_weights_is_named(loaded: Any, tmp_path: Path, engines: list[VllmEngine]) -> None:
    servers = [FakeServer(loaded.folder, fault=fault).start() for fault in ("", "deaf")]
    engine = open_vllm(loaded, tmp_path, engines, base_urls=[s.url for s in servers], reload="http")
    engine.begin(None)
    with torch.no_grad():
        loaded.model.w.fill_(0.15)
    with pytest.raises(DataError, match=f"the server at {servers[1].url} serves other weights"):
        engine.begin(None)


def test_a_bad_request_is_an_error_at_once(loaded: Any, tmp_path: Path, engines: list[VllmEngine]) -> None:
    server = FakeServer(loaded.folder).start()
    engine = open_vllm(loaded, tmp_path, engines, base_urls=[server.url])
    engine.begin(None)
    server.answers.append((400, {}))
    with pytest.raises(DataError, match="answered 400"):
        run_all(engine, requests_of([3]))


def test_prompts_longer_than_the_context_come_back_named(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine]
) -> None:
    server = FakeServer(loaded.folder).start()
    engine = open_vllm(loaded, tmp_path, engines, base_urls=[server.url])
    engine.begin(None)
    found = {c.prompt_id: c for c in run_all(engine, requests_of([20, 18, 3]))}
    assert found["p0"].finish_reason == "prompt_too_long" and found["p0"].token_ids == ()
    assert len(found["p1"].token_ids) <= 2


def test_what_is_sent(loaded: Any, tmp_path: Path, engines: list[VllmEngine]) -> None:
    server = FakeServer(loaded.folder).start()
    engine = open_vllm(loaded, tmp_path, engines, base_urls=[server.url])
    engine.begin(None)
    decoding = Decoding(
        temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, max_new_tokens=9, stop=("X",), eos_token_ids=(EOS,)
    )
    request = requests_of([3])[0]
    long = next(s for s in range(1000) if s % 9 == 6)
    completion = run_all(engine, [Request("p", "", request.prompt_ids, (0,), (long,))], decoding)[0]
    assert completion.finish_reason == "stop" and completion.token_logprobs is None
    body = server.requests[-1][1]
    wanted = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "max_tokens": 9, "stop": ["X"], "seed": long}
    assert {k: body[k] for k in wanted} == wanted
    assert body["prompt"] == list(request.prompt_ids) and body["model"] == "their-model"
    assert body["stop_token_ids"] == [EOS] and body["ignore_eos"] and body["include_stop_str_in_output"]
    run_all(engine, [request], Decoding(do_sample=False, max_new_tokens=9, top_p=0.5, eos_token_ids=(EOS,)))
    assert server.requests[-1][1]["temperature"] == 0 and server.requests[-1][1]["top_p"] == 1


def test_the_loops_stop_passes_through_a_waiting_crew(loaded: Any, tmp_path: Path, engines: list[VllmEngine]) -> None:
    class Stop(Exception):
        pass

    def heartbeat(num_tokens: int) -> None:
        raise Stop

    server = FakeServer(loaded.folder).start()
    engine = open_vllm(loaded, tmp_path, engines, base_urls=[server.url])
    engine.begin(None)
    engine.heartbeat = heartbeat
    with pytest.raises(Stop):
        run_all(engine, requests_of([3], samples=50))
