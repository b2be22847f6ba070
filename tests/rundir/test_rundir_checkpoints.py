"""Commits, retention, overlap with other work, and what a checkpoint answers."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from iterative_sft_cli.errors import DataError, StorageError
from iterative_sft_cli.rundir import RunDir, commit, fs, peek, verify


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    with RunDir.create(tmp_path / "run", config_source=b"a: 1\n", resolved={"a": 1}, environment={}) as run:
        yield run


def writer(text: str = "w", *, state: bool = True) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_text(text)
        if state:
            (folder / "state").mkdir()
            (folder / "state" / "masters.safetensors").write_text(text * 2)

    return write


def states_on_disk(run: RunDir) -> list[str]:
    return [key for key in run.checkpoints.keys() if (run.path / "checkpoints" / key / "state").is_dir()]


def test_a_checkpoint_gives_back_its_state_and_files(run: RunDir) -> None:
    assert run.checkpoints.newest() is None
    run.checkpoints.commit("0001", writer("one"), {"round": 1, "step": None})
    newest = run.checkpoints.newest()
    assert newest is not None and newest.state == {"round": 1, "step": None} and newest.has_state and newest.verified
    assert (newest.path / "model.safetensors").read_text() == "one"
    assert run.checkpoints.verified("0001") == newest
    assert run.checkpoints.verified("0002") is None


def test_the_weights_hash_is_of_the_weights_alone(run: RunDir) -> None:
    hashes = []
    for key, text in [("0001", "a"), ("0002", "b"), ("0003", "a")]:
        run.checkpoints.commit(key, writer(text), {"key": key})
        newest = run.checkpoints.newest()
        assert newest is not None
        hashes.append(newest.weights_hash)
    assert hashes[0] == hashes[2] != hashes[1]


def test_keys_only_grow(run: RunDir) -> None:
    run.checkpoints.commit("0001-000040", writer(), {})
    run.checkpoints.commit("0001", writer(), {})
    for key in ("0001", "0001-000050", "0000"):
        with pytest.raises(DataError, match="not newer"):
            run.checkpoints.commit(key, writer(), {})
    with pytest.raises(ValueError, match="not a checkpoint key"):
        run.checkpoints.commit("../x", writer(), {})


def test_retention_keeps_rounds_best_and_two_states(run: RunDir) -> None:
    run.checkpoints.retain(2, best="0001")
    for number in range(1, 6):
        run.checkpoints.commit(f"{number:04d}", writer(), {})
    assert run.checkpoints.keys() == ["0001", "0004", "0005"]
    assert states_on_disk(run) == ["0004", "0005"]
    # a new best lets the old one go at once
    run.checkpoints.retain(2, best="0005")
    assert run.checkpoints.keys() == ["0004", "0005"]
    assert verify(run.path) == []


def test_nothing_is_removed_before_a_policy_is_set(run: RunDir) -> None:
    for number in range(1, 6):
        run.checkpoints.commit(f"{number:04d}", writer(), {})
    assert len(run.checkpoints.keys()) == 5


def test_saves_inside_a_round_give_way_to_the_round(run: RunDir) -> None:
    run.checkpoints.retain(1)
    seen = []
    for key in ("0001-000010", "0001-000020", "0001-000030", "0001", "0002-000010", "0002-000020"):
        run.checkpoints.commit(key, writer(), {})
        seen.append(run.checkpoints.keys())
    assert seen == [
        ["0001-000010"],
        ["0001-000010", "0001-000020"],
        ["0001-000020", "0001-000030"],
        ["0001"],
        ["0001", "0002-000010"],
        ["0001", "0002-000020"],
    ]


def test_partial_saves_can_be_dropped_by_hand(run: RunDir) -> None:
    for key in ("0001-000010", "0001-000020", "0001-000030"):
        run.checkpoints.commit(key, writer(), {})
    run.checkpoints.drop_partial(1, keep="0001-000020")
    assert run.checkpoints.keys() == ["0001-000020", "0001-000030"]


def test_a_round_without_need_of_state_keeps_none(run: RunDir) -> None:
    run.checkpoints.retain(2, needs_state=False)
    run.checkpoints.commit("0001-000010", writer(), {})
    run.checkpoints.commit("0001", writer(), {})
    assert states_on_disk(run) == []
    path = run.path
    run.close()
    with RunDir.open(path) as again:
        newest = again.checkpoints.newest()
        assert newest is not None and newest.key == "0001" and not newest.has_state


@pytest.mark.skipif(sys.platform == "win32", reason="permission bits")
def test_files_of_a_checkpoint_follow_the_umask(run: RunDir) -> None:
    def write(folder: Path) -> None:
        writer()(folder)
        os.chmod(folder / "model.safetensors", 0o600)

    before = os.umask(0o022)
    try:
        run.checkpoints.commit("0001", write, {})
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (run.path / "checkpoints").rglob("*") if path.is_file()}
    assert modes == {0o644}


def test_links_are_no_part_of_a_checkpoint(run: RunDir) -> None:
    with pytest.raises(DataError, match="plain files"):
        run.checkpoints.commit("0001", lambda folder: (folder / "link").symlink_to("/etc/passwd"), {})
    assert run.checkpoints.keys() == []


def test_a_library_that_meets_a_full_disk_leaves_nothing_behind(run: RunDir) -> None:
    run.checkpoints.commit("0001", writer(), {})

    def write(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise Exception("I/O error: No space left on device (os error 28)")

    with pytest.raises(StorageError, match="more bytes needed"):
        run.checkpoints.commit("0002", write, {})
    assert os.listdir(run.path / "checkpoints") == ["0001"]


def test_a_bug_in_the_writer_stays_a_bug(run: RunDir) -> None:
    with pytest.raises(ZeroDivisionError):
        run.checkpoints.commit("0001", lambda folder: 1 / 0, {})
    assert os.listdir(run.path / "checkpoints") == []


def test_an_overlapped_commit_is_waited_for_before_anything_is_built_on_it(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    gate = threading.Event()

    def hook(op: fs.Op) -> None:
        if op.kind == "fsync_dir" and op.label == "checkpoint.parent":
            gate.wait(5)
        if op.kind == "ack":
            told.append(op.label)

    monkeypatch.setattr(fs, "hook", hook)
    pending = run.checkpoints.commit_async("0001", writer(), {})
    run.ledger.append({"while": "it commits"})
    assert not pending.done
    sealer = threading.Thread(target=lambda: run.shards.seal(2, "generated-00000", [], {}))
    sealer.start()
    time.sleep(0.05)
    assert told == []
    gate.set()
    sealer.join(5)
    assert told == ["checkpoint 0001", "shard 0002/generated-00000"]


def test_what_stops_an_overlapped_commit_is_raised_where_it_is_waited_for(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hook(op: fs.Op) -> None:
        if op.kind == "rename":
            raise OSError(28, "injected")

    monkeypatch.setattr(fs, "hook", hook)
    run.checkpoints.commit_async("0001", writer(), {})
    with pytest.raises(StorageError):
        run.shards.seal(2, "generated-00000", [], {})
    monkeypatch.setattr(fs, "hook", None)
    assert run.checkpoints.newest() is None


def test_the_recorded_length_is_that_of_the_moment_of_the_commit(run: RunDir) -> None:
    run.ledger.append({"n": 1})
    run.checkpoints.commit_async("0001", writer(), {})
    run.ledger.append({"n": 2})
    path = run.path
    run.close()
    with RunDir.open(path) as again:
        assert again.ledger.rows() == [{"n": 1}]
        assert again.quarantined == []


def test_with_the_newest_damaged_the_one_before_it_is_taken(run: RunDir) -> None:
    for number in (1, 2):
        run.ledger.append({"n": number})
        run.checkpoints.commit(f"{number:04d}", writer(), {"n": number})
    path = run.path
    run.close()
    (path / "checkpoints" / "0002" / "state" / "masters.safetensors").write_text("X")
    with RunDir.open(path) as again:
        newest = again.checkpoints.newest()
        assert newest is not None and newest.key == "0001"
        assert again.ledger.rows() == [{"n": 1}]
        assert [moved for moved, _ in again.quarantined] == ["checkpoints/0002"]
        assert "masters.safetensors" in again.quarantined[0][1]
    assert (path / "quarantine" / "000-checkpoints__0002" / "model.safetensors").exists()


def test_checkpoints_without_state_are_passed_over_and_kept(run: RunDir) -> None:
    run.checkpoints.retain(4)
    for number in (1, 2, 3, 4):
        run.checkpoints.commit(f"{number:04d}", writer(), {})
    path = run.path
    run.close()
    for key in ("0003", "0004"):
        (path / "checkpoints" / key / "model.safetensors").write_text("X")
    with RunDir.open(path) as again:
        # training cannot go on from half a checkpoint: it is replayed from the start, over the sealed shards
        assert again.checkpoints.newest() is None
        assert sorted(moved for moved, _ in again.quarantined) == [f"checkpoints/000{n}" for n in (1, 2, 3, 4)]


def test_a_damaged_best_is_none_and_in_quarantine(run: RunDir) -> None:
    run.checkpoints.commit("0001", writer(), {})
    run.checkpoints.commit("0002", writer(), {})
    (run.path / "checkpoints" / "0001" / "model.safetensors").write_text("X")
    assert run.checkpoints.verified("0001") is None
    assert (run.path / "quarantine" / "000-checkpoints__0001").is_dir()


def test_a_reader_needs_no_lock_and_changes_nothing(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    run.checkpoints.commit("0001", writer("one"), {"round": 1})
    run.shards.seal(1, "generated-00000", [{"a": 1}], {"plan": 1})
    monkeypatch.setattr(fs, "hook", lambda op: pytest.fail(f"a reader did {op}"))
    view = peek(run.path)
    assert view is not None and not view.finished and view.newest_key == "0001" and view.rounds == [1]
    assert view.shards.read(1, "generated-00000") == ([{"a": 1}], {"plan": 1})
    assert view.checkpoint("0001", verify=True).state == {"round": 1}
    (run.path / "rounds" / "0001" / "generated-00000.jsonl").write_text('{"a":2}\n')
    with pytest.raises(DataError, match="SHA-256"):
        view.shards.read(1, "generated-00000")
    with pytest.raises(DataError, match="missing"):
        view.checkpoint("0009")


def test_a_huge_log_is_no_longer_copied_into_each_checkpoint(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "MAX_COPY_BYTES", 100)
    run.ledger.append({"text": "x" * 200})
    run.checkpoints.commit("0001", writer(), {})
    assert verify(run.path) == []
    path = run.path
    run.close()
    with RunDir.open(path) as again:
        assert again.ledger.rows() == [{"text": "x" * 200}]
    (path / "ledger.jsonl").write_text("{}")
    with RunDir.open(path) as again:
        assert again.checkpoints.newest() is None


def swap(a: Path, b: Path) -> None:
    aside = a.with_name("aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


@pytest.mark.parametrize(("inner", "state"), [("", True), ("", False), ("state", True)])
def test_folders_that_changed_places_are_noticed(run: RunDir, inner: str, state: bool) -> None:
    for number in (1, 2):
        run.checkpoints.commit(f"{number:04d}", writer(str(number), state=state), {})
    path = run.path
    run.close()
    swap(path / "checkpoints" / "0001" / inner, path / "checkpoints" / "0002" / inner)
    assert len([finding for finding in verify(path) if finding.damage]) >= 2
    with RunDir.open(path) as again:
        assert again.checkpoints.newest() is None


def test_the_optimizer_of_another_run_is_noticed(run: RunDir, tmp_path: Path) -> None:
    run.checkpoints.commit("0001", writer("a"), {})
    with RunDir.create(tmp_path / "other", config_source=b"", resolved={}, environment={}) as other:
        other.checkpoints.commit("0001", writer("b"), {})
        swap(run.path / "checkpoints" / "0001" / "state", other.path / "checkpoints" / "0001" / "state")
    assert [finding.path for finding in verify(run.path)] == ["checkpoints/0001/state/MANIFEST.json"]


def test_parts_that_are_missing_or_of_another_run_are_found(run: RunDir, tmp_path: Path) -> None:
    run.ledger.append({"n": 1})
    run.checkpoints.commit("0001", writer(), {})
    run.checkpoints.commit("0002", writer(), {})
    with RunDir.create(tmp_path / "other", config_source=b"", resolved={}, environment={}) as other:
        other.checkpoints.commit("0001", writer(), {})
        swap(run.path / "checkpoints" / "0001" / "run.json", other.path / "checkpoints" / "0001" / "run.json")
    shutil.rmtree(run.path / "checkpoints" / "0002" / "state")
    found = {finding.path for finding in verify(run.path) if finding.damage}
    assert found == {"checkpoints/0001/run.json", "checkpoints/0002/state"}


def test_with_ledger_and_its_copy_damaged_the_checkpoint_before_is_taken(run: RunDir) -> None:
    for number in (1, 2):
        run.ledger.append({"n": number})
        run.checkpoints.commit(f"{number:04d}", writer(), {})
    path = run.path
    run.close()
    whole = (path / "ledger.jsonl").read_bytes()
    (path / "ledger.jsonl").write_bytes(whole.replace(b"2", b"7"))
    (path / "checkpoints" / "0002" / "run.json").write_text("{}")
    with RunDir.open(path) as again:
        newest = again.checkpoints.newest()
        assert newest is not None and newest.key == "0001"
        assert again.ledger.rows() == [{"n": 1}]


def test_a_damaged_ledger_is_put_back_without_losing_a_step(run: RunDir) -> None:
    run.ledger.append({"n": 1})
    run.checkpoints.commit("0001", writer(), {})
    run.ledger.append({"n": 2})
    run.checkpoints.commit_async("0002", writer(), {})
    run.ledger.append({"n": 3})
    path = run.path
    run.close()
    whole = (path / "ledger.jsonl").read_bytes()
    (path / "ledger.jsonl").write_bytes(whole.replace(b'"n":1', b'"n" 1'))
    with RunDir.open(path) as again:
        newest = again.checkpoints.newest()
        assert newest is not None and newest.key == "0002"
        assert again.ledger.rows() == [{"n": 1}, {"n": 2}]
        assert again.quarantined == [("ledger.jsonl", again.quarantined[0][1])]
        assert "line 1" in again.quarantined[0][1] and "checkpoint 0002" in again.quarantined[0][1]
