"""The vLLM engine against a stand-in server: every sample once, the right weights proven, and what happens when things break."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_generate import requests_of
from vllm_helpers import Unigram, check, fake_python, open_vllm, run_all, server_of

from iterative_sft_cli.config import GenerateConfig
from iterative_sft_cli.errors import DataError
from iterative_sft_cli.generate import vllm_server
from iterative_sft_cli.generate.vllm import VllmEngine


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
    server = server_of(engine)
    with torch.no_grad():
        loaded.model.w.fill_(0.3)
    engine.begin(None)
    assert server_of(engine) is server and server is not None
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
    first = server_of(engine)
    requests = requests_of([3, 4, 5], samples=10)
    check(run_all(engine, requests), requests)
    assert server_of(engine) is not first


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
    assert server_of(engine) is not None and not server_of(engine).running()


def test_an_environment_that_is_not_there(loaded: Any, tmp_path: Path, engines: list[VllmEngine]) -> None:
    engine = open_vllm(loaded, tmp_path, engines, python=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="before it was ready"):
        engine.begin(None)


def test_a_server_that_keeps_the_old_weights_is_started_again_on_the_new(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine]
) -> None:
    engine = open_vllm(loaded, tmp_path, engines, python=fake_python(tmp_path, "deaf"))
    engine.begin(None)
    first = server_of(engine)
    with torch.no_grad():
        loaded.model.w.fill_(0.15)
    engine.begin(None)
    assert first is not None and not first.running() and server_of(engine) is not first
    assert list(engine.proof) == [server_of(engine).address] and max(engine.proof.values()) < 1e-6
    check(run_all(engine, requests := requests_of([3])), requests, weight=0.15)


def test_a_server_that_serves_other_weights_after_a_new_start_too_is_refused(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine]
) -> None:
    engine = open_vllm(loaded, tmp_path, engines, python=fake_python(tmp_path, "wrong"))
    with pytest.raises(DataError, match="serves other weights: .* nats, also after a new start") as error:
        engine.begin(None)
    assert error.value.exit_code == 4
    server = server_of(engine)
    assert server.log.read_text().count("fake vllm") == 2


def test_weights_that_moved_less_than_the_server_rounds_are_not_taken_for_old_ones(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine]
) -> None:
    engine = open_vllm(loaded, tmp_path, engines, python=fake_python(tmp_path, "rounds"))
    engine.begin(None)
    first = server_of(engine)
    with torch.no_grad():
        loaded.model.w.fill_(0.12)
    engine.begin(None)  # it says now what the trainer said before
    assert server_of(engine) is first


def test_adapters_are_loaded_by_name(loaded: Any, tmp_path: Path, engines: list[VllmEngine]) -> None:
    loaded.has_adapter = True
    engine = open_vllm(loaded, tmp_path, engines, python=fake_python(tmp_path))
    with torch.no_grad():
        loaded.model.w.fill_(0.4)
    engine.begin(None)
    assert server_of(engine) is not None and "--enable-lora" in server_of(engine).log.read_text()
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
