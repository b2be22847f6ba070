"""dedup with `level: near` over a round or the run: MinHash signatures of fixed size, 180 bytes a sample.

Verdicts are a pure function of the texts and their order; the texts themselves are never held.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from iterative_sft_cli.filters.builtin.dedup import DUPLICATE, Scope, prompt_key
from iterative_sft_cli.filters.builtin.keys import normalized
from iterative_sft_cli.filters.builtin.spec import KEPT
from iterative_sft_cli.filters.context import Context
from iterative_sft_cli.types import Sample, Verdict

BANDS = 10
ROWS = 6
"""A pair of Jaccard similarity 0.9 meets in one of the bands with probability 0.9995, one of 0.8 with 0.95."""
SHINGLE = 5
CHANCE = 1 / 256


class Signatures:
    """MinHash signatures of many texts: one byte a permutation and one 32-bit key a band."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._keys = bytearray()
        self.count = 0

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
            self.count += 1

    def signatures(self) -> Any:
        """(count, permutations) bytes."""
        import numpy

        return numpy.frombuffer(self._bytes, dtype=numpy.uint8).reshape(self.count, BANDS * ROWS)

    def keys(self) -> Any:
        """(count, bands) 32-bit keys."""
        import numpy

        return numpy.frombuffer(self._keys, dtype=numpy.uint32).reshape(self.count, BANDS)


def first_of_each(signatures: Signatures, known: int, similarity: float) -> Iterator[bool]:
    """For each text after the first `known` (which all count as kept): whether no kept text before it is as similar."""
    import numpy

    if signatures.count == 0:
        return
    rows, keys = signatures.signatures(), signatures.keys()
    orders = [numpy.argsort(keys[:, band], kind="stable").astype(numpy.uint32) for band in range(BANDS)]
    sorted_keys = [keys[orders[band], band] for band in range(BANDS)]
    kept = numpy.zeros(signatures.count, dtype=bool)
    kept[:known] = True
    needed = (similarity * (1 - CHANCE) + CHANCE) * BANDS * ROWS
    for index in range(known, signatures.count):
        is_first = True
        for band in range(BANDS):
            low = numpy.searchsorted(sorted_keys[band], keys[index, band], side="left")
            high = numpy.searchsorted(sorted_keys[band], keys[index, band], side="right")
            bucket = orders[band][low:high]
            earlier = bucket[bucket < index]
            candidates = earlier[kept[earlier]]
            if len(candidates) and int((rows[candidates] == rows[index]).sum(axis=1).max()) >= needed:
                is_first = False
                break
        kept[index] = is_first
        yield is_first


def dedup_near(
    samples: Sequence[Sample], context: Context, scope: Scope, similarity: float, across_prompts: bool
) -> list[Verdict]:
    """The verdicts of `dedup` with `level: near` and `scope: round` or `run`."""
    signatures = Signatures()
    if scope == "run":
        signatures.add_all(
            ("" if across_prompts else record["prompt_id"], record["completion"]) for record in context.accepted_earlier
        )
    known = signatures.count
    signatures.add_all(
        ("" if across_prompts else sample.prompt_id if scope == "run" else prompt_key(sample), sample.completion)
        for sample in samples
    )
    return [KEPT if first else DUPLICATE for first in first_of_each(signatures, known, similarity)]
