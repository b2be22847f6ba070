"""`isft verify`: read every byte of a run that a checksum vouches for, and say what is wrong. Changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.rundir import jsonl, layout
from iterative_sft_cli.rundir.checkpoint import Checkpoint, load_checkpoint, read_copies
from iterative_sft_cli.rundir.fs import list_names, read_bytes
from iterative_sft_cli.rundir.integrity import Damage, read_document, stamp_bytes
from iterative_sft_cli.rundir.outcome import is_finished, read_outcome
from iterative_sft_cli.rundir.recovery import Marker, read_marker, record_fits
from iterative_sft_cli.rundir.retention import NUM_WITH_STATE
from iterative_sft_cli.rundir.seal import SEAL, SUFFIXES, all_shards, read_shard, shard_names


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be: `path` inside the run. `damage` is False for what a crash leaves and the next start clears up."""

    path: str
    problem: str
    damage: bool = True


def verify(path: Path | str) -> list[Finding]:
    """Every finding about the run at `path`, damage first; none when all is well.

    Raises DataError when there is no run or it is of a newer format, StorageError when the disk cannot be read.
    """
    run = Path(path).expanduser().resolve()
    found = list(_findings(run))
    return sorted(found, key=lambda finding: (not finding.damage, finding.path))


def _findings(run: Path) -> Iterator[Finding]:
    keys = layout.checkpoint_keys(run)
    marker: Marker | None = None
    try:
        marker = read_marker(run)
        if marker is None:
            if not keys:
                raise DataError("there is no run here", where=str(run))
            yield Finding(layout.MARKER, "missing")
    except Damage as damage:
        yield _damaged(run, damage)
    if marker is not None:
        for name in layout.RECORDS:
            if not record_fits(run, marker, name):
                yield Finding(name, "missing" if read_bytes(run / name) is None else "not as it was written")
    yield from _unfinished(run)
    healthy: list[Checkpoint] = []
    for key in keys:
        yield from _checkpoint(run, key, healthy, newest=key in keys[-NUM_WITH_STATE:])
    yield from _logs(run, healthy)
    yield from _shards(run, healthy)
    if (run / layout.OUTCOME).exists():
        try:
            outcome = read_document(run / layout.OUTCOME)
            if outcome.get("code") == 0 and not is_finished(run, outcome):
                yield Finding(layout.OUTCOME, "it says complete, but checkpoints or logs are not those of that moment")
        except Damage as damage:
            yield _damaged(run, damage)
    yield from _quarantine(run)


def _damaged(run: Path, damage: Damage) -> Finding:
    return Finding(damage.path.relative_to(run).as_posix(), damage.problem)


def _unfinished(run: Path) -> Iterator[Finding]:
    folders = [run, run / layout.CHECKPOINTS]
    folders += [run / layout.ROUNDS / name for name in list_names(run / layout.ROUNDS)]
    for folder in folders:
        for name in list_names(folder):
            if layout.is_temp(name):
                yield Finding((folder / name).relative_to(run).as_posix(), "unfinished", damage=False)


def _checkpoint(run: Path, key: str, healthy: list[Checkpoint], *, newest: bool) -> Iterator[Finding]:
    path = run / layout.CHECKPOINTS / key
    try:
        found = load_checkpoint(path, verify=True, with_state=True)
    except Damage as damage:
        yield _damaged(run, damage)
        return
    healthy.append(found)
    if found.manifest["state"] is not None and not found.has_state and newest:
        yield Finding(f"{layout.CHECKPOINTS}/{key}/{layout.STATE_FOLDER}", "missing")
    try:
        files, _ = read_copies(path)
        for file in (layout.LEDGER, layout.STATS):
            if file in files and stamp_bytes(files[file]) != found.log_stamp(Path(file).stem):
                yield Finding(
                    f"{layout.CHECKPOINTS}/{key}/{layout.COPIES}", f"its copy of {file} is not the one recorded"
                )
    except Damage as damage:
        yield _damaged(run, damage)


def _logs(run: Path, healthy: list[Checkpoint]) -> Iterator[Finding]:
    for file in (layout.LEDGER, layout.STATS):
        data = read_bytes(run / file)
        if data is None:
            if healthy:
                yield Finding(file, "missing")
            continue
        for checkpoint in healthy:
            recorded = checkpoint.log_stamp(Path(file).stem)
            if stamp_bytes(data[: recorded.size]) != recorded:
                yield Finding(file, f"not what checkpoint {checkpoint.key} recorded")
                break
        try:
            _, torn = jsonl.split_rows(data)
            if torn:
                yield Finding(file, "the last line is cut off", damage=False)
        except jsonl.BadLine as error:
            yield Finding(file, str(error))


def _shards(run: Path, healthy: list[Checkpoint]) -> Iterator[Finding]:
    removed: set[str] = set()
    for number in list_names(run / layout.ROUNDS):
        folder = run / layout.ROUNDS / number
        if not number.isdigit():
            continue
        sealed = shard_names(folder, "")
        for name in sealed:
            try:
                read_shard(folder, int(number), name)
            except Damage as damage:
                yield _damaged(run, damage)
        for entry in list_names(folder):
            stem = next((entry.removesuffix(suffix) for suffix in (SEAL, *SUFFIXES) if entry.endswith(suffix)), None)
            if stem is None or stem in sealed or layout.is_temp(entry):
                continue
            if not entry.endswith(SEAL):
                yield Finding(f"{layout.ROUNDS}/{number}/{entry}", "a shard without its seal", damage=False)
                continue
            try:
                if read_document(folder / entry).get("removed"):
                    removed.add(f"{number}/{stem}")
                else:
                    yield Finding(f"{layout.ROUNDS}/{number}/{entry}", "a seal without its shard", damage=False)
            except Damage as damage:
                yield _damaged(run, damage)
    for name in sorted(set(_shards_once_there(run, healthy)) - set(all_shards(run)) - removed):
        problem = "missing or torn; it was whole when the newest checkpoint or the outcome was written"
        yield Finding(f"{layout.ROUNDS}/{name}", problem)


def _shards_once_there(run: Path, healthy: list[Checkpoint]) -> Iterator[str]:
    """What the newest checkpoint, and the outcome of a complete run, list."""
    with contextlib.suppress(Damage):
        yield from read_copies(healthy[-1].path)[1] if healthy else []
    outcome = read_outcome(run)
    yield from outcome["shards"] if outcome is not None else []


def _quarantine(run: Path) -> Iterator[Finding]:
    for name in list_names(run / layout.QUARANTINE):
        if name != "reasons.jsonl":
            yield Finding(f"{layout.QUARANTINE}/{name}", "in quarantine (see reasons.jsonl)", damage=False)
