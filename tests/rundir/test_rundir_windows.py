"""The Windows twin of what the run directory asks of POSIX: the same questions, and a package that imports without POSIX modules."""

import inspect
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from iterative_sft_cli import system
from iterative_sft_cli.system import posix, windows

ROOT = Path(__file__).resolve().parents[2]


def test_the_twins_answer_the_same_questions():
    for name in system.__all__:
        one, other = getattr(posix, name), getattr(windows, name)
        if callable(one):
            assert inspect.signature(one) == inspect.signature(other), name


class Msvcrt(types.ModuleType):
    """Byte-range locks as Windows has them: a locked byte refuses every other descriptor, until it is closed."""

    LK_NBLCK = 2

    def __init__(self):
        super().__init__("msvcrt")
        self.held = {}

    def locking(self, fd, mode, count):
        assert mode == self.LK_NBLCK and count == 1
        place = (os.fstat(fd).st_ino, os.lseek(fd, 0, os.SEEK_CUR))
        if self.held.setdefault(place, fd) != fd:
            raise PermissionError(13, "Permission denied")


@pytest.fixture
def on_windows(monkeypatch):
    fake = Msvcrt()
    monkeypatch.setitem(sys.modules, "msvcrt", fake)
    monkeypatch.setattr(windows.sys, "platform", "win32")
    return fake


def test_the_lock_excludes_and_its_text_can_be_read_and_written(on_windows, tmp_path):
    path = tmp_path / "LOCK"
    first = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(first, b"pid 7")
    assert windows.try_lock(first)
    assert os.lseek(first, 0, os.SEEK_CUR) == 5  # writing goes on where it was
    second = os.open(path, os.O_RDWR)
    assert not windows.try_lock(second)
    assert os.lseek(second, 0, os.SEEK_CUR) == 0 and path.read_bytes() == b"pid 7"
    (_, place), *_ = on_windows.held
    assert place > 1 << 20  # far behind any text
    os.close(first)
    os.close(second)


def test_a_lock_of_a_run_through_the_twin(on_windows, tmp_path, monkeypatch):
    from iterative_sft_cli.errors import DataError
    from iterative_sft_cli.rundir import lock as locking
    from iterative_sft_cli.rundir.fs import FileSystem

    monkeypatch.setattr(locking.system, "try_lock", windows.try_lock)
    monkeypatch.setattr(locking, "PATIENCE_S", 0.0)
    lock = locking.RunLock(tmp_path / "LOCK", FileSystem())
    with pytest.raises(DataError, match=f"pid {os.getpid()}"):
        locking.RunLock(tmp_path / "LOCK", FileSystem())
    lock.close()


def test_a_rename_replaces_a_file_as_the_twin_needs_it(tmp_path):
    """`os.replace` is the one rename of a run directory: `os.rename` would fail on Windows where the target is there."""
    for path in (ROOT / "iterative_sft_cli" / "rundir").glob("*.py"):
        assert "os.rename(" not in path.read_text(encoding="utf-8"), path


def test_calls_that_only_windows_has_say_so_elsewhere():
    for call in (windows.try_lock, windows.process_alive):
        with pytest.raises(NotImplementedError):
            call(1)
    assert windows.boot_id() is None and windows.free_bytes(ROOT) > 0
    windows.sync_directory(ROOT)
    windows.close_in_children(set())


WITHOUT_POSIX = ROOT / "tests" / "without_posix.py"


def isft(*words):
    """The exit code and the output of an `isft` for which nothing of POSIX is there."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(WITHOUT_POSIX), *words], capture_output=True, text=True, env=environ)
    return done.returncode, done.stdout + done.stderr


def test_a_run_leaves_the_same_bytes_where_posix_is_missing(tmp_path):
    """Built-in filters, a plug-in in its worker, a second start, and what reads the run."""
    from toy_config import write_toy

    from iterative_sft_cli.cli import run

    found = {}
    for name in ("here", "there"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mine.py").write_text(
            "def short(sample, most: int = 90):\n    return len(sample.completion) <= most\n"
        )
        path = str(write_toy(folder, {"filters": ["finished", "numeric_answer", "mine.py:short", "dedup"]}))
        for rounds in ("rounds=1", "rounds=3"):
            code, text = isft("train", path, rounds) if name == "there" else (run(["train", path, rounds]), "")
            assert code == 0, text
        files = [one for one in (folder / "run").rglob("*") if one.suffix in (".jsonl", ".npz", ".safetensors")]
        found[name] = {
            str(one.relative_to(folder)): one.read_bytes()
            for one in files
            if not {"telemetry.jsonl", "cache"} & set(one.parts)
        }
    assert found["here"] == found["there"] and len(found["here"]) > 10
    for words in (["verify"], ["samples", "--round", "1"], ["show"]):
        code, text = isft(words[0], str(tmp_path / "there" / "run"), *words[1:])
        assert code == 0, text


def test_the_parts_of_several_ranks_import_where_posix_modules_are_missing():
    code = "import without_posix, sys; sys.argv[1:] = ['--help']; without_posix.main(); import iterative_sft_cli.ranks.start"
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
