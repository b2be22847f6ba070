"""The Windows twin of what the run directory asks of POSIX: the same questions, and a package that imports without POSIX modules."""

import inspect
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from iterative_sft_cli.rundir import posix, system, windows

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


WITHOUT_POSIX = """
import asyncio, concurrent.futures, ctypes, importlib.abc, logging.handlers, multiprocessing, signal, socket, subprocess, sys, tempfile
import zoneinfo, pydantic, pydantic.main, pydantic.fields, pydantic_core, rich.console, rich.progress, typer, typer.main, typer.testing, yaml
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in {"fcntl", "resource", "pwd", "grp", "termios", "pty", "posix"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
for name in ("fcntl", "resource", "pwd", "grp", "termios", "pty"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Refuse())
sys.platform = "win32"
import iterative_sft_cli.cli, iterative_sft_cli.commands, iterative_sft_cli.config, iterative_sft_cli.loop
import iterative_sft_cli.experiment, iterative_sft_cli.rundir, iterative_sft_cli.filters, iterative_sft_cli.prompts
import iterative_sft_cli.ranks.start
from iterative_sft_cli.rundir import system
print(system.try_lock.__module__, "iterative_sft_cli.rundir.posix" in sys.modules)
"""


def test_the_package_imports_where_posix_modules_are_missing():
    done = subprocess.run([sys.executable, "-c", WITHOUT_POSIX], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["iterative_sft_cli.rundir.windows", "False"]
