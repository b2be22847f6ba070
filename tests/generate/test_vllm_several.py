"""Several vLLM servers that isft starts on one host: shared work, one that dies or lies, and handing the device over."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_generate import requests_of
from vllm_helpers import DECODING, Unigram, check, fake_python, open_vllm, run_all, server_of

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.generate import torch_probe, vllm_host, vllm_weights
from iterative_sft_cli.generate.vllm import VllmEngine
from iterative_sft_cli.generate.vllm_server import LAUNCHER, address_towards
from iterative_sft_cli.rounds.weights import EngineSession


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "journal"
    path.touch()
    monkeypatch.setenv("FAKE_VLLM_JOURNAL", str(path))
    return path


def read(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()]


def move(loaded: Any, weight: float) -> None:
    with torch.no_grad():
        loaded.model.w.fill_(weight)


def count(engine: VllmEngine, number: int, words: str) -> int:
    return int(server_of(engine, number).log.read_text().count(words))


def test_both_make_samples_from_one_copy_of_the_weights(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[Path] = []
    copy = vllm_weights.shutil.copyfile

    def copyfile(source: Path, target: Path) -> Path:
        copied.append(target)
        return copy(source, target)

    monkeypatch.setattr(vllm_weights.shutil, "copyfile", copyfile)
    stage = tmp_path / "stage"
    python = fake_python(tmp_path)
    engine = open_vllm(loaded, tmp_path, engines, python=python, servers=2, stage_to=str(stage))
    for weight in (0.1, 0.15, 0.2):
        move(loaded, weight)
        engine.begin(None)
        requests = requests_of([3, 4, 5], samples=20)
        check(run_all(engine, requests), requests, weight)
        assert len(list(stage.iterdir())) == 1 and len(list((tmp_path / "run" / "serving").iterdir())) == 1
    assert len(engine.proof) == 2 and max(engine.proof.values()) < 1e-6
    assert len(copied) == 3  # w.json, once a time
    assert [server_of(engine, number).log.name for number in range(2)] == ["vllm-server-0.log", "vllm-server-1.log"]
    assert [count(engine, number, "fake vllm") for number in range(2)] == [1, 1]
    engine.close()
    assert not list(stage.iterdir())


def test_the_other_answers_while_one_is_started_again(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_PAUSE_S", "0.01")
    python = fake_python(tmp_path, "die_after=7", only_first=True)
    engine = open_vllm(loaded, tmp_path, engines, python=python, servers=2)
    engine.begin(None)
    before = [server_of(engine, number) for number in range(2)]
    start = vllm_host.HostServers._start
    gate = threading.Event()

    def slow(self: Any, slot: Any, look: Any) -> None:
        assert gate.wait(30), "nothing came of the other server"
        start(self, slot, look)

    monkeypatch.setattr(vllm_host.HostServers, "_start", slow)
    requests = requests_of([3, 4, 5], samples=60)
    made = []
    for completion in engine.generate(requests, DECODING, engine.plan(requests, DECODING)):
        made.append(completion)
        if len(made) == 150:
            gate.set()
    check(made, requests)
    assert len(made) == 180
    while [server_of(engine, number) for number in range(2)] == before:
        time.sleep(0.01)
    assert sum(server_of(engine, number) is before[number] for number in range(2)) == 1


def test_one_that_keeps_old_weights_is_started_again_and_the_other_is_not(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine]
) -> None:
    engine = open_vllm(loaded, tmp_path, engines, python=fake_python(tmp_path, "deaf", only_first=True), servers=2)
    engine.begin(None)
    before = [server_of(engine, number) for number in range(2)]
    move(loaded, 0.15)
    engine.begin(None)
    assert sum(server_of(engine, number) is before[number] for number in range(2)) == 1
    assert len(engine.proof) == 2 and max(engine.proof.values()) < 1e-6
    requests = requests_of([3, 4], samples=20)
    check(run_all(engine, requests), requests, 0.15)


def test_a_server_that_dies_again_and_again_ends_the_run(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine]
) -> None:
    engine = open_vllm(loaded, tmp_path, engines, python=fake_python(tmp_path, "dies=3"))
    engine.begin(None)
    with pytest.raises(DataError, match="ended again and again in one shard") as error:
        run_all(engine, requests_of([3, 4], samples=30))
    assert error.value.exit_code == 4 and count(engine, 0, "fake vllm") == 4


def test_a_restart_that_nobody_waits_for_any_more_starts_nothing(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_vllm(loaded, tmp_path, engines, python=fake_python(tmp_path))
    engine.begin(None)
    host: Any = engine.servers.hosts[0]  # type: ignore[union-attr]
    server_of(engine).stop()
    starts: list[int] = []
    monkeypatch.setattr(host, "_start", lambda slot, look: starts.append(slot.number))
    with pytest.raises(vllm_host.Abandoned):
        host.restart(0, lambda: True)
    assert not starts
    host.restart(0)
    assert starts == [0]


class Trainer:
    """A learner that writes down when it has weights in memory; when they are away nothing can be read of them."""

    def __init__(self, journal: Path, loaded: Any) -> None:
        self.journal, self.loaded = journal, loaded
        self.weight: float | None = None
        self.note("back")

    def note(self, event: str) -> None:
        with open(self.journal, "a") as file:
            file.write(json.dumps({"at": time.time(), "pid": 0, "who": "trainer", "event": event}) + "\n")

    def offload(self) -> None:
        """Only the optimizer goes."""

    def offload_weights(self) -> None:
        if self.weight is None:
            self.weight = self.loaded.model.w.item()
        move(self.loaded, float("nan"))
        self.note("away")

    def reload(self) -> None:
        self.note("back")
        if self.weight is not None:
            move(self.loaded, self.weight)
            self.weight = None


def check_apart(found: list[dict[str, Any]], *, of: int) -> None:
    """Whenever a server is awake the trainer is away; `of` times it was."""
    trainer, awake, times = False, set(), 0
    for row in sorted(found, key=lambda row: row["at"]):
        if row["who"] == "trainer":
            trainer = row["event"] == "back"
            times += not trainer
        elif row["event"] in ("start", "wake"):
            awake.add(row["pid"])
        elif row["event"] in ("stop", "sleep"):
            awake.discard(row["pid"])
        assert not (trainer and awake), row
    assert times == of


@pytest.mark.parametrize("fault", ["", "restless", "die_after=9"])
@pytest.mark.parametrize("adapter", [False, True])
def test_on_a_gpu_they_sleep_before_the_trainer_comes_back(
    loaded: Any,
    tmp_path: Path,
    engines: list[VllmEngine],
    journal: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    adapter: bool,
) -> None:
    """What a sleeping server has served is gone; one that does not sleep is ended; one that dies starts on its own GPU again."""
    loaded.device, loaded.has_adapter = "cuda:0", adapter
    monkeypatch.setattr(vllm_host, "visible_gpus", lambda: ["4", "5", "6", "7"])
    telemetry: list[dict[str, Any]] = []
    python = fake_python(tmp_path, fault, only_first=True)
    engine = open_vllm(loaded, tmp_path, engines, python=python, tensor_parallel_size=2)
    session = EngineSession(engine, Trainer(journal, loaded), telemetry)  # type: ignore[arg-type]
    requests = requests_of([3, 4, 5], samples=20)
    for weight in (0.1, 0.3, 0.5):
        move(loaded, weight)
        session.serve("live", None)
        check(run_all(engine, requests), requests, weight)
        session.close()
    found = read(journal)
    check_apart(found, of=3)
    names = [row["event"] for row in found]
    # one that is being started again when the last sample is there is ended instead
    assert names.count("sleep") in {"": (6,), "restless": (5,), "die_after=9": (5, 6)}[fault]
    assert [row["switch_s"] > 0 for row in telemetry if row["event"] == "switch"] == [True] * 6
    for number, gpus in enumerate(("4,5", "6,7")):
        lines = [line for line in server_of(engine, number).log.read_text().splitlines() if "fake vllm" in line]
        assert len(lines) == 1 or fault  # woken, not started again
        assert lines and all(line.endswith(f"on {gpus}") and "--enable-sleep-mode" in line for line in lines)


def test_weights_that_are_read_once_more_come_back_first(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine], journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sources take turns: the servers stop before the trainer's weights are written again."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "w.json").write_text('{"w": 0.7}')
    monkeypatch.setattr(
        torch_probe, "folder_logprobs", lambda folder, rows, _: torch_probe.token_logprobs(Unigram(0.7), rows)
    )
    engine = open_vllm(loaded, tmp_path, engines, python=fake_python(tmp_path), servers=2, while_training="stop")
    session = EngineSession(engine, Trainer(journal, loaded), [])  # type: ignore[arg-type]
    requests = requests_of([3], samples=4)
    for key, folder, weight in (("live", None, 0.1), ("other", other, 0.7), ("live", None, 0.1)):
        session.serve(key, folder)
        check(run_all(engine, requests), requests, weight)
    session.close()
    check_apart(read(journal), of=3)


def test_sleep_without_a_gpu_is_refused(loaded: Any, tmp_path: Path, engines: list[VllmEngine]) -> None:
    engine = open_vllm(loaded, tmp_path, engines, python=fake_python(tmp_path), while_training="sleep")
    with pytest.raises(ConfigError, match="sleeps only on a GPU"):
        engine.open()


def test_more_gpus_than_there_are(
    loaded: Any, tmp_path: Path, engines: list[VllmEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded.device = "cuda:0"
    monkeypatch.setattr(vllm_host, "visible_gpus", lambda: ["0", "1", "2"])
    engine = open_vllm(loaded, tmp_path, engines, python=fake_python(tmp_path), tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="3 visible GPUs on .* cannot be shared out among servers of 2") as error:
        engine.open()
    assert error.value.hint is not None and "generate.vllm.servers" in error.value.hint


def test_what_a_launcher_set_does_not_reach_a_server() -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "GROUP_RANK"]
    assert all(LAUNCHER.fullmatch(name) for name in names)
    assert not any(LAUNCHER.fullmatch(name) for name in ("PATH", "NCCL_SOCKET_IFNAME", "RANKS", "VLLM_PORT"))


def test_the_address_towards_a_host() -> None:
    assert address_towards("127.0.0.1", 1) == "127.0.0.1"
    with pytest.raises(DataError, match="no interface of"):
        address_towards("no.such.host.invalid", 1)
