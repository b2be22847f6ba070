"""dedup over a whole round, or over the run: the `samples` form of dedup.

The index of earlier rounds is rebuilt from what they accepted; it holds fixed-size records, never texts.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Sequence

from iterative_sft_cli.filters.builtin.keys import DUPLICATE, KEYS, Level, Scope, prompt_key
from iterative_sft_cli.filters.builtin.spec import KEPT
from iterative_sft_cli.filters.context import Context
from iterative_sft_cli.types import Sample, Verdict


class Seen:
    """A set of 64-bit numbers: a plain set while it grows, eight bytes each once it is frozen."""

    def __init__(self) -> None:
        self._growing: set[int] = set()
        self._frozen = array("Q")

    def add(self, number: int) -> None:
        """Take a number in."""
        self._growing.add(number)
        if len(self._growing) >= 1 << 20:
            self.freeze()

    def freeze(self) -> None:
        """Move all numbers into the sorted array."""
        self._frozen = array("Q", sorted({*self._frozen, *self._growing}))
        self._growing = set()

    def __contains__(self, number: int) -> bool:
        if number in self._growing:
            return True
        place = bisect_left(self._frozen, number)
        return place < len(self._frozen) and self._frozen[place] == number


def digest(subject: str, key: str) -> int:
    """64 bits of a subject (a prompt, or nothing) and a completion's key."""
    data = f"{subject}\x1f{key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def dedup_round(
    samples: Sequence[Sample],
    context: Context,
    level: Level = "exact",
    scope: Scope = "round",
    similarity: float | None = None,
    across_prompts: bool = False,
) -> list[Verdict]:
    """See `dedup`."""
    if level == "near":
        from iterative_sft_cli.filters.builtin.dedup_near import dedup_near

        return dedup_near(samples, context, scope, 0.9 if similarity is None else similarity, across_prompts)
    make_key = KEYS[level]
    earlier, new = Seen(), Seen()
    if scope == "run":
        for record in context.accepted_earlier:
            earlier.add(digest("" if across_prompts else str(record["prompt_id"]), make_key(record["completion"])))
        earlier.freeze()
    verdicts = []
    for sample in samples:
        key = make_key(sample.completion)
        # earlier rounds are known by prompt id, the round itself by the prompt's text
        known = scope == "run" and digest("" if across_prompts else sample.prompt_id, key) in earlier
        mark = digest("" if across_prompts else prompt_key(sample), key)
        verdicts.append(DUPLICATE if known or mark in new else KEPT)
        new.add(mark)
    return verdicts
