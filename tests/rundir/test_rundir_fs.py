"""The file layer: short writes, links in the way, failed syncs, messages."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

import pytest

from iterative_sft_cli.errors import StorageError
from iterative_sft_cli.rundir import fs, require_space


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fs, "hook", lambda op: 3 if op.kind == "write" else None)
    fs.FileSystem().create(tmp_path / "x", b"0123456789", sync="label")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_links_are_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "link").symlink_to(victim)
    files = fs.FileSystem()
    with pytest.raises(StorageError):
        files.create(tmp_path / "link", b"theirs", sync=None)
    with pytest.raises(StorageError, match="symbolic link"):
        files.open_append(tmp_path / "link")
    with pytest.raises(StorageError, match="symbolic link"):
        fs.read_bytes(tmp_path / "link")
    assert victim.read_text() == "mine"


def test_removing_a_folder_removes_links_in_it_and_not_where_they_lead(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x").write_text("mine")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "link").symlink_to(tmp_path / "kept")
    fs.FileSystem().remove(tmp_path / "gone")
    assert (tmp_path / "kept" / "x").read_text() == "mine" and not (tmp_path / "gone").exists()


@pytest.mark.parametrize("kind", ["fsync", "fsync_dir"])
def test_nothing_is_written_after_a_failed_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def refuse(op: fs.Op) -> None:
        if op.kind == kind:
            raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(fs, "hook", refuse)
    files = fs.FileSystem()
    with pytest.raises(StorageError):
        files.publish(tmp_path / "a", b"1", data_label="l", dir_label="l")
    monkeypatch.setattr(fs, "hook", None)
    before = sorted(os.listdir(tmp_path))
    for again in (
        lambda: files.create(tmp_path / "b", b"2", sync="l"),
        lambda: files.sync_dir(tmp_path, "l"),
        lambda: files.mkdir(tmp_path / "c"),
    ):
        with pytest.raises(StorageError, match="did not confirm"):
            again()
    assert sorted(os.listdir(tmp_path)) == before


def test_a_full_disk_is_told_with_path_bytes_and_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(op: fs.Op) -> None:
        if op.kind == "write":
            raise OSError(errno.ENOSPC, "injected")

    monkeypatch.setattr(fs, "hook", refuse)
    with pytest.raises(StorageError) as caught:
        fs.FileSystem().publish(tmp_path / "a", b"12345", data_label="l", dir_label="l")
    text = caught.value.render()
    assert str(tmp_path) in text and "5 more bytes needed" in text and "free" in text and "same command again" in text
    assert caught.value.exit_code == 4
    assert os.listdir(tmp_path) == []


def test_a_library_that_writes_by_itself_is_understood(tmp_path: Path) -> None:
    error = Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    found = fs.foreign_error(error, tmp_path, 700)
    assert found is not None and "700 more bytes needed" in found.render()
    assert fs.foreign_error(Exception("a bug"), tmp_path) is None
    named = fs.foreign_error(OSError(errno.EROFS, "no", str(tmp_path / "x")), tmp_path)
    assert named is not None and named.where == str(tmp_path / "x")


def test_room_is_asked_for_before_the_work(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(StorageError, match="bytes are needed"):
        require_space(tmp_path / "not" / "yet" / "there", 1 << 60)


@pytest.mark.skipif(sys.platform == "win32", reason="permission bits")
def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        fs.FileSystem().create(tmp_path / "x", b"", sync=None)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_only_the_file_layer_changes_files() -> None:
    """The other modules of the package hold no call that writes, so that the simulator sees everything."""
    package = Path(fs.__file__).parent
    forbidden = ("os.rename", "os.replace", "os.unlink", "os.remove(", "os.rmdir", "os.mkdir", "os.truncate", "os.write(",
                 "shutil.", ".write_text", ".write_bytes", ".mkdir(", ".unlink(", ".rename(", ".touch(", "open(\"w", "os.chmod")  # fmt: skip
    for path in package.glob("*.py"):
        if path.name in ("fs.py", "posix.py", "windows.py"):
            continue
        text = path.read_text().replace("self._fs.", "FS:").replace("fs.", "FS:")
        assert [word for word in forbidden if word in text] == [], path.name
