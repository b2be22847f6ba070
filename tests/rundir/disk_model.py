"""A power-loss simulator over the recorded operations of the run directory's file layer.

`Recorder` is a hook that keeps every change as an operation on inodes. `Disk` builds the states a disk may legally be in
after power is lost at some operation: a name is certain once a folder it stands in was synced after the change, bytes are
certain once their file was synced; all the rest may be there, not be there, or (bytes) be there in part.
It is a model, not a disk: renames are atomic, and synced things stay.
"""

from __future__ import annotations

import bisect
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from iterative_sft_cli.rundir.fs import Op

TEARS = ("none", "whole", "half", "zeros")
ROOT = 0


@dataclass
class Entry:
    """One recorded operation. Kinds: inode, link, unlink, rename, data, sync, ack."""

    kind: str
    node: int = -1
    name: str = ""
    target: int = -1
    target_name: str = ""
    data: bytes = b""
    label: str = ""

    @property
    def folders(self) -> set[int]:
        return {self.node, self.target} if self.kind == "rename" else {self.node}


@dataclass
class Node:
    is_dir: bool
    names: dict[str, int] = field(default_factory=dict)
    data: bytes = b""


class Recorder:
    """The hook; `log` holds what happened under `root`, which exists and is empty when recording begins."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.log: list[Entry] = []
        self.nodes = {ROOT: Node(True)}
        self._guard = threading.Lock()

    def __call__(self, op: Op) -> None:
        with self._guard:
            self._record(op)

    def _record(self, op: Op) -> None:
        if op.kind == "ack":
            self.log.append(Entry("ack", label=op.label))
            return
        if op.kind in ("fsync", "fsync_dir"):
            self._discover(op.path if op.kind == "fsync_dir" else op.path.parent)
            self.log.append(Entry("sync", self._find(op.path), label=op.label))
            return
        self._discover(op.path.parent)
        folder, name = self._find(op.path.parent), op.path.name
        if op.kind == "mkdir":
            self._new(folder, name, is_dir=True)
        elif op.kind == "create":
            if name not in self.nodes[folder].names:
                self._new(folder, name, is_dir=False)
        elif op.kind == "write":
            node = self._find(op.path)
            self._apply(Entry("data", node, data=self.nodes[node].data + bytes(op.data or b"")))
        elif op.kind == "truncate":
            node = self._find(op.path)
            self._apply(Entry("data", node, data=self.nodes[node].data[: op.length]))
        elif op.kind == "rename":
            assert op.target is not None
            self._apply(Entry("rename", folder, name, self._find(op.target.parent), op.target.name))
        elif op.kind in ("unlink", "rmdir"):
            self._apply(Entry("unlink", folder, name))

    def _find(self, path: Path) -> int:
        node = ROOT
        for part in path.relative_to(self.root).parts:
            node = self.nodes[node].names[part]
        return node

    def _discover(self, folder: Path) -> None:
        """What a library wrote by itself (safetensors) shows up as if it had been written just now, without a sync."""
        node = self._find(folder)
        for name in sorted(os.listdir(folder)):
            path = folder / name
            if name not in self.nodes[node].names:
                found = self._new(node, name, is_dir=path.is_dir())
                if path.is_file() and (data := path.read_bytes()):
                    self._apply(Entry("data", found, data=data))
            if path.is_dir() and ".tmp-" in str(path):
                self._discover(path)

    def _new(self, folder: int, name: str, *, is_dir: bool) -> int:
        node = len(self.nodes)
        self.nodes[node] = Node(is_dir)
        self.log.append(Entry("inode", node, name="d" if is_dir else "f"))
        self._apply(Entry("link", folder, name, node))
        return node

    def _apply(self, entry: Entry) -> None:
        self.log.append(entry)
        apply(self.nodes, entry)


def apply(nodes: dict[int, Node], entry: Entry) -> None:
    if entry.kind == "inode":
        nodes[entry.node] = Node(entry.name == "d")
    elif entry.kind == "link":
        nodes[entry.node].names[entry.name] = entry.target
    elif entry.kind == "unlink":
        nodes[entry.node].names.pop(entry.name, None)
    elif entry.kind == "rename":
        moved = nodes[entry.node].names.pop(entry.name, None)
        if moved is not None:
            nodes[entry.target].names[entry.target_name] = moved
    elif entry.kind == "data":
        nodes[entry.node].data = entry.data


Tree = dict[str, bytes | None]
"""Path below the root -> bytes, None for a folder."""


@dataclass
class State:
    """One legal state of the disk, and what had been acknowledged when the power went."""

    at: int
    tree: Tree
    acked: list[str]

    def build(self, root: Path) -> None:
        for name, data in sorted(self.tree.items()):
            path = root / name
            if data is None:
                path.mkdir()
            else:
                path.write_bytes(data)


class Disk:
    """The legal states after each operation of a log. `skip` leaves out the syncs with that label, as if the call were not there."""

    def __init__(self, log: list[Entry], skip: str | None = None) -> None:
        self.log = log
        self.skip = skip
        self.last_sync: dict[int, list[int]] = {}
        self._cached: tuple[int, list[int]] = (-1, [])
        for index, entry in enumerate(log):
            if entry.kind == "sync" and entry.label != skip:
                self.last_sync.setdefault(entry.node, []).append(index)

    def states(self, at: int, *, rng: random.Random, num_random: int, few: bool = False) -> Iterator[State]:
        """States after the first `at` operations: bounded single changes, prefixes, and `num_random` random ones; with `few`, only the four
        in which most is lost."""
        pending = self._pending(at)
        choices: list[Callable[[int], bool]] = [lambda j: False, lambda j: True]
        if few:
            choices += [lambda j, x=chosen: j != x for chosen in pending[-2:]]
        for chosen in () if few else pending[-12:]:
            choices += [
                lambda j, x=chosen: j != x,
                lambda j, x=chosen: j == x,
                lambda j, x=chosen: j <= x,
            ]
        for tear in TEARS[:1] if few else TEARS:
            for keep in choices:
                yield self._state(at, keep, lambda node, tear=tear: tear)
        for _ in range(num_random):
            kept = {j for j in pending if rng.random() < 0.5}
            salt = rng.random()
            yield self._state(
                at, lambda j, kept=kept: j in kept, lambda node, salt=salt: random.Random(salt + node).choice(TEARS)
            )

    def _synced_after(self, node: int, index: int, at: int) -> bool:
        syncs = self.last_sync.get(node, [])
        found = bisect.bisect_right(syncs, index)
        return found < len(syncs) and syncs[found] < at

    def _pending(self, at: int) -> list[int]:
        if self._cached[0] != at:
            found = [
                j
                for j in range(at)
                if self.log[j].kind in ("link", "unlink", "rename")
                and not any(self._synced_after(node, j, at) for node in self.log[j].folders)
            ]
            self._cached = (at, found)
        return self._cached[1]

    def _state(self, at: int, keep: Callable[[int], bool], tear: Callable[[int], str]) -> State:
        nodes = {ROOT: Node(True)}
        durable: dict[int, bytes] = {}
        latest: dict[int, bytes] = {}
        acked = []
        lost = {j for j in self._pending(at) if not keep(j)}
        for j, entry in enumerate(self.log[:at]):
            if entry.kind == "data":
                latest[entry.node] = entry.data
                if self._synced_after(entry.node, j, at):
                    durable[entry.node] = entry.data
            elif entry.kind == "ack":
                acked.append(entry.label)
            elif entry.kind != "sync" and j not in lost:
                apply(nodes, entry)
        for node, data in latest.items():
            nodes[node].data = torn(durable.get(node, b""), data, tear(node))
        return State(at, dict(walk(nodes)), acked)


def torn(old: bytes, new: bytes, how: str) -> bytes:
    """What a file may hold when `old` is certain and `new` was on its way."""
    if old == new or how == "whole":
        return new
    if how == "none" or len(new) <= len(old):
        return old
    if how == "half":
        return new[: (len(old) + len(new)) // 2]
    return old + b"\0" * (len(new) - len(old))


def walk(nodes: dict[int, Node], node: int = ROOT, prefix: str = "") -> Iterator[tuple[str, bytes | None]]:
    for name, child in nodes[node].names.items():
        path = f"{prefix}{name}"
        if nodes[child].is_dir:
            yield path, None
            yield from walk(nodes, child, f"{path}/")
        else:
            yield path, nodes[child].data
