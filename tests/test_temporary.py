"""Temporary folders: gone when they are cleaned up, when the process ends, and, after a kill, when the next one needs a folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from iterative_sft_cli import temporary
from iterative_sft_cli.temporary import TemporaryFolder

ROOT = Path(__file__).resolve().parent.parent
HOLDER = """
import sys, time
from pathlib import Path
from iterative_sft_cli.temporary import TemporaryFolder
found = TemporaryFolder("test")
Path(found.name, "a").write_text("a")
print(found.name, flush=True)
if "wait" in sys.argv:
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(temporary.tempfile, "tempdir", None)
    monkeypatch.setattr(temporary, "_swept", set())


def holder(*more):
    command = [sys.executable, "-c", HOLDER, *more]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_folder_is_empty_and_goes(tmp_path):
    with TemporaryFolder("test") as name:
        assert Path(name).is_dir() and not list(Path(name).iterdir())
        (Path(name) / "a").write_text("a")
    assert not list(tmp_path.iterdir())
    TemporaryFolder("test")  # nobody keeps it
    assert not list(tmp_path.iterdir())


def test_a_process_that_ends_leaves_nothing(tmp_path):
    process = holder()
    assert process.communicate()[0] and process.returncode == 0
    assert not list(tmp_path.iterdir())


def test_the_next_process_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    left, alive = holder("wait"), holder("wait")
    there = [Path(one.stdout.readline().strip()) for one in (left, alive)]
    left.kill()
    left.wait()
    for name in ("isft-mine", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("a")
    (tmp_path / "isft-link").symlink_to(tmp_path / "other")
    assert there[0].is_dir()
    mine = TemporaryFolder("test")
    assert not there[0].parent.exists() and (there[1] / "a").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["isft-mine", "isft-link", "other", there[1].parent.name, Path(mine.name).parent.name]
    )
    alive.send_signal(signal.SIGKILL)
    alive.wait()


@pytest.mark.parametrize("boot", ["another host's", None])
def test_locks_of_another_kernel_say_nothing(monkeypatch, boot):
    """Where locks are each kernel's own, or there are none, a live folder looks as if nobody held it."""
    alive = holder("wait")
    there = Path(alive.stdout.readline().strip())
    monkeypatch.setattr(temporary.system, "boot_id", lambda: boot)
    monkeypatch.setattr(temporary.system, "try_lock", lambda fd: True)
    TemporaryFolder("test").cleanup()
    assert there.is_dir()
    alive.kill()
    alive.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_leaves_its_parents_folder_alone():
    folder = TemporaryFolder("test")
    pid = os.fork()
    if not pid:
        folder.cleanup()
        os._exit(0)
    os.waitpid(pid, 0)
    assert Path(folder.name).is_dir()
    assert not any(temporary.remove_if_left(path) for path in [Path(folder.name).parent]) and Path(folder.name).is_dir()
    folder.cleanup()
    assert not Path(folder.name).exists()
