"""Journals: what comes back after a crash, what never does, and when rows are on the device."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from iterative_sft_cli.rundir import RunDir, fs, journal, verify

ROWS = [{"n": 1, "x": 0.1 + 0.2}, {"n": 2, "text": "\u2028"}]


def new_run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "run", config_source=b"a: 1\n", resolved={"a": 1}, environment={})


def filled(run: RunDir) -> Path:
    kept = run.journal(1, "generated-00000", "key")
    assert kept.rows == []
    for row in ROWS:
        kept.append(row)
    kept.close()
    return run.path / "rounds/0001/generated-00000.journal"


def test_rows_come_back_for_the_same_work_only(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        path = filled(run)
    with RunDir.open(tmp_path / "run") as run:
        again = run.journal(1, "generated-00000", "key")
        assert again.rows == ROWS
        again.close()
        other = run.journal(1, "generated-00000", "other work")
        other.close()
        assert other.rows == [] and path.exists()
        assert [where for where, _ in run.quarantined] == ["rounds/0001/generated-00000.journal"]
        third = run.journal(1, "generated-00000", "other work")
        third.close()
        assert third.rows == []
    assert not any(one.damage for one in verify(tmp_path / "run"))


@pytest.mark.parametrize(("damage", "left"), [("torn", ROWS[:1]), ("flipped", ROWS[1:]), ("head", [])])
def test_a_damaged_row_is_made_again(tmp_path: Path, damage: str, left: list[dict[str, object]]) -> None:
    with new_run(tmp_path) as run:
        path = filled(run)
    data = path.read_bytes()
    if damage == "torn":
        path.write_bytes(data[:-5])
    elif damage == "flipped":
        path.write_bytes(data.replace(b'"n":1', b'"n":3'))
    else:
        path.write_bytes(data[5:])
    with RunDir.open(tmp_path / "run") as run:
        kept = run.journal(1, "generated-00000", "key")
        assert kept.rows == left
        kept.append({"n": 9})
        kept.close()
        again = run.journal(1, "generated-00000", "key")
        again.close()
        assert again.rows == [*left, {"n": 9}]


def test_sealing_the_shard_ends_its_journal(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        path = filled(run)
        left_behind = path.read_bytes()
        run.shards.seal(1, "generated-00000", ROWS, {})
        assert not path.exists()
        path.write_bytes(left_behind)
        other = path.with_name("generated-00001.journal")
        other.write_bytes(left_behind)
    with RunDir.open(tmp_path / "run"):
        assert not path.exists() and other.exists()


def test_rows_are_on_the_device_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(fs, "hook", lambda op: synced.append(op.label) if op.kind == "fsync" else None)
    with new_run(tmp_path) as run:
        kept = run.journal(1, "generated-00000", "key")
        del synced[:]
        kept.append(ROWS[0])
        kept.tick()
        assert synced == [], "a sync for each row would wait for the disk each time"
        late = time.monotonic() + journal.SYNC_S
        monkeypatch.setattr(journal.time, "monotonic", lambda: late)
        kept.tick()
        assert synced == ["journal.data"]
        kept.tick()
        assert synced == ["journal.data"], "nothing new"
        kept.append(ROWS[1])
        kept.close()
        assert synced == ["journal.data"] * 2
