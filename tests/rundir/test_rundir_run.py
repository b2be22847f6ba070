"""Beginning, opening and looking at a run directory; who may, what is refused, and what is put back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_loop
from crash_base import KillAt, Killed, hooked

from iterative_sft_cli.errors import DataError, StorageError
from iterative_sft_cli.rundir import RunDir, fs, peek, verify
from iterative_sft_cli.rundir.integrity import parse_document, render_document

FIXTURE = Path(__file__).parent / "fixtures" / "format-1"
TREE = {"model": {"path": "m"}, "train": {"learning_rate": 2e-5, "note": "no: é\u2028 [x]"}, "rounds": 3, "eval": None}


def begin(path: Path) -> RunDir:
    return RunDir.create(path, config_source=b"model: m\n", resolved=TREE, environment={"seed": 0}, run_id="id")


def no_changes(op: fs.Op) -> None:
    pytest.fail(f"changed the disk: {op}")


def test_what_was_recorded_is_read_back(tmp_path: Path) -> None:
    with begin(tmp_path / "deep" / "er" / "run") as run:
        assert (run.config_source, run.resolved, run.environment, run.run_id) == (
            b"model: m\n",
            TREE,
            {"seed": 0},
            "id",
        )
    view = peek(tmp_path / "deep" / "er" / "run")
    assert view is not None and view.format == 1
    assert (view.config_source, view.resolved, view.environment, view.run_id) == (
        b"model: m\n",
        TREE,
        {"seed": 0},
        "id",
    )


def test_nothing_and_an_empty_folder_are_no_run(tmp_path: Path) -> None:
    assert peek(tmp_path / "missing") is None
    assert peek(tmp_path) is None
    with pytest.raises(DataError, match="no run here"):
        RunDir.open(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["config.yaml", "notes.txt", "LOCKS", ".git"])
def test_a_folder_of_someone_else_is_refused_untouched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    for call in (lambda: begin(tmp_path), lambda: RunDir.open(tmp_path), lambda: peek(tmp_path)):
        with pytest.raises(DataError, match="not empty"):
            call()
    assert os.listdir(tmp_path) == [name]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(DataError, match="a file stands"):
        begin(tmp_path / "run")


def test_the_root_of_a_new_disk_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    begin(tmp_path).close()
    assert peek(tmp_path) is not None


def test_a_run_is_not_begun_twice(tmp_path: Path) -> None:
    begin(tmp_path / "run").close()
    with pytest.raises(DataError, match="a run here already"):
        begin(tmp_path / "run")


def test_a_create_that_was_cut_short_is_no_run_and_can_be_repeated(tmp_path: Path) -> None:
    begin(tmp_path / "run").close()
    (tmp_path / "run" / "resolved.yaml").unlink()
    (tmp_path / "run" / "stats.jsonl").unlink()
    assert peek(tmp_path / "run") is None
    with begin(tmp_path / "run") as run:
        assert run.resolved == TREE


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_a_linked_output_dir_is_resolved_and_locked_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with begin(tmp_path / "link" / "run") as run:
        assert run.path == tmp_path / "real" / "run"
        with pytest.raises(DataError, match=f"pid {os.getpid()} on"):
            RunDir.open(tmp_path / "real" / "run")


def test_a_moved_run_opens(tmp_path: Path) -> None:
    toy_loop.train(tmp_path / "a", 2)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert verify(tmp_path / "b") == []
    toy_loop.train(tmp_path / "b", 3)
    toy_loop.train(tmp_path / "c", 3)
    assert toy_loop.contents(tmp_path / "b") == toy_loop.contents(tmp_path / "c")


def test_a_newer_format_is_refused_without_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_loop.train(tmp_path / "run")
    path = tmp_path / "run" / "isft-run.json"
    content = parse_document(path.read_bytes(), path)
    path.write_bytes(render_document({**content, "format": 2, "unknown": [1]}))
    monkeypatch.setattr(fs, "hook", no_changes)
    for call in (peek, RunDir.open, verify):
        with pytest.raises(DataError, match="format 2") as caught:
            call(tmp_path / "run")
        assert caught.value.exit_code == 4 and caught.value.hint


def test_the_fixture_of_this_format_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """A run of format 1 that stopped inside round 3: every later version must be able to go on with it."""
    shutil.copytree(FIXTURE, tmp_path / "old")
    assert [finding for finding in verify(tmp_path / "old") if finding.damage] == []
    toy_loop.train(tmp_path / "old")
    toy_loop.train(tmp_path / "new")
    assert toy_loop.contents(tmp_path / "old") == toy_loop.contents(tmp_path / "new")


def test_a_finished_run_is_known_without_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_loop.train(tmp_path / "run")
    monkeypatch.setattr(fs, "hook", no_changes)
    assert toy_loop.train(tmp_path / "run") is None
    view = peek(tmp_path / "run")
    assert view is not None and view.finished and view.outcome is not None and view.outcome["code"] == 0


def test_an_outcome_holds_only_for_what_it_saw(tmp_path: Path) -> None:
    toy_loop.train(tmp_path / "run")
    with (tmp_path / "run" / "ledger.jsonl").open("ab") as file:
        file.write(b'{"more": 1}\n')
    view = peek(tmp_path / "run")
    assert view is not None and not view.finished


def test_an_outcome_does_not_hold_for_a_run_that_lost_its_last_checkpoint(tmp_path: Path) -> None:
    toy_loop.train(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "0003")
    view = peek(tmp_path / "run")
    assert view is not None and not view.finished
    assert [finding.path for finding in verify(tmp_path / "run") if finding.damage] == ["outcome.json"]
    toy_loop.train(tmp_path / "run")
    assert verify(tmp_path / "run") == []


def test_another_outcome_than_complete_is_told_and_forgotten_at_the_next_start(tmp_path: Path) -> None:
    with begin(tmp_path / "run") as run:
        assert run.outcome(3, "min_accepted", "isft train c.yaml")
    view = peek(tmp_path / "run")
    assert view is not None and not view.finished and view.outcome is not None
    assert [view.outcome[key] for key in ("code", "reason", "next_command")] == [3, "min_accepted", "isft train c.yaml"]
    with RunDir.open(tmp_path / "run"):
        assert not (tmp_path / "run" / "outcome.json").exists()


def test_an_outcome_that_cannot_be_written_is_raised_only_for_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(op: fs.Op) -> None:
        if op.kind == "write":
            raise OSError(28, "injected")

    with begin(tmp_path / "run") as run:
        monkeypatch.setattr(fs, "hook", full)
        assert run.outcome(4, "the disk is full", "isft train c.yaml") is False
        with pytest.raises(StorageError):
            run.outcome(0, "complete", "isft show")
        monkeypatch.setattr(fs, "hook", None)


def test_records_are_replaced_whole(tmp_path: Path) -> None:
    with begin(tmp_path / "run") as run:
        run.write_environment({"seed": 0, "torch": "2"})
        run.write_config(b"model: m\nrounds: 4\n", {**TREE, "rounds": 4})
        assert run.environment == {"seed": 0, "torch": "2"} and run.resolved["rounds"] == 4
    assert verify(tmp_path / "run") == []
    with RunDir.open(tmp_path / "run") as run:
        assert run.config_source == b"model: m\nrounds: 4\n"


def test_a_kill_while_records_are_replaced_leaves_each_old_or_new(tmp_path: Path) -> None:
    for at in range(40):
        path = tmp_path / f"run{at}"
        run = begin(path)
        try:
            with hooked(KillAt(at)):
                run.write_config(b"new", {**TREE, "rounds": 4})
            done = True
        except Killed:
            done = False
        run.close()
        assert [finding for finding in verify(path) if finding.damage] == []
        with RunDir.open(path) as again:
            assert again.config_source in (b"model: m\n", b"new") and again.resolved["rounds"] in (3, 4)
            # the config that a resume compares with is never newer than what the user sees
            assert again.resolved["rounds"] == 3 or again.config_source == b"new"
        if done:
            assert at > 8
            return
    pytest.fail("it never came to an end")


@pytest.mark.parametrize("name", ["isft-run.json", "config.yaml", "resolved.yaml", "environment.json"])
def test_a_damaged_record_is_put_back_from_a_checkpoint(tmp_path: Path, name: str) -> None:
    with begin(tmp_path / "run") as run:
        run.checkpoints.commit("0001", lambda folder: None, {})
    path = tmp_path / "run" / name
    good = path.read_bytes()
    path.write_bytes(good[:-3])
    assert [finding.path for finding in verify(tmp_path / "run")] == [name]
    view = peek(tmp_path / "run")
    assert view is not None and (view.resolved, view.environment, view.run_id) == (TREE, {"seed": 0}, "id")
    with RunDir.open(tmp_path / "run") as run:
        assert path.read_bytes() == good and run.resolved == TREE
        assert [moved for moved, _ in run.quarantined] == [name]
    reasons = [
        json.loads(line) for line in (tmp_path / "run" / "quarantine" / "reasons.jsonl").read_text().splitlines()
    ]
    assert reasons[0]["path"] == name and "checkpoint 0001" in reasons[0]["reason"]
    assert (tmp_path / "run" / reasons[0]["moved_to"]).read_bytes() == good[:-3]


def test_a_damaged_record_without_a_copy_is_named(tmp_path: Path) -> None:
    with begin(tmp_path / "run") as run:
        run.shards.seal(1, "generated-00000", [{"a": 1}], {})
    (tmp_path / "run" / "resolved.yaml").write_text("rounds: 9\n")
    with pytest.raises(DataError, match="resolved.yaml: not as it was written") as caught:
        RunDir.open(tmp_path / "run")
    assert caught.value.hint


def test_the_lock_is_free_at_once_after_kill_9_and_a_child_cannot_keep_it(tmp_path: Path) -> None:
    begin(tmp_path / "run").close()
    code = (
        "import os, sys, time; from iterative_sft_cli.rundir import RunDir; run = RunDir.open(sys.argv[1]);"
        "child = os.fork() if hasattr(os, 'fork') else 1;"
        # one write a line, whatever buffering the environment asks for: two processes share this pipe
        "os.write(1, b'held\\n' if child else b'let go\\n'); time.sleep(30)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    told = {holder.stdout.readline() for _ in range(2 if hasattr(os, "fork") else 1)}
    assert "held\n" in told
    begun = time.monotonic()
    with pytest.raises(DataError, match=f"pid {holder.pid} on {socket.gethostname()} since 20"):
        RunDir.open(tmp_path / "run")
    assert time.monotonic() - begun < 2
    if hasattr(signal, "SIGSTOP"):
        holder.send_signal(signal.SIGSTOP)
        with pytest.raises(DataError, match=f"pid {holder.pid}"):
            RunDir.open(tmp_path / "run")
    holder.kill()
    holder.wait()
    RunDir.open(tmp_path / "run").close()


def test_a_fork_closes_no_descriptor_of_others(tmp_path: Path) -> None:
    begin(tmp_path / "run").close()
    RunDir.open(tmp_path / "run").close()
    # the numbers the locks had are free now, and taken by somebody else
    reader, writer = os.pipe()
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    child = os.fork()
    if not child:
        try:
            os.write(writer, b"still open")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    assert os.read(reader, 100) == b"still open"
    os.close(reader)


def test_the_package_imports_nothing_heavy() -> None:
    code = "import iterative_sft_cli.rundir, sys; print([m for m in ('torch', 'numpy', 'pydantic', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
