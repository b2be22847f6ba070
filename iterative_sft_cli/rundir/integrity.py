"""Checksums: of files, of folders, and of small JSON documents that carry their own."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterative_sft_cli import system
from iterative_sft_cli.rundir import cost
from iterative_sft_cli.rundir.fs import read_bytes, storage_error

SELF = "self_sha256"
"""The key under which a document keeps the checksum of the rest of itself."""

MAX_DOCUMENT_BYTES = 256 << 20


class Damage(Exception):
    """What is on the disk is not what was written: `path`, and `problem` as a clause."""

    def __init__(self, path: Path, problem: str) -> None:
        self.path = path
        self.problem = problem
        super().__init__(f"{path}: {problem}")


@dataclass(frozen=True, slots=True)
class Stamp:
    """Length in bytes and SHA-256 of some bytes."""

    size: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return {"bytes": self.size, "sha256": self.sha256}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Stamp:
        """Back from a manifest; raises KeyError or TypeError for anything else."""
        return cls(int(data["bytes"]), str(data["sha256"]))


def stamp_bytes(data: bytes) -> Stamp:
    """The stamp of bytes in memory."""
    with cost.blocking("hash"):
        return Stamp(len(data), hashlib.sha256(data).hexdigest())


def stamp_file(path: Path) -> Stamp:
    """The stamp of a file, read in pieces. Raises Damage when it is missing, StorageError when it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | system.OPEN_FLAGS)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damage(path, "missing") from error
    except OSError as error:
        raise storage_error(error, "open", path) from error
    try:
        with cost.blocking("hash"), os.fdopen(fd, "rb", buffering=0) as file:
            digest = hashlib.file_digest(file, "sha256")
            return Stamp(file.tell(), digest.hexdigest())
    except OSError as error:
        raise storage_error(error, "read", path) from error


def stamp_files(paths: Iterable[Path]) -> dict[Path, Stamp]:
    """The stamps of several files, read in threads (SHA-256 leaves the interpreter's lock)."""
    todo = list(paths)
    if len(todo) < 2 or sum(path.stat().st_size for path in todo if path.is_file()) < 1 << 20:
        return {path: stamp_file(path) for path in todo}
    threads = min(len(todo), os.cpu_count() or 1, 8)
    with (
        cost.blocking("hash"),
        ThreadPoolExecutor(threads, thread_name_prefix="isft-hash", initializer=cost.enter_background) as pool,
    ):
        return dict(zip(todo, pool.map(stamp_file, todo), strict=True))


def is_inside(name: str) -> bool:
    """Whether a name in a manifest is a relative path, as we write them, that stays in its folder on every system."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") for part in parts) and not any(c in name for c in "\\:\0")


def check_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Raise Damage unless every file of a manifest's list is in `folder` as it was written."""
    wanted: dict[Path, Stamp] = {}
    for name, entry in files.items():
        if not is_inside(name):
            raise Damage(folder, f"the manifest names {name!r}, which is not in this folder")
        try:
            wanted[folder / name] = Stamp.from_json(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise Damage(folder, f"the manifest's entry for {name} is malformed") from error
    for path, stamp in wanted.items():
        try:
            size = path.stat().st_size
        except OSError as error:
            raise Damage(path, "missing") from error
        if size != stamp.size:
            raise Damage(path, f"{size} bytes long, {stamp.size} were written")
    for path, found in stamp_files(wanted).items():
        if found.sha256 != wanted[path].sha256:
            raise Damage(path, "its bytes are not those that were written (SHA-256 differs)")


def render_document(content: Mapping[str, Any]) -> bytes:
    """A JSON document with its own checksum; the same content gives the same bytes. Raises ValueError or TypeError for what JSON cannot hold."""
    # through JSON once: keys that are no strings would sort differently when read back
    plain = json.loads(json.dumps(content, allow_nan=False))
    return _render({**plain, SELF: hashlib.sha256(_render(plain)).hexdigest()})


def parse_document(data: bytes | None, path: Path) -> dict[str, Any]:
    """The content of a document; raises Damage unless every byte is as `render_document` wrote it."""
    if data is None:
        raise Damage(path, "missing")
    if len(data) > MAX_DOCUMENT_BYTES:
        raise Damage(path, f"{len(data)} bytes long, more than any file of its kind")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damage(path, "not valid JSON" if data else "empty") from error
    if not isinstance(content, dict) or not isinstance(content.pop(SELF, None), str):
        raise Damage(path, "not a document with a checksum")
    try:
        whole = render_document(content)
    except ValueError as error:
        raise Damage(path, "its checksum does not fit") from error
    if whole != data:
        raise Damage(path, "its checksum does not fit")
    return content


def read_document(path: Path) -> dict[str, Any]:
    """`parse_document` of a file."""
    return parse_document(read_bytes(path), path)


def _render(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")
