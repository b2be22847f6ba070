"""dedup over a whole round, or over the run: the `samples` form of dedup.

The index of earlier rounds is rebuilt from what they accepted; it holds fixed-size records, never texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from iterative_sft_cli.filters.builtin.dedup import DUPLICATE, KEYS, Level, Scope, prompt_key
from iterative_sft_cli.filters.builtin.spec import KEPT
from iterative_sft_cli.filters.context import Context
from iterative_sft_cli.types import Sample, Verdict


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
    seen: set[int] = set()
    if scope == "run":
        for record in context.accepted_earlier:
            subject = "" if across_prompts else f"id:{record['prompt_id']}"
            seen.add(digest(subject, make_key(record["completion"])))
    verdicts = []
    for sample in samples:
        key = make_key(sample.completion)
        # earlier rounds are known by prompt id, the round itself by the prompt's text
        marks = (
            {digest("", key)}
            if across_prompts
            else {
                digest(f"id:{sample.prompt_id}", key),
                digest(f"text:{prompt_key(sample)}", key),
            }
        )
        verdicts.append(DUPLICATE if marks & seen else KEPT)
        seen |= marks
    return verdicts
