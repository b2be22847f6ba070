"""Weights on their way to servers: written to a path of their own, announced with sizes and hashes, copied once to each host.

Guarantee: what a server is told to load is, to the byte, what was announced; anything else is an error that says which file.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import DataError, StorageError
from iterative_sft_cli.rundir.fs import foreign_error
from iterative_sft_cli.rundir.integrity import Damage, Stamp, is_inside, read_document, render_document, stamp_files

MANIFEST = "MANIFEST.json"
SEEN_S = 10.0
"""How long another host's file system may take to show what was announced."""


@dataclass(frozen=True, slots=True)
class Announced:
    """Weights in `folder`: exactly `files`, {name: {"bytes", "sha256"}}. `name` is used for nothing else, ever; weights of one run
    begin alike in it. `checked` says that this process has hashed them."""

    name: str
    folder: Path
    files: Mapping[str, Any]
    checked: bool = False

    @property
    def run(self) -> str:
        """What the names of all weights of the run begin with."""
        return self.name.rsplit("-", 2)[0]

    def to_json(self) -> dict[str, Any]:
        """As it travels to another host."""
        return {"name": self.name, "folder": str(self.folder), "files": dict(self.files)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Announced:
        """Undo `to_json`."""
        return cls(str(data["name"]), Path(data["folder"]), data["files"])


class Publisher:
    """Writes weights under `shared`, a folder that every host of the run sees, each to a new path."""

    def __init__(self, shared: Path) -> None:
        self.shared = shared.resolve()
        self._run = f"weights-{hashlib.sha256(str(self.shared).encode()).hexdigest()[:8]}"
        self._numbers = itertools.count(1)

    def publish(self, write: Callable[[Path], None]) -> Announced:
        """The folder that `write` fills; its manifest is there last. Raises StorageError when the disk refuses."""
        name = self._new_name()
        folder = self.shared / name
        try:
            self.shared.mkdir(parents=True, exist_ok=True)
            write(folder)
            files = stamps_of(folder)
            part = folder / f".{MANIFEST}.part"
            part.write_bytes(render_document({"files": files}))
            os.replace(part, folder / MANIFEST)
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            refused = foreign_error(error, folder)
            if refused is not None:
                raise refused from error
            raise
        return Announced(name, folder, files, checked=True)

    def announce(self, folder: Path) -> Announced:
        """A folder that is there, as its own manifest describes it, or else as it is."""
        folder = folder.resolve()
        with contextlib.suppress(Damage):
            return Announced(self._new_name(), folder, read_document(folder / MANIFEST)["files"])
        return Announced(self._new_name(), folder, stamps_of(folder), checked=True)

    def forget(self, keep: Announced | None) -> None:
        """Remove what was published but for `keep`: no server reads it any more."""
        for old in self.shared.glob(f"{self._run}-*"):
            if keep is None or old.name != keep.name:
                shutil.rmtree(old, ignore_errors=True)
        if keep is None:
            with contextlib.suppress(OSError):
                self.shared.rmdir()

    def _new_name(self) -> str:
        return f"{self._run}-{time.time_ns():x}-{next(self._numbers)}"


class Stage:
    """One host's view of announced weights: a copy in `folder`, or, when None, the announced folder itself."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = None if folder is None else folder.resolve()

    def take(self, weights: Announced, tick: Callable[[], None]) -> Path:
        """The folder to serve from, after every byte of it was checked. Raises DataError."""
        await_sizes(weights, tick)
        if self.folder is None:
            if not weights.checked:
                check(weights, weights.folder, "do all hosts share this folder, and does nobody else write there?")
            return weights.folder
        target = self.folder / weights.name
        if target.is_dir():
            check(weights, target, "is the disk of generate.vllm.stage_to failing?")
            return target
        part = self.folder / f".{weights.name}.{socket.gethostname()}-{os.getpid()}.part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            for name in weights.files:
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(weights.folder / name, part / name)
                tick()
            check(
                weights, part, f"what lies in {weights.folder}, or the disk of generate.vllm.stage_to, has changed it"
            )
            part.rename(target)
        except OSError as error:
            raise DataError(
                f"weights could not be copied to {target} on {socket.gethostname()}: {error}",
                where="generate.vllm.stage_to",
                hint="is there room, and may this user write there?",
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return target

    def forget(self, weights: Announced, *, keep: bool) -> None:
        """Remove this host's copies of the run's weights, but for `weights` with `keep`."""
        if self.folder is None:
            return
        for old in (*self.folder.glob(f"{weights.run}-*"), *self.folder.glob(f".{weights.run}-*.part")):
            if not keep or old.name != weights.name:
                shutil.rmtree(old, ignore_errors=True)


def stamps_of(folder: Path) -> dict[str, Any]:
    """Sizes and hashes of a model folder's files, those of a trainer's state and links that lead nowhere left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name.split("/")[0] != "state" and name != MANIFEST and not path.name.startswith("."):
            found[name] = path.resolve()
    stamps = stamp_files(found.values())
    return {name: stamps[path].to_json() for name, path in found.items()}


def await_sizes(weights: Announced, tick: Callable[[], None]) -> None:
    """Return when every file has its size here, or after SEEN_S: a network file system shows what is new a little later."""
    deadline = time.monotonic() + (0.0 if weights.checked else SEEN_S)
    while time.monotonic() < deadline:
        try:
            if all((weights.folder / name).stat().st_size == one["bytes"] for name, one in weights.files.items()):
                return
        except OSError:
            pass
        tick()
        time.sleep(0.2)


def check(weights: Announced, folder: Path, hint: str) -> None:
    """Raises DataError, with `hint`, unless `folder` holds what was announced."""
    try:
        wanted = {name: Stamp.from_json(entry) for name, entry in weights.files.items()}
        if not wanted or not all(is_inside(name) for name in wanted):
            raise Damage(folder, "announced with names that are none of files in a folder")
        paths = {name: (folder / name).resolve() for name in wanted}
        for name, path in paths.items():
            if not path.is_file():
                raise Damage(folder / name, "missing")
            if path.stat().st_size != wanted[name].size:
                raise Damage(folder / name, f"{path.stat().st_size} bytes long, {wanted[name].size} were announced")
        found = stamp_files(paths.values())
        for name, path in paths.items():
            if found[path].sha256 != wanted[name].sha256:
                raise Damage(folder / name, "its bytes are not those that were announced (SHA-256 differs)")
    except (Damage, StorageError, OSError) as error:
        raise DataError(
            f"weights to be served are not whole on {socket.gethostname()}: {error}",
            where="generate.vllm",
            expected="what rank 0 announced, to the byte",
            hint=hint,
        ) from error


def adapter_rank(folder: Path) -> int | None:
    """The rank of the adapter in a folder; None where it holds a whole model."""
    config = folder / "adapter_config.json"
    return int(json.loads(config.read_text("utf-8"))["r"]) if config.exists() else None
