"""The lease that holds a run where locks may not reach other hosts: one winner, takeover of the dead, and a holder that was given up ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.rundir.fs import FileSystem
from iterative_sft_cli.rundir.lease import Lease, file_system_of, lock_is_enough
from iterative_sft_cli.rundir.lock import RunLock

ROOT = Path(__file__).resolve().parents[2]
ME = {"pid": 7, "host": "here", "since": "now"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("ISFT_LEASE_S", "0.2,1.2")


def take(path: Path, gone: bool = False) -> Lease:
    return Lease(path, FileSystem(), ME, is_gone=lambda holder: gone)


def test_a_lease_is_renewed_and_given_back(tmp_path):
    path = tmp_path / "LEASE"
    lease = take(path)
    time.sleep(0.7)
    assert json.loads(path.read_text())["renewals"] >= 2
    lease.close()
    assert not path.exists()


def test_the_second_is_told_who_has_it(tmp_path):
    lease = take(tmp_path / "LEASE")
    with pytest.raises(DataError, match="pid 7 on here since now"):
        take(tmp_path / "LEASE")
    lease.close()


@pytest.mark.parametrize("text", ['{"token": "abc", "pid": 1, "host": "far"}\n', "", "not json"])
def test_a_lease_that_nobody_renews_is_taken_over(tmp_path, text, capsys):
    path = tmp_path / "LEASE"
    path.write_text(text)
    begun = time.monotonic()
    lease = take(path)
    assert 1.1 < time.monotonic() - begun < 4
    assert lease.is_ours() and "watching" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["LEASE"]
    lease.close()


def test_a_holder_of_this_kernel_that_has_gone_is_not_waited_for(tmp_path):
    (tmp_path / "LEASE").write_text('{"token": "abc"}')
    begun = time.monotonic()
    take(tmp_path / "LEASE", gone=True).close()
    assert time.monotonic() - begun < 1


def test_a_mark_that_a_dead_taker_left_is_passed_by(tmp_path):
    (tmp_path / "LEASE").write_text('{"token": "abc"}')
    (tmp_path / ".tmp-LEASE.abc.0").write_text("")
    lease = take(tmp_path / "LEASE")
    assert lease.is_ours()
    lease.close()


HOLDER = """
import sys, time
from pathlib import Path
from iterative_sft_cli.rundir.fs import FileSystem
from iterative_sft_cli.rundir.lease import Lease
from iterative_sft_cli.errors import DataError
if len(sys.argv) > 2:
    while time.time() < float(sys.argv[2]):
        pass
try:
    lease = Lease(Path(sys.argv[1]), FileSystem(), {"pid": 1, "host": "a", "since": "b"}, is_gone=lambda one: False)
except DataError:
    print("lost", flush=True)
else:
    print("won", flush=True)
    time.sleep(60)
"""


def holder(path: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), *more], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )


def test_a_holder_that_slept_while_it_was_given_up_ends(tmp_path):
    """What a suspended virtual machine or a cut network does to a holder."""
    process = holder(tmp_path / "LEASE")
    assert process.stdout.readline() == "won\n"
    os.kill(process.pid, signal.SIGSTOP)
    lease = take(tmp_path / "LEASE")
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(10) == 4
    assert lease.is_ours()
    lease.close()


@pytest.mark.parametrize("stale", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_of_several_takers_one_wins(tmp_path, stale):
    for race in range(int(os.environ.get("ISFT_LEASE_RACES", "1"))):
        path = tmp_path / f"LEASE{race}"
        if stale:
            path.write_text('{"token": "abc"}')
        off = str(time.time() + 1.5)
        takers = [holder(path, off) for _ in range(3)]
        said = [taker.stdout.readline().strip() for taker in takers]
        for taker in takers:
            taker.kill()
            taker.wait()
        assert sorted(said) == ["lost", "lost", "won"], race


MOUNTS = """\
22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/root rw
40 22 0:35 / /home rw,relatime shared:2 - nfs4 server:/home rw
41 40 0:36 / /home/scratch rw shared:3 - xfs /dev/sdb rw
42 22 0:37 / /my\\040data rw - fuse.sshfs host:/ rw
"""


def test_file_systems_by_mount_point():
    for path, kind in [
        ("/x", "ext4"),
        ("/home/me", "nfs4"),
        ("/home/scratch/run", "xfs"),
        ("/my data/r", "fuse.sshfs"),
    ]:
        assert file_system_of(Path(path), MOUNTS) == kind
    assert file_system_of(Path("/homes"), MOUNTS) == "ext4"


def test_a_lease_is_held_only_where_the_lock_is_not_enough(tmp_path, monkeypatch):
    assert lock_is_enough(tmp_path)
    lock = RunLock(tmp_path / "LOCK", FileSystem())
    assert not (tmp_path / "LEASE").exists()
    lock.close()
    monkeypatch.setenv("ISFT_LOCK", "lease")
    lock = RunLock(tmp_path / "LOCK", FileSystem())
    assert json.loads((tmp_path / "LEASE").read_text())["pid"] == os.getpid()
    with pytest.raises(DataError, match=f"pid {os.getpid()}"):
        RunLock(tmp_path / "LOCK", FileSystem())
    lock.close()
    assert not (tmp_path / "LEASE").exists()


def test_a_file_system_without_locks_has_the_lease(tmp_path, monkeypatch):
    monkeypatch.setenv("ISFT_LOCK", "lease")

    def refuse(fd):
        raise OSError(37, "no locks available")

    monkeypatch.setattr("iterative_sft_cli.system.try_lock", refuse)
    first = RunLock(tmp_path / "LOCK", FileSystem())
    other = {"pid": 9, "host": "b", "since": "c"}
    with pytest.raises(DataError, match="another process"):
        Lease(tmp_path / "LEASE", FileSystem(), other, is_gone=lambda holder: False)
    first.close()
    monkeypatch.setenv("ISFT_LOCK", "flock")
    with pytest.raises(OSError, match="no locks"):
        RunLock(tmp_path / "LOCK", FileSystem())
