"""Retention over random histories of commits, failures, damage and restarts never removes the last checkpoint to go on from."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from crash_base import FailAt, hooked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iterative_sft_cli.errors import StorageError
from iterative_sft_cli.rundir import RunDir
from iterative_sft_cli.rundir.layout import is_partial, parse_key
from iterative_sft_cli.rundir.retention import Policy, kept_keys, stateless_keys

MAX_EXAMPLES = int(os.environ.get("ISFT_RETENTION_HISTORIES", "120"))

events = st.lists(
    st.one_of(
        st.tuples(st.just("round"), st.integers(0, 0)),
        st.tuples(st.just("partial"), st.integers(1, 9)),
        st.tuples(st.just("fail"), st.integers(0, 60)),
        st.tuples(st.just("damage"), st.integers(0, 30)),
        st.tuples(st.just("best"), st.integers(0, 5)),
        st.tuples(st.just("restart"), st.integers(0, 0)),
    ),
    max_size=14,
)
keys = st.sets(
    st.one_of(
        st.integers(0, 12).map(lambda r: f"{r:04d}"),
        st.tuples(st.integers(0, 12), st.integers(1, 99)).map(lambda t: f"{t[0]:04d}-{t[1]:06d}"),
    ),
    min_size=1,
).map(sorted)


rounds_or_none = st.one_of(st.none(), st.integers(0, 12).map(lambda r: f"{r:04d}"))


@given(keys, st.integers(1, 4), rounds_or_none, rounds_or_none)
def test_the_rule_keeps_the_newest_the_best_and_one_to_fall_back_to(
    present: list[str], keep: int, best: str | None, warmup: str | None
) -> None:
    present = sorted(present, key=parse_key)
    policy = Policy(keep, best, (warmup,) if warmup else ())
    kept = kept_keys(present, policy)
    rounds = [key for key in present if not is_partial(key)]
    assert present[-1] in kept
    assert kept == sorted(kept, key=parse_key) and set(kept) <= set(present)
    assert set(rounds[-keep:]) <= set(kept)
    assert {best, warmup} & set(present) <= set(kept)
    if len(present) > 1 and (is_partial(present[-1]) or (keep > 1 and len(rounds) > 1)):
        assert len(kept) >= 2
    assert not set(stateless_keys(kept)) & set(kept[-2:])
    # keeping is stable: what is kept is kept again
    assert kept_keys(kept, policy) == kept


class History:
    """Plays events on a real run directory and knows what must still be there."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.path, self.keep, self.best = folder / "run", keep, None
        self.run = RunDir.create(self.path, config_source=b"", resolved={}, environment={})
        self.run.checkpoints.retain(keep)
        self.damaged: set[str] = set()

    def write(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "state").mkdir()
        (folder / "state" / "masters.safetensors").write_bytes(b"masters")

    def next_key(self, step: int | None) -> str:
        newest = self.run.checkpoints.newest()
        number, at = parse_key(newest.key) if newest else (0, 1 << 40)
        if step is None:
            return f"{number + 1 if at == 1 << 40 else number:04d}"
        return f"{number + 1:04d}-{step:06d}" if at == 1 << 40 else f"{number:04d}-{at + step:06d}"

    def play(self, event: str, number: int) -> None:
        if event in ("round", "partial"):
            self.run.checkpoints.commit(self.next_key(number or None), self.write, {})
        elif event == "fail":
            try:
                with hooked(FailAt(number, 28)):
                    self.run.checkpoints.commit(self.next_key(None), self.write, {})
            except StorageError:
                self.restart()
        elif event == "damage":
            files = sorted(path for path in (self.path / "checkpoints").rglob("*") if path.is_file())
            if files:
                path = files[number % len(files)]
                path.write_bytes(path.read_bytes()[:-1] + b"?")
                if path.name != "run.json":
                    self.damaged.add(path.relative_to(self.path / "checkpoints").parts[0])
        elif event == "best":
            self.best = f"{number:04d}"
            self.run.checkpoints.retain(self.keep, self.best)
        elif event == "restart":
            self.restart()

    def restart(self) -> None:
        self.run.close()
        before = self.run.checkpoints.keys()
        # (a damaged one that was set aside and made again is healthy)
        self.damaged &= {key for key in before if not self.is_healthy(key)}
        healthy = [key for key in before if key not in self.damaged]
        with_state = [key for key in healthy if (self.path / "checkpoints" / key / "state").is_dir()]
        self.run = RunDir.open(self.path)
        newest = self.run.checkpoints.newest()
        assert (newest.key if newest else None) == (with_state[-1] if with_state else None)
        self.run.checkpoints.retain(self.keep, self.best)

    def is_healthy(self, key: str) -> bool:
        folder = self.path / "checkpoints" / key
        return not any(
            path.read_bytes().endswith(b"?") for path in folder.rglob("*") if path.is_file() and path.name != "run.json"
        )

    def check(self) -> None:
        found = self.run.checkpoints.keys()
        newest = self.run.checkpoints.newest()
        if newest is None:
            return
        assert newest.key in found, "the newest is gone"
        assert newest.path.joinpath("state").is_dir()
        if self.best in found:
            assert self.best in kept_keys(found, Policy(self.keep, self.best))


@settings(max_examples=MAX_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(events, st.integers(1, 3))
def test_any_history_keeps_a_checkpoint_to_go_on_from(history: list[tuple[str, int]], keep: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="isft-retain-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        played = History(folder, keep)
        for event, number in history:
            played.play(event, number)
            played.check()
        played.restart()
        played.check()
        played.run.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
