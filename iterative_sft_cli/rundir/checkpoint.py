"""Checkpoints: a folder that is complete, verified and durable from the instant its name appears.

`MANIFEST.json` vouches for the model, `state.json` and the length of the logs at that moment, `state/MANIFEST.json` for
optimizer and masters; `run.json` carries copies of the run's small files, from which recovery mends them.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.rundir.fs import FileSystem, read_bytes
from iterative_sft_cli.rundir.integrity import (
    Damage,
    Stamp,
    check_files,
    parse_document,
    read_document,
    render_document,
    stamp_bytes,
)
from iterative_sft_cli.rundir.layout import COPIES, FORMAT, MANIFEST, STATE, STATE_FOLDER


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint: `state` is what the loop handed in; `has_state` says whether `path/state` is there to go on from."""

    key: str
    path: Path
    state: dict[str, Any]
    has_state: bool
    verified: bool
    manifest: dict[str, Any] = field(repr=False)

    def log_stamp(self, name: str) -> Stamp:
        """Length and checksum of "ledger" or "stats" when this was committed."""
        return Stamp.from_json(self.manifest[name])

    @property
    def weights_hash(self) -> str:
        """A checksum of the model's files (the safetensors where there are any): the same weights have the same one, whatever the key."""
        files = {name: entry["sha256"] for name, entry in self.manifest["files"].items() if name != STATE}
        weights = {name: digest for name, digest in files.items() if name.endswith(".safetensors")} or files
        return stamp_bytes(json.dumps(weights, sort_keys=True).encode("ascii")).sha256


def load_checkpoint(path: Path, *, verify: bool, with_state: bool) -> Checkpoint:
    """Read a checkpoint folder; with `verify` every byte of the model is hashed, `with_state` those of `state/` too.

    Raises Damage when anything differs from what was committed. A `state/` that is absent is no damage: `has_state` is False.
    """
    manifest = read_document(path / MANIFEST)
    if manifest.get("key") != path.name:
        raise Damage(path / MANIFEST, f"the manifest of checkpoint {manifest.get('key')}")
    if manifest.get("format") != FORMAT:
        raise Damage(path / MANIFEST, f"of format {manifest.get('format')}, expected {FORMAT}")
    files = manifest["files"]
    if verify:
        check_files(path, files)
    raw = read_bytes(path / STATE)
    if raw is None or stamp_bytes(raw).to_json() != files.get(STATE):
        raise Damage(path / STATE, "not as it was written")
    bound = manifest.get("state")
    has_state = bound is not None and (path / STATE_FOLDER).is_dir()
    if has_state and with_state:
        check_group(path / STATE_FOLDER, path.name, bound)
    return Checkpoint(path.name, path, json.loads(raw), has_state, verify, manifest)


def check_group(folder: Path, key: str, bound: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Verify a subfolder by its own manifest, which must be the one `bound` names; returns its list of files. Raises Damage."""
    path = folder / MANIFEST
    raw = read_bytes(path)
    if bound is not None and (raw is None or stamp_bytes(raw).to_json() != dict(bound)):
        raise Damage(path, "not the manifest that the checkpoint was committed with")
    manifest = parse_document(raw, path)
    if manifest.get("key") != key:
        raise Damage(path, f"the manifest of checkpoint {manifest.get('key')}")
    check_files(folder, manifest["files"])
    return dict(manifest["files"])


def render_copies(key: str, files: Mapping[str, bytes], shards: Sequence[str]) -> bytes:
    """`run.json`: copies of the run's small files, whole, and the names of the shards that are there."""
    # bytes that are no UTF-8 come back as they were
    texts = {name: data.decode("utf-8", "surrogateescape") for name, data in files.items()}
    return render_document({"key": key, "files": texts, "shards": list(shards)})


def read_copies(checkpoint: Path) -> tuple[dict[str, bytes], list[str]]:
    """(files, shards) as they were at the commit. Raises Damage."""
    content = read_document(checkpoint / COPIES)
    if content.get("key") != checkpoint.name:
        raise Damage(checkpoint / COPIES, f"of checkpoint {content.get('key')}")
    files = {name: text.encode("utf-8", "surrogateescape") for name, text in content["files"].items()}
    return files, list(content["shards"])


def read_copy(checkpoint: Path, name: str) -> bytes | None:
    """The copy of one small file in a checkpoint; None when there is none or it is damaged."""
    try:
        return read_copies(checkpoint)[0].get(name)
    except Damage:
        return None


def walk_files(folder: Path) -> Iterator[Path]:
    """Every file under `folder`, sorted. Raises DataError for a link or anything else that is neither file nor folder."""
    for name in sorted(os.listdir(folder)):
        path = folder / name
        mode = os.lstat(path).st_mode
        if stat.S_ISDIR(mode):
            yield from walk_files(path)
        elif stat.S_ISREG(mode):
            yield path
        else:
            raise DataError("a checkpoint holds plain files and folders only", where=str(path))


def folder_size(folder: Path) -> int:
    """Bytes of all files under `folder`: about what the next checkpoint will take."""
    return sum(path.stat().st_size for path in walk_files(folder))


def walk_folders(folder: Path) -> Iterator[Path]:
    """`folder` and every folder under it, the deepest first."""
    for name in sorted(os.listdir(folder)):
        if stat.S_ISDIR(os.lstat(folder / name).st_mode):
            yield from walk_folders(folder / name)
    yield folder


def same_mode(fs: FileSystem, files: list[Path], model: Path) -> None:
    """Give `files` the permission bits that the umask gave `model` (safetensors makes its files 0600 whatever the umask)."""
    wanted = stat.S_IMODE(model.stat().st_mode)
    for path in files:
        if stat.S_IMODE(path.stat().st_mode) != wanted:
            fs.chmod(path, wanted)
