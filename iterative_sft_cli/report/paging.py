"""Sealed shards line by line: a page of a run with a million samples costs a page.

Every file that is looked at is verified against its seal as bytes; only the lines that are shown are decoded, and the
bytes of one shard are in memory at a time.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.rundir import RunView, jsonl
from iterative_sft_cli.rundir.fs import read_bytes
from iterative_sft_cli.rundir.integrity import Damage, parse_document, stamp_bytes
from iterative_sft_cli.rundir.layout import round_folder
from iterative_sft_cli.rundir.seal import SEAL
from iterative_sft_cli.samples import (
    ACCEPTED,
    EVAL,
    EVAL_PROMPTS,
    GENERATED,
    HINTED,
    PROMPTS,
    ROUND_VERDICTS,
    VERDICTS,
    StoredSample,
    kept_of,
    prompt_from_row,
    sample_from_row,
    sample_shards,
)
from iterative_sft_cli.types import Prompt

PROMPTS_KEPT = 256
"""Decoded prompts that are kept at hand."""


class SealedLines:
    """The lines of one sealed shard, none decoded yet; `meta` is what its seal says beside the checksum."""

    def __init__(self, data: bytes, meta: dict[str, Any]) -> None:
        self._data = data
        self.meta = meta

    @cached_property
    def _lines(self) -> list[bytes]:
        lines = self._data.split(b"\n")
        lines.pop()
        return lines

    def __len__(self) -> int:
        return len(self._lines)

    def row(self, index: int) -> dict[str, Any]:
        """Line `index`, decoded."""
        return jsonl.decode_row(self._lines[index], index + 1)

    def raw(self, index: int) -> bytes:
        """Line `index` as it is stored."""
        return self._lines[index]

    def line_that_begins(self, text: bytes) -> int | None:
        """The first line that begins with these bytes, found without splitting the shard."""
        if self._data.startswith(text):
            return 0
        at = self._data.find(b"\n" + text)
        return None if at < 0 else self._data.count(b"\n", 0, at + 1)

    def count(self, text: bytes) -> int:
        """How often these bytes stand in it."""
        return self._data.count(text)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every line, decoded one after the other."""
        return (self.row(index) for index in range(len(self)))


def read_seal(run: Path, round_index: int, name: str) -> dict[str, Any]:
    """The seal of a shard: count, bytes, checksum, meta. Raises DataError when it is damaged."""
    path = round_folder(run, round_index) / (name + SEAL)
    try:
        return parse_document(read_bytes(path), path)
    except Damage as damage:
        raise _damaged(damage.path, damage.problem) from damage


def open_lines(run: Path, round_index: int, name: str) -> SealedLines | None:
    """A sealed shard, its bytes verified; None when it is not there. Raises DataError when it is damaged."""
    folder = round_folder(run, round_index)
    if not (folder / (name + SEAL)).exists():
        return None
    seal = read_seal(run, round_index, name)
    path = folder / str(seal.get("file"))
    if path.parent != folder or seal.get("round_index") != round_index:
        raise _damaged(path, "the seal of another shard")
    data = read_bytes(path)
    if data is None:
        return None
    stamp = stamp_bytes(data)
    if stamp.size != seal.get("bytes") or stamp.sha256 != seal.get("sha256"):
        raise _damaged(path, "its bytes are not those that were sealed")
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(path, str(error)) from error
    return SealedLines(data, dict(seal["meta"]))


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(problem, where=str(path), hint="isft verify RUN lists all damage; the run's next start repairs it")


class KeyedLines:
    """A sealed shard looked up by the value of the key that begins every line, such as `prompt_id`.

    The bytes are searched, so that a reader decodes only what it asks for; one that asks in the shard's order searches the next line only.
    """

    def __init__(self, lines: SealedLines, key: str) -> None:
        self._lines = lines
        self._start = b"{" + json.dumps(key).encode("ascii") + b":"
        self._last = (b"", -1)

    def __len__(self) -> int:
        return len(self._lines)

    def position(self, value: str) -> int | None:
        """The line whose key has this value; None when there is none."""
        wanted = self._start + json.dumps(value).encode("ascii")
        before, at = self._last
        if wanted == before:
            return at
        following = at + 1
        if 0 < following < len(self._lines) and self._lines.raw(following).startswith(wanted):
            found: int | None = following
        else:
            found = self._lines.line_that_begins(wanted)
        if found is not None:
            self._last = (wanted, found)
        return found

    def get(self, value: str) -> dict[str, Any] | None:
        """The line whose key has this value, decoded."""
        at = self.position(value)
        return None if at is None else self._lines.row(at)


def prompt_of(sample_id: str, round_index: int) -> str:
    """The prompt's id inside a sample's."""
    # the index of a greedy sample is -1
    found = re.fullmatch(r"(.*?)-(-?\d+)", sample_id.removeprefix(f"{round_index}-"), re.DOTALL)
    return found.group(1) if found else sample_id


class RoundReader:
    """One round of a run, for readers that look at some of its samples."""

    def __init__(self, view: RunView, round_index: int) -> None:
        self._run = view.path
        self.round_index = round_index
        self.names: list[str] = []
        self.judged: list[str] = []
        self.kept = "all"
        self._list(view)
        self._prompts: KeyedLines | None = None
        self._later: KeyedLines | None = None
        self._later_read = False
        self._recent: OrderedDict[str, Prompt] = OrderedDict()

    def _list(self, view: RunView) -> None:
        self.names = sample_shards(view.shards, self.round_index)
        self.kept = kept_of(view.shards, self.round_index)
        judged = set(view.shards.names(self.round_index, VERDICTS))
        self.judged = [name for name in self.names if name.startswith(ACCEPTED) or self._verdicts(name) in judged]

    @property
    def prompts(self) -> KeyedLines:
        """The round's prompts. Raises DataError when they are not there."""
        if self._prompts is None:
            self._prompts = KeyedLines(self._open_prompts(), "prompt_id")
        return self._prompts

    def _open_prompts(self) -> SealedLines:
        return self._need(PROMPTS)

    def prompt(self, prompt_id: str) -> Prompt:
        """One prompt of the round. Raises DataError when it is not among them."""
        if prompt_id not in self._recent:
            row = self.prompts.get(prompt_id)
            if row is None:
                raise DataError(f"round {self.round_index} has no prompt {prompt_id}", where=str(self._run))
            self._recent[prompt_id] = prompt_from_row(row)
            if len(self._recent) > PROMPTS_KEPT:
                self._recent.popitem(last=False)
        return self._recent[prompt_id]

    def count(self, name: str) -> int:
        """The samples of a shard, from its seal."""
        return int(read_seal(self._run, self.round_index, name)["count"])

    def generated(self, name: str) -> SealedLines:
        """The samples of a shard, as generated."""
        return self._need(name)

    def says(self, name: str) -> Iterator[tuple[int, str, list[dict[str, Any]], bool]]:
        """(position, sample id, what each filter said, accepted) of every sample of a judged shard."""
        verdicts = self._need(self._verdicts(name))
        if name.startswith(ACCEPTED):
            yield from ((position, row["sample_id"], row["says"], True) for position, row in enumerate(verdicts.rows()))
            return
        for position, row in enumerate(verdicts.rows()):
            says = [*row["says"], *self._said_later(row)]
            yield position, row["sample_id"], says, bool(row["kept"]) and all(one["keep"] for one in says)

    def stored(self, lines: SealedLines, position: int, says: list[dict[str, Any]], accepted: bool) -> StoredSample:
        """One sample with its prompt and verdicts; `lines` are those of its generated shard."""
        row = lines.row(position)
        sample = sample_from_row(row, self.prompt(row["prompt_id"]))
        return StoredSample(sample, row["seed"], tuple(says), accepted, HINTED in row)

    def shards_of(self, prompt_id: str, most: int | None = None, *, sample_id: str | None = None) -> list[str]:
        """The judged shards that hold samples of a prompt (or that one sample of it), in order; their bytes are searched, not decoded.

        The search begins near where the prompt stands in the round and ends once `most` samples (None: never) are found.
        """
        at = self.prompts.position(prompt_id)
        if at is None:
            return []
        wanted = json.dumps(f"{self.round_index}-{prompt_id}-").encode("ascii")[:-1]
        if sample_id is not None:
            wanted = b'"sample_id":' + json.dumps(sample_id).encode("ascii")
        guess = at * len(self.judged) // max(1, len(self.prompts))
        found, num_samples = [], 0
        for index in sorted(range(len(self.judged)), key=lambda index: abs(index - guess)):
            name = self.judged[index]
            count = self._need(self._verdicts(name)).count(wanted)
            if count:
                found.append(name)
                num_samples += count
            if most is not None and num_samples >= most:
                break
        return sorted(found)

    def _verdicts(self, name: str) -> str:
        return name.replace(GENERATED, VERDICTS, 1)

    def _said_later(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        if not self._later_read:
            lines = open_lines(self._run, self.round_index, ROUND_VERDICTS)
            self._later = None if lines is None else KeyedLines(lines, "sample_id")
            self._later_read = True
        if self._later is None or not row["kept"]:
            return []
        found = self._later.get(row["sample_id"])
        return [] if found is None else list(found["says"])

    def _need(self, name: str) -> SealedLines:
        lines = open_lines(self._run, self.round_index, name)
        if lines is None:
            raise DataError("missing", where=f"{self._run}/rounds/{self.round_index:04d}/{name}.jsonl")
        return lines


class EvalReader(RoundReader):
    """The evaluation of one round: a sample is `accepted` when it counts as correct."""

    def _list(self, view: RunView) -> None:
        self.names = self.judged = view.shards.names(self.round_index, f"{EVAL}-")

    def _open_prompts(self) -> SealedLines:
        lines = open_lines(self._run, 0, EVAL_PROMPTS)
        return lines if lines is not None else SealedLines(b"", {})

    def prompt(self, prompt_id: str) -> Prompt:
        """One prompt of the evaluation; with an empty text when the run did not keep it."""
        row = self.prompts.get(prompt_id)
        return Prompt(prompt_id, "") if row is None else prompt_from_row(row)

    def _verdicts(self, name: str) -> str:
        return name

    def says(self, name: str) -> Iterator[tuple[int, str, list[dict[str, Any]], bool]]:
        """(position, sample id, what each filter said, correct) of every sample of an evaluation's shard."""
        for position, row in enumerate(self._need(name).rows()):
            yield position, row["sample_id"], list(row["says"]), bool(row["correct"])
