"""Two hosts start one run at the same instant, on a file system that does not carry locks between them: one of them has it.

ISFT_LEASE_RACES is the number of races [4].
"""

import os
import signal
import time
from pathlib import Path

import pytest
from rank_helpers import contents
from toy_config import write_toy

RACES = int(os.environ.get("ISFT_LEASE_RACES", "4"))
LEASES = {"ISFT_LOCK": "lease", "ISFT_LEASE_S": "0.2,1.2", "TOY_DELAY_S": "0.01", "WORLD_SIZE": "1"}
pytestmark = pytest.mark.slow


def test_one_of_two_hosts_has_the_run(hosts, tmp_path, said):
    """Every second race is for the run of a host that was killed."""
    apart = tmp_path / "apart.py"
    apart.write_text(
        "from iterative_sft_cli import system\n"
        "system.try_lock = lambda fd: True\n"  # each kernel's locks are its own
        "system.boot_id = lambda: f'boot of {RANK}'\n"
    )
    (folder := tmp_path / "alone").mkdir()
    first, second = hosts.start(folder, "train", str(write_toy(folder)), **LEASES)
    os.kill(second, signal.SIGKILL)
    assert hosts.wait([first, second])[0][0] == 0
    expected = contents(folder / "run")
    won = [0, 0]
    for race in range(RACES):
        (folder := tmp_path / f"race{race}").mkdir()
        config = write_toy(folder)
        if race % 2:
            pids = hosts.start(folder, "train", str(config), before=apart, **LEASES)
            os.kill(pids[1], signal.SIGKILL)
            await_file(folder / "run" / "LEASE")
            os.kill(pids[0], signal.SIGKILL)
            hosts.wait(pids)
        codes = hosts.run(folder, "train", str(config), before=apart, **LEASES)
        text = [(folder / f"rank{rank}.txt").read_text() for rank in range(2)]
        assert sorted(codes) == [0, 4], (race, codes, text)
        winner, loser = codes.index(0), codes.index(4)
        assert "another process is working in this run: pid" in text[loser], text[loser]
        assert f"on {hosts.names[winner]}" in text[loser].rpartition("isft: ")[2], text[loser]
        assert contents(folder / "run") == expected and not (folder / "run" / "LEASE").exists()
        won[winner] += 1
    print(f"{RACES} races of two hosts, won {won[0]} and {won[1]} times, never by both")


def await_file(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)
