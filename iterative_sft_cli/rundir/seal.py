"""Sealed shards: a JSONL file and, published before it, the checksum and plan that vouch for it.

A shard is there when both are and they agree. A shard without a seal is torn; a seal without a shard means that the work
is to be done again. A sealed shard never changes.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.rundir import jsonl
from iterative_sft_cli.rundir.fs import TEMP_PREFIX, FileSystem, list_names, read_bytes
from iterative_sft_cli.rundir.integrity import Damage, parse_document, render_document, stamp_bytes
from iterative_sft_cli.rundir.layout import JOURNAL, ROUNDS, check_name, is_temp, round_folder, round_indices
from iterative_sft_cli.rundir.quarantine import Quarantine

SEAL = ".seal.json"
SUFFIXES = (".jsonl", ".jsonl.gz")

Found = TypeVar("Found")


class ShardReader:
    """The shards of a run as a reader without the lock sees them: damage is an error, nothing is moved."""

    def __init__(self, run: Path) -> None:
        self._run = run

    def read(self, round_index: int, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]] | None:
        """Rows and meta of a sealed shard, verified; None when it is not (or not wholly) there. Raises DataError for a damaged one."""
        return self._find(read_shard, round_index, name)

    def iter_rows(self, round_index: int, name: str) -> Iterator[dict[str, Any]] | None:
        """The rows of `read`, one in memory at a time."""
        return self._find(iter_shard, round_index, name)

    def _find(self, read: Callable[[Path, int, str], Found], round_index: int, name: str) -> Found:
        try:
            return read(round_folder(self._run, round_index), round_index, check_name(name))
        except Damage as damage:
            raise DataError(
                damage.problem, where=str(damage.path), hint="the run's own next start repairs what it needs"
            ) from damage

    def names(self, round_index: int, prefix: str = "") -> list[str]:
        """The shards of a round that have both their files and whose name begins with `prefix`, sorted; not verified."""
        return shard_names(round_folder(self._run, round_index), prefix)


class Shards:
    """The writer's side. `compress` makes new shards `.jsonl.gz`; `before_seal` is called before one is published.

    `expected` names the shards that were there at the newest checkpoint or were sealed since; `built_on` is the round of that
    checkpoint, up to which a lost shard cannot be made again (the weights that made it are gone).
    """

    def __init__(self, run: Path, fs: FileSystem, quarantine: Quarantine) -> None:
        self._run = run
        self._fs = fs
        self._quarantine = quarantine
        self.compress = False
        self.before_seal: Callable[[], None] = lambda: None
        self.expected: set[str] = set()
        self.built_on = -1

    def seal(self, round_index: int, name: str, rows: Iterable[Mapping[str, Any]], meta: Mapping[str, Any]) -> None:
        """Publish a shard: on return it survives a power cut. Raises DataError when one of that name is there already, ValueError or TypeError
        for rows or meta that are not strict JSON."""
        folder = round_folder(self._run, round_index)
        data = jsonl.encode_rows(rows)
        count, suffix = data.count(b"\n"), ".jsonl"
        if self.compress:
            data, suffix = gzip.compress(data, mtime=0), ".jsonl.gz"
        target = folder / (check_name(name) + suffix)
        if target.exists():
            raise DataError("a sealed shard never changes", where=str(target), expected="a shard that is not there yet")
        stamp = stamp_bytes(data)
        seal = render_document(
            {
                "file": target.name,
                "round_index": round_index,
                "count": count,
                "bytes": stamp.size,
                "sha256": stamp.sha256,
                "meta": dict(meta),
            }
        )
        self.before_seal()
        self._fs.make_dirs(folder, "round.dir")
        temp = folder / (TEMP_PREFIX + target.name)
        if temp.exists():
            self._fs.unlink(temp)
        try:
            self._fs.create(temp, data, sync="shard.data")
            # the folder too: of two renames a disk may keep the later one alone, and a shard without a seal looks damaged
            self._fs.publish(folder / (name + SEAL), seal, data_label="seal.data", dir_label="seal.dir")
        except BaseException:
            self._fs.discard(temp)
            raise
        self._fs.rename(temp, target)
        self._fs.sync_dir(folder, "shard.dir")
        if (folder / (name + JOURNAL)).exists():
            self._fs.unlink(folder / (name + JOURNAL))
        self.expected.add(shard_key(round_index, name))
        self._fs.acknowledge(target, f"shard {shard_key(round_index, name)}")

    def read(self, round_index: int, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]] | None:
        """Rows and meta of a sealed shard, verified byte for byte. None when it is to be made (again): a torn or damaged one has been moved to
        quarantine.

        Raises DataError when it is lost and a checkpoint was built on it, so that it must not be made again.
        """
        return self._find(read_shard, round_index, name)

    def iter_rows(self, round_index: int, name: str) -> Iterator[dict[str, Any]] | None:
        """The rows of `read`, one in memory at a time: for shards with a row a prompt or a sample of a round."""
        return self._find(iter_shard, round_index, name)

    def _find(self, read: Callable[[Path, int, str], Found | None], round_index: int, name: str) -> Found | None:
        try:
            found = read(round_folder(self._run, round_index), round_index, check_name(name))
        except Damage as damage:
            self._set_aside(round_index, name, f"{damage.path.name}: {damage.problem}")
            found = None
        if found is None and round_index <= self.built_on and shard_key(round_index, name) in self.expected:
            raise self._lost(round_index, name)
        return found

    def names(self, round_index: int, prefix: str = "") -> list[str]:
        """The shards of a round that have both their files and whose name begins with `prefix`, sorted; not verified.

        Raises DataError when one is missing that a checkpoint was built on, or that this process has sealed.
        """
        found = shard_names(round_folder(self._run, round_index), prefix)
        known = self.expected.difference(shard_key(round_index, name) for name in found)
        for key in sorted(known):
            if key.startswith(shard_key(round_index, prefix)):
                raise self._lost(round_index, key.partition("/")[2])
        return found

    def check_rounds(self, first: int) -> None:
        """Move to quarantine what is torn or damaged from round `first` on: what `names` tells of them can be read."""
        for round_index in round_indices(self._run):
            if round_index < first:
                continue
            folder = round_folder(self._run, round_index)
            stems = {
                entry.removesuffix(suffix)
                for entry in list_names(folder)
                for suffix in SUFFIXES
                if entry.endswith(suffix)
            }
            for name in sorted(stem for stem in stems if not is_temp(stem)):
                try:
                    load_shard(folder, round_index, name)
                except Damage as damage:
                    self._set_aside(round_index, name, f"{damage.path.name}: {damage.problem}")

    def expect(self, keys: Iterable[str]) -> None:
        """Miss these shards (as `shard_key` names them) when they are gone, but for those that were given up."""
        self.expected.update(key for key in keys if not self._was_removed(key))

    def _was_removed(self, key: str) -> bool:
        number, _, name = key.partition("/")
        folder = round_folder(self._run, int(number))
        try:
            seal = parse_document(read_bytes(folder / (check_name(name) + SEAL)), folder)
            target = _sealed_file(folder, name, seal)
        except Damage:
            return False
        return bool(seal.get("removed")) and not target.exists()

    def listed(self) -> list[str]:
        """`0001/generated-00000` for every shard that is there, or ought to be: one that was lost stays on the list for `isft verify` to tell."""
        return sorted(self.expected.union(all_shards(self._run)))

    def remove(self, round_index: int, name: str) -> None:
        """Give up a shard that is no longer wanted (`samples.keep`): its seal stays and says so, so that nobody takes it for lost.

        Raises Damage when the seal is not this shard's.
        """
        folder = round_folder(self._run, round_index)
        path = folder / (check_name(name) + SEAL)
        self.before_seal()
        seal = parse_document(read_bytes(path), path)
        target = _sealed_file(folder, name, seal)
        self._fs.publish(
            path, render_document({**seal, "removed": True}), data_label="seal.data", dir_label="seal.removed"
        )
        self.expected.discard(shard_key(round_index, name))
        if target.exists():
            self._fs.unlink(target)

    def discard(self, round_index: int, name: str, reason: str) -> None:
        """Move a shard and its seal to quarantine because it is no longer wanted as it is; nobody will miss it."""
        self.expected.discard(shard_key(round_index, name))
        self._set_aside(round_index, name, reason)

    def give_up_damaged(self, round_index: int, prefixes: tuple[str, ...]) -> list[str]:
        """Move what is damaged among a round's shards whose names begin with one of `prefixes` to quarantine; returns the names of these and of
        those that are gone. Nobody will miss them from here on."""
        folder = round_folder(self._run, round_index)
        start = shard_key(round_index, "")
        known = {key.removeprefix(start) for key in self.expected if key.startswith(start)}
        lost = []
        for name in sorted(known.union(shard_names(folder, ""))):
            if not name.startswith(prefixes):
                continue
            reason = "gone"
            try:
                if load_shard(folder, round_index, name) is not None:
                    continue
                # a seal that says so was left by `remove`
                if not (folder / (name + SEAL)).exists() and shard_key(round_index, name) not in self.expected:
                    continue
            except Damage as damage:
                reason = f"{damage.path.name}: {damage.problem}"
            self.discard(round_index, name, f"{reason}; nothing needs it any more")
            lost.append(name)
        return lost

    def _set_aside(self, round_index: int, name: str, reason: str) -> None:
        folder = round_folder(self._run, round_index)
        # the shard first: what a crash leaves in between is a seal without shard, which means "make it again"
        for suffix in (*SUFFIXES, SEAL):
            path = folder / (check_name(name) + suffix)
            if path.exists():
                self._quarantine.move(path, reason)

    def _lost(self, round_index: int, name: str) -> DataError:
        return DataError(
            "a sealed shard is gone or damaged, and the run has built on it",
            where=str(round_folder(self._run, round_index) / f"{name}.jsonl"),
            hint="put it and its seal back from a backup (or from quarantine/); `isft verify RUN` lists all damage",
        )


def shard_key(round_index: int, name: str) -> str:
    """How a shard is called in a list: `0001/generated-00000`."""
    return f"{round_index:04d}/{name}"


def shard_names(folder: Path, prefix: str) -> list[str]:
    """The names of the complete shards in a round's folder."""
    present = set(list_names(folder))
    found = []
    for entry in present:
        name = entry.removesuffix(SEAL)
        if (
            name != entry
            and not is_temp(name)
            and name.startswith(prefix)
            and any(name + suffix in present for suffix in SUFFIXES)
        ):
            found.append(name)
    return sorted(found)


def all_shards(run: Path) -> list[str]:
    """`0001/generated-00000` for every complete shard of a run."""
    return [
        f"{number}/{name}" for number in list_names(run / ROUNDS) for name in shard_names(run / ROUNDS / number, "")
    ]


def _sealed_file(folder: Path, name: str, seal: Mapping[str, Any]) -> Path:
    """The file that a seal vouches for: this shard's and no other. Raises Damage."""
    file = seal.get("file")
    if file not in [name + suffix for suffix in SUFFIXES]:
        raise Damage(folder / (name + SEAL), f"the seal of another shard ({file})")
    return folder / str(file)


def load_shard(folder: Path, round_index: int, name: str) -> tuple[bytes, dict[str, Any]] | None:
    """Verified bytes and seal; None when the shard's file is not there. Raises Damage when it is there without a seal that vouches for its bytes."""
    files = [folder / (name + suffix) for suffix in SUFFIXES if (folder / (name + suffix)).exists()]
    if not files:
        return None
    path = folder / (name + SEAL)
    seal = parse_document(read_bytes(path), path)
    if seal.get("file") not in [file.name for file in files] or seal.get("round_index") != round_index:
        raise Damage(path, f"the seal of another shard ({seal.get('round_index')}/{seal.get('file')})")
    if len(files) > 1:
        raise Damage(files[0], "there twice, plain and compressed")
    data = read_bytes(files[0]) or b""
    stamp = stamp_bytes(data)
    if stamp.size != seal.get("bytes"):
        raise Damage(files[0], f"{stamp.size} bytes long, {seal.get('bytes')} were sealed")
    if stamp.sha256 != seal.get("sha256"):
        raise Damage(files[0], "its bytes are not those that were sealed (SHA-256 differs)")
    return data, seal


def _unpacked(folder: Path, round_index: int, name: str) -> tuple[Path, bytes, dict[str, Any]] | None:
    """The file, its lines and its seal, else as `load_shard`."""
    found = load_shard(folder, round_index, name)
    if found is None:
        return None
    data, seal = found
    path = folder / str(seal["file"])
    try:
        return path, gzip.decompress(data) if path.suffix == ".gz" else data, seal
    except (OSError, EOFError, zlib.error) as error:
        raise Damage(path, str(error)) from error


def read_shard(folder: Path, round_index: int, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]] | None:
    """Rows and meta, else as `load_shard`."""
    found = _unpacked(folder, round_index, name)
    if found is None:
        return None
    path, data, seal = found
    try:
        rows = jsonl.decode_rows(data)
    except jsonl.BadLine as error:
        raise Damage(path, str(error)) from error
    if len(rows) != seal.get("count"):
        raise Damage(path, f"{len(rows)} rows, {seal.get('count')} were sealed")
    return rows, dict(seal["meta"])


def iter_shard(folder: Path, round_index: int, name: str) -> Iterator[dict[str, Any]] | None:
    """The rows of `read_shard`, decoded one at a time. A line that is no record in bytes that were sealed is a DataError when it is met."""
    found = _unpacked(folder, round_index, name)
    if found is None:
        return None
    path, data, seal = found
    count = data.count(b"\n")
    if count != seal.get("count"):
        raise Damage(path, f"{count} rows, {seal.get('count')} were sealed")
    return _decoded(data, path)


def _decoded(data: bytes, path: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from jsonl.iter_rows(data)
    except jsonl.BadLine as error:
        raise DataError(str(error), where=str(path)) from error
