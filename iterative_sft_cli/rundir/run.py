"""The run directory: `RunDir` is its one writer, `RunView` reads it at any time without touching it."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from iterative_sft_cli.errors import DataError, StorageError
from iterative_sft_cli.rundir import layout
from iterative_sft_cli.rundir.checkpoint import Checkpoint, load_checkpoint
from iterative_sft_cli.rundir.commit import Checkpoints
from iterative_sft_cli.rundir.fs import TEMP_PREFIX, FileSystem, list_names, read_bytes
from iterative_sft_cli.rundir.integrity import Damage, render_document, stamp_bytes
from iterative_sft_cli.rundir.ledger import AppendLog, Telemetry, read_log, read_loose
from iterative_sft_cli.rundir.lock import RunLock
from iterative_sft_cli.rundir.outcome import is_finished, read_outcome, write_outcome
from iterative_sft_cli.rundir.quarantine import Quarantine
from iterative_sft_cli.rundir.recovery import (
    Marker,
    choose,
    is_half_created,
    mend_marker,
    mend_records,
    parse_marker,
    read_marker,
    settle_log,
    sweep,
)
from iterative_sft_cli.rundir.seal import ShardReader, Shards

FOREIGN_BUT_EMPTY = frozenset({"lost+found", ".DS_Store"})
"""What an otherwise empty folder may hold: the file system puts it there."""


def dump_yaml(tree: Mapping[str, Any]) -> bytes:
    """A merged config as it is stored; reading it back gives an equal tree."""
    text: str = yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=False, width=120)
    return text.encode("ascii")


class RunView:
    """A run as it stands on the disk. Takes no lock and changes nothing."""

    def __init__(self, path: Path, marker: Marker) -> None:
        self.path = path
        self.run_id = marker.run_id
        self.format = marker.format
        self.outcome = read_outcome(path)
        self.finished = is_finished(path, self.outcome)
        self.keys = layout.checkpoint_keys(path)
        self.newest_key = self.keys[-1] if self.keys else None
        self.shards = ShardReader(path)

    @property
    def config_source(self) -> bytes:
        """The user's bytes."""
        return read_bytes(self.path / layout.CONFIG) or b""

    @property
    def resolved(self) -> dict[str, Any]:
        """The merged config with defaults."""
        return _read_resolved(self.path)

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, hardware, seeds and hashes as they were when the run began."""
        return _read_environment(self.path)

    @property
    def rounds(self) -> list[int]:
        """The rounds that have a folder."""
        return layout.round_indices(self.path)

    def ledger_rows(self) -> list[dict[str, Any]]:
        """The ledger, including what is not yet in a checkpoint."""
        return read_log(self.path / layout.LEDGER)

    def stats_rows(self) -> list[dict[str, Any]]:
        """The statistics, including what is not yet in a checkpoint."""
        return read_log(self.path / layout.STATS)

    def telemetry_rows(self) -> list[dict[str, Any]]:
        """The readable rows of the telemetry."""
        return read_loose(self.path / layout.TELEMETRY)

    def checkpoint(self, key: str, *, verify: bool = False) -> Checkpoint:
        """Checkpoint `key`. Raises DataError when it is missing or damaged (with `verify`, down to every byte of the model)."""
        layout.parse_key(key)
        try:
            return load_checkpoint(self.path / layout.CHECKPOINTS / key, verify=verify, with_state=False)
        except Damage as damage:
            raise DataError(damage.problem, where=str(damage.path), hint=f"this run has: {self.keys}") from damage


class RunDir:
    """A run directory held by this process: lock taken, recovered, ready to go on. Use as a context manager."""

    def __init__(self, path: Path, fs: FileSystem, lock: RunLock, marker: Marker, quarantine: Quarantine) -> None:
        """Use `create` or `open`."""
        self.path = path
        self.run_id = marker.run_id
        self._marker = marker
        self._fs = fs
        self._lock = lock
        self._quarantine = quarantine
        with contextlib.ExitStack() as undo:
            self.ledger = AppendLog(path / layout.LEDGER, fs)
            undo.callback(self.ledger.close)
            self.stats = AppendLog(path / layout.STATS, fs)
            undo.pop_all()
        self.telemetry = Telemetry(path / layout.TELEMETRY, fs)
        self.shards = Shards(path, fs, quarantine)
        self.checkpoints: Checkpoints

    @classmethod
    def create(
        cls,
        path: Path | str,
        *,
        config_source: bytes,
        resolved: Mapping[str, Any],
        environment: Mapping[str, Any],
        run_id: str | None = None,
    ) -> RunDir:
        """Begin a run at `path`, a folder that is missing, empty, or was left by a `create` that was cut short.

        Raises DataError when something else is there or another process is in it, StorageError when the disk refuses.
        """
        path = _resolve(path)
        fs = FileSystem()
        _refuse_foreign(path)
        fs.make_dirs(path, "run.parent")
        with contextlib.ExitStack() as undo:
            lock = RunLock(path / layout.LOCK, fs)
            undo.callback(lock.close)
            found = peek(path)
            if found is not None:
                raise DataError("there is a run here already", where=str(path), hint=f"isft resume {path}")
            _refuse_foreign(path)
            sweep(path, fs)
            records = _render_records(config_source, resolved, environment)
            marker = Marker(
                layout.FORMAT,
                run_id or uuid.uuid4().hex,
                {name: [stamp_bytes(data)] for name, data in records.items()},
            )
            fs.publish(
                path / layout.MARKER,
                render_document(marker.to_json()),
                data_label="marker.data",
                dir_label="marker.dir",
            )
            for name, data in records.items():
                fs.publish(path / name, data, data_label="record.data", dir_label=None)
            for name in (layout.ROUNDS, layout.CHECKPOINTS):
                if not (path / name).is_dir():
                    fs.mkdir(path / name)
            run = cls._start(path, fs, lock, marker, None)
            undo.callback(run._close_files)
            fs.sync_dir(path, "run.dir")
            undo.pop_all()
        return run

    @classmethod
    def open(cls, path: Path | str) -> RunDir:
        """Take the lock of the run at `path` and bring it back to its newest good checkpoint.

        Raises DataError when there is no run, it is of a newer format, another process is in it, or it is damaged beyond
        its copies; StorageError when the disk refuses.
        """
        path = _resolve(path)
        fs = FileSystem()
        _check_marker(path)
        with contextlib.ExitStack() as undo:
            lock = RunLock(path / layout.LOCK, fs)
            undo.callback(lock.close)
            quarantine = Quarantine(path, fs)
            marker = mend_marker(path, fs, quarantine)
            mend_records(path, fs, quarantine, marker)
            for name in (layout.ROUNDS, layout.CHECKPOINTS):
                fs.make_dirs(path / name, "run.dir")
            sweep(path, fs)
            newest = choose(path, quarantine)
            for file in (layout.LEDGER, layout.STATS):
                settle_log(path, fs, quarantine, file, newest)
            if (path / layout.OUTCOME).exists():
                fs.unlink(path / layout.OUTCOME)
            run = cls._start(path, fs, lock, marker, newest, quarantine)
            undo.pop_all()
        return run

    @classmethod
    def _start(
        cls,
        path: Path,
        fs: FileSystem,
        lock: RunLock,
        marker: Marker,
        newest: Checkpoint | None,
        quarantine: Quarantine | None = None,
    ) -> RunDir:
        run = cls(path, fs, lock, marker, quarantine or Quarantine(path, fs))
        run.checkpoints = Checkpoints(path, fs, run._quarantine, run.ledger, run.stats, newest)
        run.shards.before_seal = run.checkpoints.wait
        return run

    @staticmethod
    def peek(path: Path | str) -> RunView | None:
        """See `peek`."""
        return peek(path)

    @property
    def config_source(self) -> bytes:
        """The user's bytes."""
        return read_bytes(self.path / layout.CONFIG) or b""

    @property
    def resolved(self) -> dict[str, Any]:
        """The merged config with defaults."""
        return _read_resolved(self.path)

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, hardware, seeds and hashes as they were when the run began (or `replace_records` was called)."""
        return _read_environment(self.path)

    @property
    def quarantined(self) -> list[tuple[str, str]]:
        """(path in the run, reason) of everything this process has moved to quarantine, recovery included."""
        return list(self._quarantine.moved)

    def replace_records(
        self, *, config_source: bytes, resolved: Mapping[str, Any], environment: Mapping[str, Any]
    ) -> None:
        """Put a changed config (more rounds, say) in place of the one the run began with; after a crash the old or the new file of each is
        there."""
        records = _render_records(config_source, resolved, environment)
        stamps = {}
        for name, data in records.items():
            old = stamp_bytes(read_bytes(self.path / name) or b"")
            new = stamp_bytes(data)
            stamps[name] = [new] if new == old else [new, old]
        self._marker = Marker(self._marker.format, self._marker.run_id, stamps)
        self._fs.publish(
            self.path / layout.MARKER,
            render_document(self._marker.to_json()),
            data_label="marker.data",
            dir_label="marker.dir",
        )
        for name, data in records.items():
            self._fs.publish(self.path / name, data, data_label="record.data", dir_label="record.dir")

    def outcome(self, code: int, reason: str, next_command: str) -> bool:
        """Write `outcome.json`. With code 0 the run is complete from here on and any failure is raised; with another code, which is on its way to
        the user already, a disk that refuses makes the answer False."""
        try:
            newest = self.checkpoints.newest()
            write_outcome(
                self.path,
                self._fs,
                code=code,
                reason=reason,
                next_command=next_command,
                newest=newest,
                ledger=self.ledger,
                stats=self.stats,
            )
        except StorageError:
            if code == 0:
                raise
            return False
        return True

    def quarantine(self, path: Path, reason: str) -> Path:
        """Move a damaged thing inside the run to `quarantine/`, with the reason; returns where it is now."""
        return self._quarantine.move(path, reason)

    def acknowledge(self, what: str) -> None:
        """Tell a test's recorder that `what` has been promised to the user as saved."""
        self._fs.acknowledge(self.path, what)

    def close(self) -> None:
        """Wait for a commit under way, then free the lock. Raises what went wrong in that commit."""
        try:
            self.checkpoints.wait()
        finally:
            self._close_files()
            self._lock.close()

    def _close_files(self) -> None:
        for log in (self.ledger, self.stats, self.telemetry):
            log.close()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except StorageError as second:
            # the first error is the one to tell; the commit's stands beside it
            error.add_note(f"and the commit under way failed: {second}")


def peek(path: Path | str) -> RunView | None:
    """Look at the run at `path` without changing a byte or taking the lock.

    None when there is none: nothing, an empty folder, or one whose `create` was cut short. Raises DataError for a folder
    that is not a run, a newer format, or a damaged marker that no checkpoint can mend.
    """
    path = _resolve(path)
    try:
        marker = read_marker(path)
    except Damage as damage:
        if layout.checkpoint_keys(path):
            marker = _copied_marker(path, damage)
        else:
            raise DataError(
                f"damaged: {damage.problem}", where=str(damage.path), hint="start again in another output_dir"
            ) from damage
    if marker is None:
        if layout.checkpoint_keys(path):
            marker = _copied_marker(path, Damage(path / layout.MARKER, "missing"))
        else:
            _refuse_foreign(path)
            return None
    return None if is_half_created(path, marker) else RunView(path, marker)


def _copied_marker(path: Path, damage: Damage) -> Marker:
    from iterative_sft_cli.rundir.checkpoint import read_copy

    for key in reversed(layout.checkpoint_keys(path)):
        copy = read_copy(path / layout.CHECKPOINTS / key, layout.MARKER)
        if copy is not None:
            return parse_marker(copy, path / layout.MARKER)
    raise DataError(
        f"{damage.problem}, and no checkpoint holds a copy",
        where=str(damage.path),
        hint="put the file back from a backup, or start again in another output_dir",
    ) from damage


def _check_marker(path: Path) -> None:
    if peek(path) is None:
        raise DataError("there is no run here", where=str(path), hint="isft train CONFIG begins one")


def _resolve(path: Path | str) -> Path:
    return Path(path).expanduser().resolve()


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise DataError(
            "a file stands where the run directory is to be", where=str(path), hint="choose another output_dir"
        )
    names = [name for name in list_names(path) if name not in FOREIGN_BUT_EMPTY]
    if layout.MARKER in names:
        return
    left_by_us = {layout.LOCK, f"{TEMP_PREFIX}{layout.MARKER}"}
    other = [name for name in names if name not in left_by_us]
    if other:
        raise DataError(
            f"the folder is not empty and is not a run of isft (it holds {other[0]})",
            where=str(path),
            hint="choose another output_dir",
        )


def _render_records(
    config_source: bytes, resolved: Mapping[str, Any], environment: Mapping[str, Any]
) -> dict[str, bytes]:
    text = json.dumps(environment, indent=1, sort_keys=True, allow_nan=False) + "\n"
    return {
        layout.CONFIG: config_source,
        layout.ENVIRONMENT: text.encode("ascii"),
        layout.RESOLVED: dump_yaml(resolved),
    }


def _read_resolved(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(read_bytes(path / layout.RESOLVED) or b"{}")
    return tree


def _read_environment(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(read_bytes(path / layout.ENVIRONMENT) or b"{}")
    return found
