"""What hashing and syncing cost is measured where it keeps a thread of the run waiting, once, and never in the background."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from iterative_sft_cli import system
from iterative_sft_cli.rundir import RunDir, cost
from iterative_sft_cli.rundir.cost import CostMeter, blocked_seconds, share_blocked

SLOW_S = 0.03


@pytest.fixture
def slow_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "sync_file", lambda fd: time.sleep(SLOW_S))


def spent(work: object) -> dict[str, float]:
    before = blocked_seconds()
    work()  # type: ignore[operator]
    return {name: value - before[name] for name, value in blocked_seconds().items()}


def test_a_seal_costs_its_two_syncs(tmp_path: Path, slow_sync: None) -> None:
    with RunDir.create(tmp_path / "run", config_source=b"", resolved={}, environment={}) as run:
        found = spent(lambda: run.shards.seal(1, "train", [{"a": 1}], {}))
    assert 2 * SLOW_S <= found["sync_s"] < 4 * SLOW_S
    assert found["wait_s"] == 0


def test_a_commit_in_the_background_costs_only_what_is_waited_for(tmp_path: Path, slow_sync: None) -> None:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"\0" * 100)

    with RunDir.create(tmp_path / "run", config_source=b"", resolved={}, environment={}) as run:
        first = spent(lambda: run.checkpoints.commit("0001", write, {}))
        assert first["sync_s"] > 3 * SLOW_S
        pending = run.checkpoints.commit_async("0002", write, {})
        began = blocked_seconds()
        while not pending.done:
            time.sleep(0.005)
        assert blocked_seconds() == began
        run.checkpoints.commit_async("0003", write, {})
        waited = spent(run.checkpoints.wait)
    assert waited["wait_s"] > 2 * SLOW_S and waited["sync_s"] < SLOW_S


def test_nested_blocks_count_once() -> None:
    def work() -> None:
        with cost.blocking("sync"), cost.blocking("hash"):
            time.sleep(SLOW_S)

    found = spent(work)
    assert found["sync_s"] >= SLOW_S and found["hash_s"] == 0


def test_other_threads_of_the_run_count_too() -> None:
    def work() -> None:
        with cost.blocking("hash"):
            time.sleep(SLOW_S)

    thread = threading.Thread(target=work)
    found = spent(lambda: (thread.start(), thread.join()))
    assert found["hash_s"] >= SLOW_S


def test_rows_tell_what_came_since_the_one_before() -> None:
    meter = CostMeter(time.monotonic() - 1.0)
    first = meter.row()
    with cost.blocking("hash"):
        time.sleep(SLOW_S)
    second = meter.row()
    assert first["wall_s"] >= 1.0 > second["wall_s"] and SLOW_S <= second["hash_s"] < 1.0
    rows = [{"event": "safety", **first}, {"event": "train", "hash_s": 9.0}, {"event": "safety", **second}]
    found = share_blocked(rows)
    assert found is not None and found[1] == pytest.approx(first["wall_s"] + second["wall_s"])
    assert share_blocked([]) is None
