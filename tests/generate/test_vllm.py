"""The vLLM engine against a stand-in server: every sample once, the right weights proven, and what happens when things break."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_vllm import EOS, VOCAB, FakeServer, completion_of, logprob
from helpers_generate import requests_of

from iterative_sft_cli.config import GenerateConfig
from iterative_sft_cli.errors import DataError
from iterative_sft_cli.generate import open_engine, vllm_server
from iterative_sft_cli.generate.vllm import VllmEngine
from iterative_sft_cli.types import Completion, Decoding, Request

DECODING = Decoding(max_new_tokens=6, eos_token_ids=(EOS,), keep_logprobs=True)


class Unigram(torch.nn.Module):
    """The fake server's model."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        logits = self.w * (torch.arange(VOCAB) % 7).float()
        return SimpleNamespace(logits=logits.expand(*input_ids.shape, -1))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    base = tmp_path / "base"
    base.mkdir()
    (base / "w.json").write_text('{"w": 0.1}')
    model = SimpleNamespace(
        model=Unigram(0.1), device="cpu", compute_dtype=torch.float32, context_length=20, folder=base, has_adapter=False
    )

    def save(what: Any, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "w.json").write_text(json.dumps({"w": what.model.w.item()}))
        if what.has_adapter:
            (folder / "adapter_config.json").write_text('{"r": 4}')

    monkeypatch.setattr("iterative_sft_cli.model.save_pretrained", save)
    return model


@pytest.fixture
def engines() -> Iterator[list[VllmEngine]]:
    opened: list[VllmEngine] = []
    yield opened
    for engine in opened:
        engine.close()


def open_vllm(loaded: Any, tmp_path: Path, engines: list[VllmEngine], **settings: Any) -> VllmEngine:
    keys = {k: settings.pop(k) for k in ("timeout_s", "startup_timeout_s") if k in settings}
    section = GenerateConfig(engine="vllm", vllm=settings, **{"timeout_s": 20.0, "startup_timeout_s": 20.0, **keys})
    encoder = SimpleNamespace(vocab_size=VOCAB)
    run = tmp_path / "run"
    engine = open_engine(section, loaded=loaded, encoder=encoder, base_dir=tmp_path, run_dir=run, seed=0)
    assert isinstance(engine, VllmEngine)
    engines.append(engine)
    return engine


def fake_python(tmp_path: Path, fault: str = "") -> str:
    """An "interpreter" that runs the stand-in whatever module it is asked for."""
    script = tmp_path / "fake-python"
    fake = Path(__file__).with_name("fake_vllm.py")
    script.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {fake} "$@" {"--fault " + fault if fault else ""}\n')
    script.chmod(0o755)
    return str(script)


def run_all(engine: VllmEngine, requests: list[Request], decoding: Decoding = DECODING) -> list[Completion]:
    completions = list(engine.generate(requests, decoding, engine.plan(requests, decoding)))
    keys = [(c.prompt_id, c.sample_index) for c in completions]
    assert sorted(keys) == sorted((r.prompt_id, k) for r in requests for k in r.sample_indices)
    return completions


def check(completions: list[Completion], requests: list[Request], weight: float = 0.1) -> None:
    by_key = {(c.prompt_id, c.sample_index): c for c in completions}
    for request in requests:
        for index, seed in zip(request.sample_indices, request.seeds, strict=True):
            got = by_key[request.prompt_id, index]
            ids, reason = completion_of(list(request.prompt_ids), seed, DECODING.max_new_tokens)
            assert got.token_ids == tuple(ids)
            assert got.finish_reason == ("eos" if reason == "stop" else "length")
            assert got.token_logprobs == pytest.approx([logprob(weight, t) for t in ids])
            assert got.logprob == pytest.approx(sum(got.token_logprobs or ()))


def test_a_server_is_started_used_given_new_weights_and_ended(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine]
) -> None:
    engine = open_vllm(loaded, tmp_path, engines, python=fake_python(tmp_path), args={"max-num-seqs": 8})
    engine.begin(None)
    requests = requests_of([3, 4, 5], samples=4)
    beats: list[int] = []
    engine.heartbeat = beats.append
    completions = run_all(engine, requests)
    check(completions, requests)
    assert sum(beats) == sum(len(c.token_ids) for c in completions)
    engine.end()
    server = engine._server
    with torch.no_grad():
        loaded.model.w.fill_(0.3)
    engine.begin(None)
    assert engine._server is server and server is not None
    assert list(engine.proof) == [server.address] and engine.proof[server.address] < 1e-6
    check(run_all(engine, requests), requests, weight=0.3)
    assert server is not None and len(list((tmp_path / "run" / "serving").glob("weights-*"))) == 1
    command = server.log.read_text()
    assert "--max-num-seqs 8" in command and "--generation-config vllm" in command
    assert "--no-enable-chunked-prefill" in command, "seeded requests end vLLM's CPU build when a prompt is cut in two"
    engine.close()
    assert not server.running() and not server.healthy()


def test_weights_of_a_folder_are_served(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    best = tmp_path / "best"
    best.mkdir()
    (best / "w.json").write_text('{"w": 0.7}')
    from iterative_sft_cli.generate import torch_probe

    monkeypatch.setattr(
        torch_probe, "folder_logprobs", lambda folder, rows, _: torch_probe.token_logprobs(Unigram(0.7), rows)
    )
    engine = open_vllm(loaded, tmp_path, engines, python=fake_python(tmp_path))
    engine.begin(best)
    requests = requests_of([3])
    check(run_all(engine, requests), requests, weight=0.7)


def test_a_server_killed_in_mid_phase_is_started_again_and_nothing_is_lost_or_twice(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine]
) -> None:
    engine = open_vllm(loaded, tmp_path, engines, python=fake_python(tmp_path, "die_after=7"))
    engine.begin(None)
    first = engine._server
    requests = requests_of([3, 4, 5], samples=10)
    check(run_all(engine, requests), requests)
    assert engine._server is not first


def test_a_server_that_exits_tells_why(loaded: Any, tmp_path: Path, engines: list[VllmEngine]) -> None:
    engine = open_vllm(loaded, tmp_path, engines, python=fake_python(tmp_path, "exit"))
    with pytest.raises(DataError, match=r"exit code 1 before it was ready:\n(.*\n)*no such architecture") as error:
        engine.begin(None)
    assert error.value.exit_code == 4


def test_a_server_that_never_gets_healthy_is_ended(loaded: Any, tmp_path: Path, engines: list[VllmEngine]) -> None:
    python = fake_python(tmp_path, "never_healthy")
    engine = open_vllm(loaded, tmp_path, engines, python=python, startup_timeout_s=1.5)
    with pytest.raises(DataError, match="not ready after 1.5 s"):
        engine.begin(None)
    assert engine._server is not None and not engine._server.running()


def test_an_environment_that_is_not_there(loaded: Any, tmp_path: Path, engines: list[VllmEngine]) -> None:
    engine = open_vllm(loaded, tmp_path, engines, python=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="before it was ready"):
        engine.begin(None)


def test_a_server_that_keeps_the_old_weights_is_refused(loaded: Any, tmp_path: Path, engines: list[VllmEngine]) -> None:
    engine = open_vllm(loaded, tmp_path, engines, python=fake_python(tmp_path, "deaf"))
    engine.begin(None)
    with torch.no_grad():
        loaded.model.w.fill_(0.15)
    with pytest.raises(DataError, match="serves other weights"):
        engine.begin(None)


def test_weights_that_moved_less_than_the_server_rounds_are_not_taken_for_old_ones(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine]
) -> None:
    engine = open_vllm(loaded, tmp_path, engines, python=fake_python(tmp_path, "rounds"))
    engine.begin(None)
    first = engine._server
    with torch.no_grad():
        loaded.model.w.fill_(0.12)
    engine.begin(None)  # it says now what the trainer said before
    assert engine._server is first


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


def test_adapters_are_loaded_by_name(loaded: Any, tmp_path: Path, engines: list[VllmEngine]) -> None:
    loaded.has_adapter = True
    engine = open_vllm(loaded, tmp_path, engines, python=fake_python(tmp_path))
    with torch.no_grad():
        loaded.model.w.fill_(0.4)
    engine.begin(None)
    assert engine._server is not None and "--enable-lora" in engine._server.log.read_text()
    requests = requests_of([3])
    check(run_all(engine, requests), requests, weight=0.4)
    with torch.no_grad():
        loaded.model.w.fill_(0.6)
    engine.begin(None)
    check(run_all(engine, requests), requests, weight=0.6)


def test_a_server_without_adapters_is_an_error_with_its_words(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine]
) -> None:
    loaded.has_adapter = True
    engine = open_vllm(loaded, tmp_path, engines, python=fake_python(tmp_path, "no_adapters"))
    with pytest.raises(DataError, match=r"did not take the adapter: .*answered 400.*LoRA is not enabled"):
        engine.begin(None)


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


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_the_server_ends_with_a_killed_parent(tmp_path: Path) -> None:
    log, pid_file = tmp_path / "log", tmp_path / "pid"
    child = f"import os,time;open({str(pid_file)!r},'w').write(str(os.getpid()));time.sleep(60)"
    code = (
        "import sys,time\nfrom pathlib import Path\n"
        "from iterative_sft_cli.generate.vllm_server import Server\n"
        f"s = Server([sys.executable, '-c', {child!r}], port=1, log=Path({str(log)!r}), environment={{}})\n"
        f"while not Path({str(pid_file)!r}).exists(): time.sleep(0.02)\n"
        "time.sleep(0.1)\nimport os; os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], timeout=30)
    pid = int(pid_file.read_text())
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("the server outlived the process that started it")


def test_arguments_of_the_command_line() -> None:
    settings = GenerateConfig(
        engine="vllm", vllm={"tensor_parallel_size": 2, "max_model_len": 99, "args": {"enforce_eager": True, "x": 3}}
    ).vllm
    command = vllm_server.serve_command(None, Path("m"), port=5, settings=settings, adapter_rank=16, dtype="bfloat16")
    assert command[:3] == ["vllm", "serve", "m"]
    text = " ".join(command)
    for part in ("--enforce-eager", "--x 3", "--max-lora-rank 16", "--max-model-len 99", "--tensor-parallel-size 2"):
        assert part in text
