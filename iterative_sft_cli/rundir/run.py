"""The run directory in the hands of its one writer: begun or recovered, locked, ready to go on."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.rundir import layout
from iterative_sft_cli.rundir.checkpoint import Checkpoint, read_copies
from iterative_sft_cli.rundir.commit import Checkpoints
from iterative_sft_cli.rundir.fs import FileSystem, read_bytes
from iterative_sft_cli.rundir.integrity import Damage, render_document, stamp_bytes
from iterative_sft_cli.rundir.journal import Journal
from iterative_sft_cli.rundir.ledger import AppendLog, Telemetry
from iterative_sft_cli.rundir.lock import RunLock
from iterative_sft_cli.rundir.outcome import write_outcome
from iterative_sft_cli.rundir.quarantine import Quarantine
from iterative_sft_cli.rundir.recovery import Marker, choose, mend_marker, mend_records, settle_log, sweep
from iterative_sft_cli.rundir.seal import Shards
from iterative_sft_cli.rundir.view import (
    RunView,
    peek,
    read_environment,
    read_resolved,
    refuse_foreign,
    resolve_path,
)


class RunDir:
    """A run directory held by this process. Use as a context manager; `create` begins one, `open` goes on with one."""

    def __init__(
        self,
        path: Path,
        fs: FileSystem,
        lock: RunLock,
        marker: Marker,
        quarantine: Quarantine,
        newest: Checkpoint | None,
    ) -> None:
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
        if newest is not None:
            self.shards.built_on = layout.parse_key(newest.key)[0]
            with contextlib.suppress(Damage):
                self.shards.expect(read_copies(newest.path)[1])
        self.checkpoints = Checkpoints(path, fs, quarantine, self.ledger, self.stats, self.shards, newest)
        self.shards.before_seal = self.checkpoints.wait

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
        path = resolve_path(path)
        fs = FileSystem()
        refuse_foreign(path)
        fs.make_dirs(path, "run.parent")
        with contextlib.ExitStack() as undo:
            lock = RunLock(path / layout.LOCK, fs)
            undo.callback(lock.close)
            if peek(path) is not None:
                raise DataError("there is a run here already", where=str(path), hint=f"isft resume {path}")
            sweep(path, fs)
            records = {
                layout.CONFIG: config_source,
                layout.RESOLVED: dump_yaml(resolved),
                layout.ENVIRONMENT: dump_json(environment),
            }
            stamps = {name: [stamp_bytes(data)] for name, data in records.items()}
            marker = Marker(layout.FORMAT, run_id or uuid.uuid4().hex, stamps)
            # the marker is durable before anything else is here: without it, what a crash leaves would look like someone else's
            _publish_marker(path, fs, marker)
            for name, data in records.items():
                fs.publish(path / name, data, data_label="record.data", dir_label=None)
            for name in (layout.ROUNDS, layout.CHECKPOINTS):
                if not (path / name).is_dir():
                    fs.mkdir(path / name)
            run = cls(path, fs, lock, marker, Quarantine(path, fs), None)
            undo.callback(run._close_files)
            fs.sync_dir(path, "run.dir")
            undo.pop_all()
        return run

    @classmethod
    def open(cls, path: Path | str) -> RunDir:
        """Take the lock of the run at `path` and bring it back to its newest good checkpoint.

        Raises DataError when there is no run, it is of a newer format (nothing is written then), another process is in it,
        or it is damaged beyond its copies; StorageError when the disk refuses.
        """
        path = resolve_path(path)
        fs = FileSystem()
        if peek(path) is None:
            raise DataError("there is no run here", where=str(path), hint="isft train CONFIG begins one")
        with contextlib.ExitStack() as undo:
            lock = RunLock(path / layout.LOCK, fs)
            undo.callback(lock.close)
            quarantine = Quarantine(path, fs)
            marker = mend_marker(path, fs, quarantine)
            if (path / layout.OUTCOME).exists():
                # gone for good before anything else changes: an outcome never speaks of what came after it
                fs.unlink(path / layout.OUTCOME)
                fs.sync_dir(path, "outcome.gone")
            mend_records(path, fs, quarantine, marker)
            for name in (layout.ROUNDS, layout.CHECKPOINTS):
                fs.make_dirs(path / name, "run.dir")
            sweep(path, fs)
            newest = choose(path, quarantine)
            for file in (layout.LEDGER, layout.STATS):
                settle_log(path, fs, quarantine, file, newest)
            run = cls(path, fs, lock, marker, quarantine, newest)
            undo.callback(run._close_files)
            run.shards.check_rounds(layout.open_round(newest.key if newest else None))
            undo.pop_all()
        return run

    @staticmethod
    def peek(path: Path | str) -> RunView | None:
        """`peek` of `view.py`: the run as a reader sees it, None when there is none."""
        return peek(path)

    @property
    def config_source(self) -> bytes:
        """The user's bytes."""
        return read_bytes(self.path / layout.CONFIG) or b""

    @property
    def resolved(self) -> dict[str, Any]:
        """The merged config with defaults."""
        return read_resolved(self.path)

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, hardware, seeds and hashes, as last written."""
        return read_environment(self.path)

    @property
    def quarantined(self) -> list[tuple[str, str]]:
        """(path in the run, reason) of everything this process has moved to quarantine, recovery included."""
        return list(self._quarantine.moved)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Replace `environment.json`; after a crash the old or the new one is there."""
        self._replace({layout.ENVIRONMENT: dump_json(environment)})

    def write_config(self, config_source: bytes, resolved: Mapping[str, Any]) -> None:
        """Replace `config.yaml` and `resolved.yaml` (more rounds were asked for, say); after a crash each is the old or the new one, the second
        never newer than the first."""
        self._replace({layout.CONFIG: config_source, layout.RESOLVED: dump_yaml(resolved)})

    def _replace(self, records: Mapping[str, bytes]) -> None:
        stamps = dict(self._marker.records)
        for name, data in records.items():
            new, old = stamp_bytes(data), stamp_bytes(read_bytes(self.path / name) or b"")
            stamps[name] = [new] if new == old else [new, old]
        self._marker = Marker(self._marker.format, self.run_id, stamps)
        # the marker first, allowing both: neither file is ever one that it does not know
        _publish_marker(self.path, self._fs, self._marker)
        for name, data in records.items():
            self._fs.publish(self.path / name, data, data_label="record.data", dir_label=None)

    def outcome(self, code: int, reason: str, next_command: str) -> bool:
        """Write `outcome.json`. With code 0 the run is complete from here on and any failure is raised; with another code, which is on its way to
        the user already, a disk that refuses makes the answer False."""
        try:
            write_outcome(
                self.path,
                self._fs,
                code=code,
                reason=reason,
                next_command=next_command,
                newest=self.checkpoints.newest(),
                ledger=self.ledger,
                stats=self.stats,
                shards=self.shards,
            )
        except DataError:
            if code == 0:
                raise
            return False
        return True

    def quarantine(self, path: Path, reason: str) -> Path:
        """Move a damaged thing inside the run to `quarantine/`, with the reason; returns where it is now."""
        return self._quarantine.move(path, reason)

    def journal(self, round_index: int, name: str, key: str) -> Journal:
        """The journal of a shard that is about to be made, with what an earlier process finished of the same work (`key`)."""
        return Journal(self.path, self._fs, self._quarantine, round_index, name, key)

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
        try:
            self.close()
        except Exception as second:
            if error is None:
                raise
            # the first error is the one to tell; the commit's stands beside it
            error.add_note(f"and the commit under way failed: {second}")


def dump_yaml(tree: Mapping[str, Any]) -> bytes:
    """A merged config as it is stored; reading it back gives an equal tree."""
    text: str = yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=False, width=120)
    return text.encode("ascii")


def dump_json(tree: Mapping[str, Any]) -> bytes:
    """The environment as it is stored."""
    return (json.dumps(tree, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def _publish_marker(path: Path, fs: FileSystem, marker: Marker) -> None:
    document = render_document(marker.to_json())
    fs.publish(path / layout.MARKER, document, data_label="marker.data", dir_label="marker.dir")
