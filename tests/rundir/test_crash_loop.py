"""The real loop, stopped anywhere: a sample of what `scripts/crash-test loop tiny` does in full."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import crash_corrupt
import crash_kill
import crash_loop
import crash_power
import pytest
from crash_base import Subject

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals, fork and POSIX renames")


@pytest.fixture
def base() -> Iterator[Path]:
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    path = Path(tempfile.mkdtemp(prefix="isft-crash-", dir=memory))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def subject(base: Path) -> Subject:
    return crash_loop.loop_subject(base / "experiment", base / "disk" / "run")


def test_the_loop_killed_at_any_operation_ends_with_the_same_bytes(base: Path, subject: Subject) -> None:
    tally = crash_kill.kill_every_op(base / "disk", every=29, kills=2, subject=subject)
    assert tally.wrong == [] and tally.trials >= 8


def test_the_loop_refused_an_operation_stops_with_exit_4_and_goes_on(base: Path, subject: Subject) -> None:
    tally = crash_kill.fail_every_op(base / "disk", every=173, subject=subject)
    assert tally.wrong == [] and tally.trials >= 8


def test_the_loop_after_a_power_cut_loses_nothing(base: Path, subject: Subject) -> None:
    tally = crash_power.power_loss(base / "disk", limit=15, every=11, subject=subject)
    assert tally.wrong == [] and tally.trials == 15


def test_the_loop_finds_damage_before_it_uses_it(base: Path, subject: Subject) -> None:
    trials = {"bit flip": 20, "deleted": 20}
    tally = crash_corrupt.damage_files(base / "disk", trials=trials, swaps=6, subject=subject, stop_after="0002-000002")
    assert tally.wrong == [] and tally.counts["mended"] >= 20


@pytest.mark.slow
def test_training_a_tiny_model_killed_at_random_instants_ends_with_the_same_bytes(base: Path) -> None:
    import crash_fork
    import crash_tiny

    subject = crash_tiny.tiny_subject(base / "tiny", base / "disk" / "run")
    tally = crash_fork.kill_children(subject, base / "disk", runs=6, kills=2)
    assert tally.wrong == [] and tally.trials == 6


@pytest.mark.slow
def test_training_on_a_full_disk_is_exit_4_and_goes_on_when_there_is_room(base: Path) -> None:
    import crash_disk

    tally = crash_disk.real_run(base / "disk", base / "real")
    if tally is None:
        pytest.skip("this user may not mount a small disk")
    assert tally.wrong == [] and tally.counts == {"exit 4": 3, "exit 0": 1}
