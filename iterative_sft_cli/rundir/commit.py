"""Committing checkpoints: the rename is the instant at which work becomes history; pruning comes after it.

Order: temporary sibling, files, their sync, manifests, sync of the folders, rename, sync of the parent, acknowledgement,
retention. A crash anywhere leaves the old history or the new one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.rundir import cost, layout
from iterative_sft_cli.rundir.checkpoint import (
    Checkpoint,
    folder_size,
    load_checkpoint,
    render_copies,
    same_mode,
    walk_files,
    walk_folders,
)
from iterative_sft_cli.rundir.fs import TEMP_PREFIX, FileSystem, foreign_error, read_bytes
from iterative_sft_cli.rundir.integrity import Damage, Stamp, render_document, stamp_bytes, stamp_files
from iterative_sft_cli.rundir.layout import CHECKPOINTS, COPIES, MANIFEST, STATE, STATE_FOLDER, parse_key
from iterative_sft_cli.rundir.ledger import AppendLog
from iterative_sft_cli.rundir.quarantine import Quarantine
from iterative_sft_cli.rundir.retention import Policy, kept_keys, stateless_keys
from iterative_sft_cli.rundir.seal import Shards

SMALL_BYTES = 8 << 20
"""Checkpoints under this size are synced file by file, in order."""

MAX_COPY_BYTES = 32 << 20
"""A log that has grown over this is no longer copied into each checkpoint."""

COPIED = (layout.MARKER, *layout.RECORDS)
"""The small files that every checkpoint carries a copy of, beside the two logs."""


class PendingCommit:
    """A commit that is under way; `result` waits for it and raises what went wrong in it."""

    def __init__(self, work: Callable[[], None], *, background: bool) -> None:
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._run, args=(work,), name="isft-commit")
            self._thread.start()
        else:
            work()

    def _run(self, work: Callable[[], None]) -> None:
        cost.enter_background()
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            self._error = error

    @property
    def done(self) -> bool:
        """Whether `result` returns (or raises) at once."""
        return self._thread is None or not self._thread.is_alive()

    def result(self) -> None:
        """Return when the checkpoint is committed. Raises StorageError or whatever else stopped it."""
        if self._thread is not None:
            with cost.blocking("wait"):
                self._thread.join()
        if self._error is not None:
            raise self._error


class Checkpoints:
    """The checkpoints of a run, for its one writer."""

    def __init__(
        self,
        run: Path,
        fs: FileSystem,
        quarantine: Quarantine,
        ledger: AppendLog,
        stats: AppendLog,
        shards: Shards,
        newest: Checkpoint | None,
    ) -> None:
        self._shards = shards
        self._run = run
        self._folder = run / CHECKPOINTS
        self._fs = fs
        self._quarantine = quarantine
        self._logs = {"ledger": ledger, "stats": stats}
        self._newest = newest
        self._policy: Policy | None = None
        self._prune_due = False
        self._needs_state = True
        self._pending: PendingCommit | None = None

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint, verified when the run was opened or written since; None before the first."""
        self.wait()
        return self._newest

    def keys(self) -> list[str]:
        """The keys on the disk, oldest first."""
        self.wait()
        return layout.checkpoint_keys(self._run)

    def verified(self, key: str) -> Checkpoint | None:
        """Checkpoint `key` with every byte of its model hashed; None when it is not there, or was damaged and has been moved to quarantine."""
        self.wait()
        parse_key(key)
        if self._newest is not None and key == self._newest.key:
            return self._newest
        path = self._folder / key
        if not path.is_dir():
            return None
        try:
            return load_checkpoint(path, verify=True, with_state=False)
        except Damage as damage:
            self._quarantine.move(path, f"{damage.path.relative_to(path)}: {damage.problem}")
            return None

    def retain(self, keep: int, best: str | None = None, needs_state: bool = True, also: Sequence[str] = ()) -> None:
        """Set what stays, now and after each later commit: `keep` whole rounds, `best`, and the keys in `also`. Until the first call nothing is removed.

        Without `needs_state` a whole round's `state/` is not kept at all. Raises ValueError for a `keep` under 1.
        """
        self._policy = Policy(keep, best, tuple(also))
        self._needs_state = needs_state
        self._prune_due = True
        if self._pending is None:
            self.wait()

    def drop_partial(self, round_index: int, keep: str | None = None) -> None:
        """Remove the saves inside a round, but for `keep` and the newest checkpoint. (A commit does so by itself for all that is older.)"""
        self.wait()
        spared = {keep, self._newest.key if self._newest else None}
        for key in layout.checkpoint_keys(self._run):
            if layout.is_partial(key) and parse_key(key)[0] == round_index and key not in spared:
                self._drop(self._folder / key, key)

    def commit(
        self, key: str, write: Callable[[Path], None], state: Mapping[str, Any], *, size: int | None = None
    ) -> None:
        """Make `key` the newest checkpoint: `write(folder)` fills an empty folder, with about `size` bytes. On return it survives a power cut.

        Raises StorageError when the disk refuses, DataError when `key` is not newer than the newest, ValueError when it is no key.
        """
        self._start(key, write, state, size, background=False)

    def commit_async(
        self, key: str, write: Callable[[Path], None], state: Mapping[str, Any], *, size: int | None = None
    ) -> PendingCommit:
        """Like `commit`, but return once `write` has: hashing, syncing and the rename go on in a thread.

        The next seal, commit, look at the checkpoints or outcome waits for it, so that nothing is ever built on a
        checkpoint that is not yet there. Logs may be appended to in the meantime.
        """
        return self._start(key, write, state, size, background=True)

    def wait(self) -> None:
        """Return when no commit is under way. Raises what went wrong in it, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        if self._prune_due:
            self._prune_due = False
            self._prune()

    def _start(
        self,
        key: str,
        write: Callable[[Path], None],
        state: Mapping[str, Any],
        size: int | None,
        *,
        background: bool,
    ) -> PendingCommit:
        self.wait()
        place = parse_key(key)
        if self._newest is not None and place <= parse_key(self._newest.key):
            raise DataError(
                f"checkpoint {key} is not newer than {self._newest.key}",
                where=str(self._folder),
                expected="a later key",
            )
        final = self._folder / key
        if final.exists():
            # recovery passed it over; what is to take its place must not be mixed with it
            self._quarantine.move(final, "replaced: it could not be resumed from")
        temp = self._folder / (TEMP_PREFIX + key)
        if temp.exists():
            self._fs.remove(temp)
        self._fs.mkdir(temp)
        try:
            write(temp)
            if not self._needs_state and not layout.is_partial(key) and (temp / STATE_FOLDER).exists():
                self._fs.remove(temp / STATE_FOLDER)
            text = json.dumps(state, indent=1, sort_keys=True, allow_nan=False) + "\n"
            self._fs.create(temp / STATE, text.encode("ascii"), sync=None)
            stamps = {name: log.stamp() for name, log in self._logs.items()}
            self._fs.create(temp / COPIES, self._copies(key), sync=None)
        except Exception as error:
            self._fs.discard(temp)
            needed = size or (folder_size(self._newest.path) if self._newest else None)
            storage = foreign_error(error, temp, needed)
            if storage is not None:
                raise storage from error
            raise
        pending = PendingCommit(lambda: self._finish(key, temp, final, stamps), background=background)
        self._pending = pending if background else None
        return pending

    def _copies(self, key: str) -> bytes:
        names = [*COPIED, *(log.path.name for log in self._logs.values())]
        found = {name: read_bytes(self._run / name) for name in names}
        files = {name: data for name, data in found.items() if data is not None and len(data) <= MAX_COPY_BYTES}
        return render_copies(key, files, self._shards.listed())

    def _finish(self, key: str, temp: Path, final: Path, stamps: Mapping[str, Stamp]) -> None:
        try:
            manifest = self._seal_folder(key, temp, stamps)
        except BaseException:
            self._fs.discard(temp)
            raise
        self._fs.rename(temp, final)
        self._fs.sync_dir(self._folder, "checkpoint.parent")
        self._fs.acknowledge(final, f"checkpoint {key}")
        state = json.loads(read_bytes(final / STATE) or b"{}")
        self._shards.built_on = parse_key(key)[0]
        self._newest = Checkpoint(key, final, state, manifest["state"] is not None, True, manifest)
        self._prune()

    def _seal_folder(self, key: str, temp: Path, stamps: Mapping[str, Stamp]) -> dict[str, Any]:
        for name, log in self._logs.items():
            log.sync(f"{name}.data")
        files = list(walk_files(temp))
        same_mode(self._fs, files, temp / STATE)
        found = self._stamp_and_sync(files)

        listed = {path.relative_to(temp).as_posix(): stamp.to_json() for path, stamp in found.items()}
        inner = {
            name.removeprefix(f"{STATE_FOLDER}/"): entry
            for name, entry in listed.items()
            if name.startswith(f"{STATE_FOLDER}/")
        }
        bound = None
        if (temp / STATE_FOLDER).is_dir():
            data = render_document({"key": key, "files": inner})
            self._fs.create(temp / STATE_FOLDER / MANIFEST, data, sync="checkpoint.manifest")
            bound = stamp_bytes(data).to_json()
        # neither `state/`, which is pruned before the model, nor the copies, which differ from machine to machine
        model = {
            name: entry for name, entry in listed.items() if name != COPIES and not name.startswith(f"{STATE_FOLDER}/")
        }
        manifest = {
            "format": layout.FORMAT,
            "key": key,
            "parent": self._parent(key),
            "files": model,
            "state": bound,
            **{name: stamp.to_json() for name, stamp in stamps.items()},
        }
        self._fs.create(temp / MANIFEST, render_document(manifest), sync="checkpoint.manifest")
        for folder in walk_folders(temp):
            self._fs.sync_dir(folder, "checkpoint.dirs")
        return manifest

    def _stamp_and_sync(self, files: list[Path]) -> dict[Path, Stamp]:
        def sync(path: Path) -> None:
            self._fs.sync_file(path, "checkpoint.data")

        if sum(path.stat().st_size for path in files) < SMALL_BYTES:
            for path in files:
                sync(path)
            return stamp_files(files)
        # the disk writes while the processors hash
        with (
            cost.blocking("sync"),
            ThreadPoolExecutor(4, thread_name_prefix="isft-sync", initializer=cost.enter_background) as pool,
        ):
            syncing = [pool.submit(sync, path) for path in files]
            found = stamp_files(files)
            for one in syncing:
                one.result()
        return found

    def _parent(self, key: str) -> str | None:
        # whole rounds only: whether there was a save inside the round must not show in the manifest
        older = [
            other
            for other in layout.checkpoint_keys(self._run)
            if not layout.is_partial(other) and parse_key(other) < parse_key(key)
        ]
        return older[-1] if older else None

    def _prune(self) -> None:
        if self._policy is None:
            return
        keys = layout.checkpoint_keys(self._run)
        kept = kept_keys(keys, self._policy)
        for key in keys:
            if key not in kept:
                self._drop(self._folder / key, key)
        for key in stateless_keys(kept):
            folder = self._folder / key / STATE_FOLDER
            if folder.is_dir():
                self._drop(folder, f"{key}-{STATE_FOLDER}")

    def _drop(self, path: Path, name: str) -> None:
        # renamed away first: a checkpoint is whole or not there, never half removed
        temp = self._folder / f"{TEMP_PREFIX}prune-{name}"
        if temp.exists():
            self._fs.remove(temp)
        self._fs.rename(path, temp)
        self._fs.sync_dir(self._folder, "prune.dir")
        self._fs.remove(temp)
