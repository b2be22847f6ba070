"""repetition: drops completions that say the same again and again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from iterative_sft_cli.filters.builtin.spec import KEPT, BuiltIn
from iterative_sft_cli.types import Sample, Verdict


def _check(arguments: Mapping[str, Any]) -> None:
    if not 0 < arguments.get("max_share", 0.3) <= 1:
        raise ValueError(f"argument `max_share` is {arguments['max_share']}, expected above 0, at most 1")
    for name, least in (("n", 1), ("max_run", 1)):
        if arguments.get(name) is not None and arguments[name] < least:
            raise ValueError(f"argument `{name}` is {arguments[name]}, expected at least {least}")


SPEC = BuiltIn(role="check", cost="about 0.2 us a word", check=_check)


def repetition(sample: Sample, max_share: float = 0.3, n: int = 4, max_run: int | None = 8) -> Verdict:
    """Keep a completion of whose word `n`-grams at most `max_share` repeat an earlier one, and in which no word or
    line stands more than `max_run` times in a row (null: no limit).

    Completions of fewer than 2n words pass the first test. Dropped as `repeated_ngrams` (extra `share`) or `repeated_run`.
    """
    words = sample.completion.split()
    if max_run is not None and (
        _longest_run(words) > max_run or _longest_run(sample.completion.splitlines()) > max_run
    ):
        return Verdict(False, None, "repeated_run")
    if len(words) < 2 * n:
        return KEPT
    grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = len(words) - n + 1
    share = 1 - len(grams) / total
    if share > max_share:
        return Verdict(False, None, "repeated_ngrams", {"share": round(share, 4)})
    return KEPT


def _longest_run(items: list[str]) -> int:
    longest, run, previous = 0, 0, None
    for item in items:
        run = run + 1 if item == previous and item else 1
        previous = item
        longest = max(longest, run)
    return longest
