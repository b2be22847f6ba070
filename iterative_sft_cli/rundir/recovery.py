"""Bringing a run directory back to its newest good checkpoint; doing it twice, or being killed in it, changes nothing.

Order: marker and records mended from the checkpoints' copies; unfinished things away; the newest checkpoint that verifies
and can be gone on from, everything newer to quarantine; the logs cut to the length it recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.rundir import jsonl, layout
from iterative_sft_cli.rundir.checkpoint import Checkpoint, load_checkpoint, read_copies, read_copy
from iterative_sft_cli.rundir.fs import FileSystem, list_names, read_bytes
from iterative_sft_cli.rundir.integrity import Damage, Stamp, parse_document, stamp_bytes
from iterative_sft_cli.rundir.quarantine import Quarantine
from iterative_sft_cli.rundir.seal import load_shard, shard_names


@dataclass(frozen=True, slots=True)
class Marker:
    """What `isft-run.json` says: the format, the run's id, and which bytes each record may have."""

    format: int
    run_id: str
    records: dict[str, list[Stamp]]

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "format": self.format,
            "run_id": self.run_id,
            "records": {name: [stamp.to_json() for stamp in stamps] for name, stamps in self.records.items()},
        }


def parse_marker(data: bytes | None, path: Path) -> Marker:
    """Read a marker. Raises Damage, or DataError for a newer format (whatever else that may have changed)."""
    content = parse_document(data, path)
    found = content.get("format")
    if not isinstance(found, int) or found < 1:
        raise Damage(path, "it names no format")
    if found > layout.FORMAT:
        raise DataError(
            f"this run directory is of format {found}; this version of isft reads up to {layout.FORMAT}",
            where=str(path),
            hint="use the version of isft that wrote it, or a newer one",
        )
    try:
        records = {name: [Stamp.from_json(stamp) for stamp in content["records"][name]] for name in layout.RECORDS}
        return Marker(found, str(content["run_id"]), records)
    except (KeyError, TypeError, ValueError) as error:
        raise Damage(path, "it lacks a part") from error


def read_marker(run: Path) -> Marker | None:
    """The marker of a run; None when there is none. Raises Damage and DataError as `parse_marker`."""
    path = run / layout.MARKER
    data = read_bytes(path)
    return None if data is None else parse_marker(data, path)


def is_half_created(run: Path, marker: Marker) -> bool:
    """Whether `create` was cut short: a record is missing or torn, and no work has been done."""
    if any(list_names(run / name) for name in (layout.ROUNDS, layout.CHECKPOINTS)):
        return False
    return any(not record_fits(run, marker, name) for name in layout.RECORDS)


def record_fits(run: Path, marker: Marker, name: str) -> bool:
    """Whether a record's bytes are among those the marker names."""
    data = read_bytes(run / name)
    return data is not None and stamp_bytes(data) in marker.records[name]


def read_record(run: Path, name: str) -> bytes:
    """A record's bytes, or while it is damaged the copy that the next start will put back. Raises DataError when there is none."""
    marker = find_marker(run)[0]
    data = read_bytes(run / name)
    if marker is None or (data is not None and stamp_bytes(data) in marker.records[name]):
        return data or b""
    copy = _fitting_copy(run, marker, name)
    if copy is None:
        raise _lost_record(run, name)
    return copy[1]


def _fitting_copy(run: Path, marker: Marker, name: str) -> tuple[str, bytes] | None:
    for key in reversed(layout.checkpoint_keys(run)):
        copy = read_copy(run / layout.CHECKPOINTS / key, name)
        if copy is not None and stamp_bytes(copy) in marker.records[name]:
            return key, copy
    return None


def _lost_record(run: Path, name: str) -> DataError:
    return DataError(
        "not as it was written when the run began, and no checkpoint holds a copy",
        where=str(run / name),
        hint="this file records what the run uses; edit the config you pass to isft train instead, and put this one back"
        " (or start again in another output_dir)",
    )


def sweep(run: Path, fs: FileSystem) -> None:
    """Remove what was unfinished when the last process ended."""
    folders = [run, run / layout.CHECKPOINTS]
    folders += [run / layout.ROUNDS / name for name in list_names(run / layout.ROUNDS)]
    for folder in folders:
        for name in list_names(folder):
            if layout.is_temp(name):
                fs.remove(folder / name)
            elif name.endswith(layout.JOURNAL) and name.removesuffix(layout.JOURNAL) in shard_names(folder, ""):
                # sealed: the process ended before it removed the journal
                fs.unlink(folder / name)


def choose(run: Path, quarantine: Quarantine) -> Checkpoint | None:
    """The newest checkpoint that verifies and can be gone on from; those after it are in quarantine on return."""
    chosen = None
    passed_over: list[tuple[str, str]] = []
    for key in reversed(layout.checkpoint_keys(run)):
        path = run / layout.CHECKPOINTS / key
        try:
            found = load_checkpoint(path, verify=True, with_state=True)
        except Damage as damage:
            passed_over.append((key, f"{damage.path.relative_to(path)}: {damage.problem}"))
            continue
        if found.manifest["state"] is not None and not found.has_state:
            passed_over.append((key, "its state/ is gone, so training cannot go on from it"))
            continue
        lost = _lost_log(run, found)
        if lost is not None:
            passed_over.append((key, f"{lost} is damaged, and so is its copy here"))
            continue
        torn = _lost_shard(run, key) if layout.is_partial(key) else None
        if torn is not None:
            passed_over.append((key, f"{torn}, so its round is done again from where it began"))
            continue
        chosen = found
        break
    for key, reason in passed_over:
        quarantine.move(run / layout.CHECKPOINTS / key, reason)
    return chosen


def find_marker(run: Path) -> tuple[Marker | None, bytes | None, str]:
    """(marker, copy, problem): the run's marker, or when that is missing or damaged the newest checkpoint's copy of it with its bytes.

    (None, None, "") when nothing here says that this is a run. Raises DataError for a newer format, or damage without a copy.
    """
    path = run / layout.MARKER
    keys = layout.checkpoint_keys(run)
    try:
        marker = read_marker(run)
        if marker is not None or not keys:
            return marker, None, ""
        problem = "missing"
    except Damage as damage:
        problem = damage.problem
    for key in reversed(keys):
        copy = read_copy(run / layout.CHECKPOINTS / key, layout.MARKER)
        if copy is not None:
            return parse_marker(copy, path), copy, f"{problem}; put back from checkpoint {key}"
    raise DataError(
        f"damaged ({problem}), and no checkpoint holds a copy",
        where=str(path),
        hint="put the file back from a backup, or start again in another output_dir",
    )


def mend_marker(run: Path, fs: FileSystem, quarantine: Quarantine) -> Marker:
    """The run's marker, put back from a checkpoint's copy when it is damaged. Raises DataError when there is no run, or no copy."""
    path = run / layout.MARKER
    marker, copy, problem = find_marker(run)
    if marker is None:
        raise DataError("there is no run here", where=str(run), hint="isft train CONFIG begins one")
    if copy is not None:
        if path.exists():
            quarantine.move(path, problem)
        fs.publish(path, copy, data_label="mend.data", dir_label="mend.dir")
    return marker


def mend_records(run: Path, fs: FileSystem, quarantine: Quarantine, marker: Marker) -> None:
    """Put back every damaged record from a checkpoint's copy. Raises DataError when no copy is to be had."""
    for name in layout.RECORDS:
        path = run / name
        if record_fits(run, marker, name):
            continue
        found = _fitting_copy(run, marker, name)
        if found is None:
            raise _lost_record(run, name)
        key, copy = found
        if path.exists():
            quarantine.move(path, f"not as it was written; put back from checkpoint {key}")
        fs.publish(path, copy, data_label="mend.data", dir_label="mend.dir")


def settle_log(run: Path, fs: FileSystem, quarantine: Quarantine, file: str, newest: Checkpoint | None) -> None:
    """Cut a log to the length that the newest checkpoint recorded, and put that part back from its copy when it is damaged."""
    path = run / file
    recorded = newest.log_stamp(path.stem) if newest else stamp_bytes(b"")
    data = read_bytes(path)
    if data is None:
        data = b""
    if stamp_bytes(data[: recorded.size]) == recorded:
        tail = data[recorded.size :]
        if not tail:
            return
        problem = _tail_problem(tail)
        if problem is not None:
            quarantine.keep(path, tail, f"{problem}; cut off, it is made again")
        fs.truncate(path, recorded.size)
        return
    assert newest is not None  # with none, the recorded length is 0 and fits anything
    copy = read_copy(newest.path, file)
    if copy is None:
        raise Damage(path, f"damaged, and the copy in checkpoint {newest.key} became unreadable")
    if path.exists():
        quarantine.move(path, f"{_log_problem(data)}; put back from checkpoint {newest.key}")
    fs.publish(path, copy, data_label="mend.data", dir_label="mend.dir")


def _lost_log(run: Path, checkpoint: Checkpoint) -> str | None:
    for file in (layout.LEDGER, layout.STATS):
        recorded = checkpoint.log_stamp(Path(file).stem)
        data = read_bytes(run / file) or b""
        if stamp_bytes(data[: recorded.size]) != recorded:
            copy = read_copy(checkpoint.path, file)
            if copy is None or stamp_bytes(copy) != recorded:
                return file
    return None


def _lost_shard(run: Path, key: str) -> str | None:
    # a save inside a round goes on training on that round's shards: all that it was built on must be whole
    number = layout.parse_key(key)[0]
    try:
        listed = read_copies(run / layout.CHECKPOINTS / key)[1]
    except Damage:
        return None
    for name in listed:
        index, _, stem = name.partition("/")
        if int(index) != number:
            continue
        try:
            if load_shard(layout.round_folder(run, number), number, stem) is None:
                return f"the shard {name} is gone"
        except Damage as damage:
            return f"the shard {name} is damaged ({damage.problem})"
    return None


def _tail_problem(tail: bytes) -> str | None:
    try:
        _, torn = jsonl.split_rows(tail)
    except jsonl.BadLine as error:
        return f"damaged behind the last checkpoint ({error.problem})"
    return "the last line was cut off" if torn else None


def _log_problem(data: bytes) -> str:
    try:
        jsonl.split_rows(data)
    except jsonl.BadLine as error:
        return f"line {error.line}: {error.problem}"
    return "its bytes are not those that the checkpoint recorded"
