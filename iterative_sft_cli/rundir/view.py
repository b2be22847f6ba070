"""Reading a run at any time: no lock, not one byte changed, while another process may be writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.rundir import layout
from iterative_sft_cli.rundir.checkpoint import Checkpoint, load_checkpoint
from iterative_sft_cli.rundir.fs import TEMP_PREFIX, list_names
from iterative_sft_cli.rundir.integrity import Damage
from iterative_sft_cli.rundir.ledger import read_log, read_loose
from iterative_sft_cli.rundir.outcome import is_finished, read_outcome
from iterative_sft_cli.rundir.recovery import Marker, find_marker, is_half_created, read_record
from iterative_sft_cli.rundir.seal import ShardReader

FOREIGN_BUT_EMPTY = frozenset({"lost+found", ".DS_Store"})
"""What an otherwise empty folder may hold: the file system puts it there."""


class RunView:
    """A run as it stands on the disk. `finished` says whether it is complete, `outcome` how its last start ended."""

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
        return read_record(self.path, layout.CONFIG)

    @property
    def resolved(self) -> dict[str, Any]:
        """The merged config with defaults."""
        return read_resolved(self.path)

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, hardware, seeds and hashes as they were when the run began."""
        return read_environment(self.path)

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


def peek(path: Path | str) -> RunView | None:
    """Look at the run at `path`.

    None when there is none: nothing, an empty folder, or one whose `create` was cut short. Raises DataError for a folder
    that is not a run, a newer format, or a damaged marker that no checkpoint can mend.
    """
    path = resolve_path(path)
    marker, _, _ = find_marker(path)
    if marker is None:
        refuse_foreign(path)
        return None
    return None if is_half_created(path, marker) else RunView(path, marker)


def resolve_path(path: Path | str) -> Path:
    """Where `path` really is: `~` and symbolic links followed."""
    return Path(path).expanduser().resolve()


def refuse_foreign(path: Path) -> None:
    """Raise DataError when a folder holds something and is not a run, nor the beginning of one."""
    if path.exists() and not path.is_dir():
        raise DataError(
            "a file stands where the run directory is to be", where=str(path), hint="choose another output_dir"
        )
    names = [name for name in list_names(path) if name not in FOREIGN_BUT_EMPTY]
    if layout.MARKER in names:
        return
    left_by_us = {layout.LOCK, layout.LEASE, f"{TEMP_PREFIX}{layout.MARKER}"}
    marks = f"{TEMP_PREFIX}{layout.LEASE}."
    other = [name for name in names if name not in left_by_us and not name.startswith(marks)]
    if other:
        raise DataError(
            f"the folder is not empty and is not a run of isft (it holds {other[0]})",
            where=str(path),
            hint="choose another output_dir",
        )


def read_resolved(path: Path) -> dict[str, Any]:
    """The merged config of the run at `path`."""
    tree: dict[str, Any] = yaml.safe_load(read_record(path, layout.RESOLVED))
    return tree


def read_environment(path: Path) -> dict[str, Any]:
    """The recorded environment of the run at `path`."""
    found: dict[str, Any] = json.loads(read_record(path, layout.ENVIRONMENT))
    return found
