"""The crash suites at the size that fits a developer's minute; `scripts/crash-test` runs all of each."""

from __future__ import annotations

import random
import shutil
import signal
import sys
from pathlib import Path

import crash_corrupt
import crash_disk
import crash_kill
import crash_lock
import crash_power
import crash_process
import pytest
import toy_loop
from crash_base import Tally, empty
from disk_model import Disk

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals, fork and POSIX renames")


@pytest.fixture
def root() -> Path:
    """A folder in memory where there is one: nothing here depends on the device, and syncs cost nothing."""
    import tempfile

    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    path = Path(tempfile.mkdtemp(prefix="isft-crash-", dir=base))
    yield path / "disk"
    shutil.rmtree(path, ignore_errors=True)


def held(tally: Tally, at_least: int) -> None:
    assert tally.wrong == []
    assert tally.trials >= at_least


def test_a_kill_at_any_operation_ends_with_the_same_bytes(root: Path) -> None:
    held(crash_kill.kill_every_op(root, every=5), 80)


def test_four_kills_in_a_row_recovery_included_end_with_the_same_bytes(root: Path) -> None:
    held(crash_kill.kill_every_op(root, every=15, kills=4, seed=1), 25)


def test_a_refused_operation_is_exit_4_with_its_path_and_can_be_resumed(root: Path) -> None:
    held(crash_kill.fail_every_op(root, every=17), 110)


def test_no_power_cut_harms_or_loses_what_was_reported_saved(root: Path) -> None:
    held(crash_power.power_loss(root, limit=200), 200)


def test_no_power_cut_between_two_renames_of_a_shard_looks_like_damage(root: Path) -> None:
    """A disk may keep the later of two renames alone; the shards after a checkpoint are the ones that nothing else tells of."""
    log, gold = crash_power.record(empty(root))
    shown = [at for at, entry in enumerate(log) if entry.kind == "sync" and entry.label == "shard.dir"]
    disk, rng = Disk(log), random.Random(0)
    for at in shown[-3:]:
        for state in disk.states(at, rng=rng, num_random=0, few=True):
            assert crash_power.check_state(state, root, gold) is None


def test_every_sync_is_needed_and_the_simulator_sees_it(root: Path) -> None:
    log, gold = crash_power.record(empty(root))
    labels = crash_power.sync_labels(log)
    assert len(labels) >= 20
    unseen = [
        label for label in labels if crash_power.first_failure_without(label, log, gold, root, limit=600)[1] is None
    ]
    assert unseen == []


def test_recovery_done_twice_or_killed_changes_nothing(root: Path) -> None:
    held(crash_power.recovery_is_idempotent(root, limit=40), 40)


def test_damage_is_found_and_mended_or_named(root: Path) -> None:
    tally = crash_corrupt.damage_files(root, trials=dict.fromkeys(crash_corrupt.KINDS, 40), swaps=30)
    held(tally, 220)
    assert tally.counts["mended"] >= 130


def test_verify_finds_all_damage_to_a_finished_run(root: Path) -> None:
    held(crash_corrupt.damage_finished(root, flips=120, truncations=60), 200)


def test_two_starts_have_one_winner_and_the_loser_is_told(root: Path) -> None:
    held(crash_lock.lock_races(root, races=15), 15)


def test_a_killed_process_goes_on_with_the_same_bytes(root: Path) -> None:
    command = ["toy", str(empty(root) / "run")]
    held(crash_process.kill_operations(command, root / "run", root, points=5, contents=toy_loop.contents), 5)


def test_a_process_killed_at_random_instants_goes_on_with_the_same_bytes(root: Path) -> None:
    command = ["toy", str(empty(root) / "run")]
    tally = crash_process.kill_instants(
        command, root / "run", root, runs=3, kills=2, signals=[signal.SIGKILL], contents=toy_loop.contents
    )
    held(tally, 3)


@pytest.mark.skipif(not crash_process.strace_works(), reason="strace is not there or may not trace")
def test_a_finished_run_makes_no_system_call_that_changes_the_disk(root: Path) -> None:
    held(crash_process.quiet_when_finished(root), 1)


@pytest.mark.skipif(not crash_process.strace_works(), reason="strace is not there or may not trace")
def test_a_kill_inside_a_system_call_ends_with_the_same_bytes(root: Path) -> None:
    held(crash_process.kill_system_calls(root, points=6), 6)


def test_a_full_disk_stops_cleanly_and_the_run_goes_on_when_there_is_room(tmp_path: Path) -> None:
    tally = crash_disk.fill_disk(tmp_path / "small", trials=6)
    if tally is None:
        pytest.skip("this user may not mount a small disk")
    held(tally, 6)
