"""`isft list` and `isft verify`."""

from __future__ import annotations

import shutil

import pytest
from report_runs import call, call_json


@pytest.fixture
def folder(done, tmp_path):
    """A folder with a good run, one below it, a broken one, and something else."""
    shutil.copytree(done, tmp_path / "runs" / "good")
    shutil.copytree(done, tmp_path / "runs" / "group" / "other")
    shutil.copytree(done, tmp_path / "runs" / "broken")
    for file in (tmp_path / "runs" / "broken").rglob("isft-run.json"):
        file.write_text("{}")
    for file in (tmp_path / "runs" / "broken" / "checkpoints").rglob("run.json"):
        file.unlink()
    (tmp_path / "runs" / "notes").mkdir()
    return tmp_path / "runs"


def test_runs_are_listed_and_a_broken_one_says_so(folder, capsys):
    rows = {row["run"]: row for row in call_json(capsys, "list", folder)}
    assert list(rows) == ["broken", "good", "group/other"]
    assert rows["good"]["state"] == "complete" and rows["good"]["rounds_done"] == 3 and rows["good"]["best_round"] == 3
    assert rows["good"]["start"] < rows["good"]["last"] == rows["good"]["best"]
    assert rows["broken"]["error"] and rows["broken"]["state"] == "unreadable"
    code, out, err = call(capsys, "list", folder)
    assert code == 0 and "group/other" in out and "unreadable" in out and "complete" in out
    assert err.startswith("broken: ") and err.count("\n") == 1


def test_a_folder_without_runs_and_no_folder(tmp_path, capsys):
    code, out, err = call(capsys, "list", tmp_path)
    assert code == 0 and out == "" and "no runs here" in err
    code, _, err = call(capsys, "list", tmp_path / "nowhere")
    assert code == 4 and "no such folder" in err


def test_verify_finds_a_changed_byte_and_a_missing_file(done, folder, capsys):
    code, out, err = call(capsys, "verify", done)
    assert code == 0 and out == "" and "every checksum holds" in err
    assert call_json(capsys, "verify", done) == []
    shard = folder / "good" / "rounds" / "0002" / "generated-00000.jsonl"
    shard.write_bytes(shard.read_bytes().replace(b"answer", b"Answer", 1))
    (folder / "good" / "checkpoints" / "0003" / "model.json").unlink()
    code, out, err = call(capsys, "verify", folder / "good", "--json")
    assert code == 4 and "rounds/0002/generated-00000.jsonl" in out and "checkpoints/0003/model.json" in out
    assert '"damage": true' in out and "damaged" in err
    code, out, _ = call(capsys, "verify", folder / "good")
    assert code == 4 and "SHA-256" in out


def test_what_a_crash_leaves_is_a_note(done, folder, capsys):
    (folder / "good" / "rounds" / "0003" / ".tmp-generated-00001.jsonl").write_text("half")
    code, out, err = call(capsys, "verify", folder / "good")
    assert code == 0 and "note" in out and "unfinished" in out and "none of them damage" in err


def test_verify_without_a_run(tmp_path, capsys):
    code, _, err = call(capsys, "verify", tmp_path)
    assert code == 4 and "no run here" in err
