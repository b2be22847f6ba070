"""dedup with `level: near` over a round or the run: MinHash signatures of fixed size, under 200 bytes a sample.

Verdicts are a pure function of the texts and their order; the texts themselves are never held. The signatures of
earlier rounds are kept in the run's cache folder, checked against what was accepted, and made again where they differ.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.filters.builtin.keys import DUPLICATE, Scope, normalized, prompt_key
from iterative_sft_cli.filters.builtin.spec import KEPT
from iterative_sft_cli.filters.context import Context
from iterative_sft_cli.types import Sample, Verdict

BANDS = 10
ROWS = 6
"""A pair of Jaccard similarity 0.9 meets in one of the bands with probability 0.9995, one of 0.8 with 0.95."""
SHINGLE = 5
CHANCE = 1 / 256
CHUNK = 1 << 16
"""Texts that are looked up at a time."""
MAGIC = b"isft minhash 1\n"


class Signatures:
    """MinHash signatures of many texts: one byte a permutation, one 32-bit key a band, 64 bits of the text's digest."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._keys = bytearray()
        self._digests = array("Q")

    @property
    def count(self) -> int:
        """Texts held."""
        return len(self._digests)

    def bytes_each(self) -> float:
        """Memory of a text, with the order that `first_of_each` makes for each band."""
        held = len(self._bytes) + len(self._keys) + 8 * self.count
        return held / self.count + BANDS * 4

    def add_all(self, texts: Iterable[tuple[str, str]]) -> None:
        """Append (subject, text) pairs; texts of different subjects never meet."""
        import numpy
        from datasketch import MinHash

        blank = MinHash(num_perm=BANDS * ROWS, seed=1)
        for subject, text in texts:
            one = blank.copy()
            plain = normalized(text)
            shingles = {plain[i : i + SHINGLE] for i in range(max(1, len(plain) - SHINGLE + 1))}
            one.update_batch([piece.encode("utf-8", "surrogatepass") for piece in sorted(shingles)])
            values = one.hashvalues.astype(numpy.uint32)
            start = zlib.crc32(subject.encode("utf-8", "surrogatepass"))
            keys = [zlib.crc32(values[b * ROWS : (b + 1) * ROWS].tobytes(), start + b) for b in range(BANDS)]
            self._bytes += (values & 0xFF).astype(numpy.uint8).tobytes()
            self._keys += numpy.array(keys, dtype=numpy.uint32).tobytes()
            self._digests.append(text_digest(subject, text))

    def cut(self, count: int) -> None:
        """Forget all but the first `count` texts."""
        del self._bytes[count * BANDS * ROWS :], self._keys[count * BANDS * 4 :], self._digests[count:]

    def holds(self, index: int, subject: str, text: str) -> bool:
        """Whether the text at `index` is this one."""
        return index < self.count and self._digests[index] == text_digest(subject, text)

    def signatures(self) -> Any:
        """(count, permutations) bytes."""
        import numpy

        return numpy.frombuffer(self._bytes, dtype=numpy.uint8).reshape(self.count, BANDS * ROWS)

    def keys(self) -> Any:
        """(count, bands) 32-bit keys."""
        import numpy

        return numpy.frombuffer(self._keys, dtype=numpy.uint32).reshape(self.count, BANDS)

    def save(self, path: Path) -> None:
        """Write all to a file that `load` can check; a full disk costs the cache, never the run."""
        body = self._digests.tobytes() + bytes(self._bytes) + bytes(self._keys)
        head = MAGIC + self.count.to_bytes(8, "big") + hashlib.blake2b(body, digest_size=16).digest()
        temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(head + body)
            temporary.replace(path)
        except OSError:
            return

    @classmethod
    def load(cls, path: Path) -> Signatures:
        """What `save` wrote; empty when the file is missing or damaged."""
        empty = cls()
        try:
            data = path.read_bytes()
        except OSError:
            return empty
        start = len(MAGIC) + 24
        count = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 8], "big")
        body = data[start:]
        whole = data.startswith(MAGIC) and len(body) == count * (8 + BANDS * ROWS + BANDS * 4)
        if not whole or hashlib.blake2b(body, digest_size=16).digest() != data[start - 16 : start]:
            return empty
        loaded = cls()
        loaded._digests.frombytes(body[: 8 * count])
        loaded._bytes += body[8 * count : count * (8 + BANDS * ROWS)]
        loaded._keys += body[count * (8 + BANDS * ROWS) :]
        return loaded


def text_digest(subject: str, text: str) -> int:
    """64 bits of a subject and its text."""
    data = f"{subject}\x1f{text}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def first_of_each(signatures: Signatures, known: int, similarity: float) -> Iterator[bool]:
    """For each text after the first `known` (which all count as kept): whether no kept text before it is as similar."""
    import numpy

    if signatures.count == 0:
        return
    rows, keys = signatures.signatures(), signatures.keys()
    orders = [numpy.argsort(keys[:, band], kind="stable").astype(numpy.uint32) for band in range(BANDS)]
    kept: Any = numpy.zeros(signatures.count, dtype=bool)
    kept[:known] = True
    needed = (similarity * (1 - CHANCE) + CHANCE) * BANDS * ROWS
    for start in range(known, signatures.count, CHUNK):
        lows, highs = _buckets(keys, orders, start, min(start + CHUNK, signatures.count))
        for index in range(start, start + len(lows)):
            is_first = True
            for band in range(BANDS):
                bucket = orders[band][lows[index - start, band] : highs[index - start, band]]
                earlier = bucket[bucket < index]
                candidates = earlier[kept[earlier]]
                if len(candidates) and int((rows[candidates] == rows[index]).sum(axis=1).max()) >= needed:
                    is_first = False
                    break
            kept[index] = is_first
            yield is_first


def _buckets(keys: Any, orders: Sequence[Any], start: int, end: int) -> tuple[Any, Any]:
    """Where in each band's order the texts with the same key begin and end, for the texts from `start` to `end`.

    The sorted keys of one band are held at a time: those of all would take as much memory as the orders.
    """
    import numpy

    lows: numpy.ndarray = numpy.empty((end - start, BANDS), dtype=numpy.uint32)
    highs: numpy.ndarray = numpy.empty((end - start, BANDS), dtype=numpy.uint32)
    for band in range(BANDS):
        in_order, wanted = keys[orders[band], band], keys[start:end, band]
        lows[:, band] = numpy.searchsorted(in_order, wanted, side="left")
        highs[:, band] = numpy.searchsorted(in_order, wanted, side="right")
    return lows, highs


def earlier_signatures(context: Context, across_prompts: bool) -> Signatures:
    """The signatures of what earlier rounds accepted, from the cache as far as it agrees with that."""
    path = None
    found = Signatures()
    if context.cache_dir is not None:
        path = context.cache_dir / f"dedup-near{'-across' if across_prompts else ''}.index"
        found = Signatures.load(path)
    cached, agreed = found.count, 0

    def missing() -> Iterator[tuple[str, str]]:
        nonlocal agreed
        for index, record in enumerate(context.accepted_earlier):
            subject = "" if across_prompts else str(record["prompt_id"])
            if index == agreed < cached and found.holds(index, subject, record["completion"]):
                agreed += 1
                continue
            if index == agreed < cached:
                found.cut(agreed)
                agreed = -1
            yield subject, record["completion"]

    found.add_all(missing())
    if 0 <= agreed < cached:
        found.cut(agreed)
    if path is not None and (found.count != cached or agreed != cached):
        found.save(path)
    return found


def dedup_near(
    samples: Sequence[Sample], context: Context, scope: Scope, similarity: float, across_prompts: bool
) -> list[Verdict]:
    """The verdicts of `dedup` with `level: near` and `scope: round` or `run`."""
    signatures = earlier_signatures(context, across_prompts) if scope == "run" else Signatures()
    known = signatures.count

    def subject(sample: Sample) -> str:
        return "" if across_prompts else sample.prompt_id if scope == "run" else prompt_key(sample)

    signatures.add_all((subject(sample), sample.completion) for sample in samples)
    return [KEPT if first else DUPLICATE for first in first_of_each(signatures, known, similarity)]
