"""length: keeps completions within bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from iterative_sft_cli.filters.builtin.spec import KEPT, BuiltIn
from iterative_sft_cli.types import Sample, Verdict


def _check(arguments: Mapping[str, Any]) -> None:
    low, high = arguments.get("min"), arguments.get("max")
    if low is None and high is None:
        raise ValueError("it needs `min`, `max` or both")
    if low is not None and high is not None and low > high:
        raise ValueError(f"`min` is {low}, greater than `max`, which is {high}")
    if arguments.get("unit", "tokens") == "tokens" and arguments.get("of", "completion") != "completion":
        raise ValueError("`unit: tokens` measures the whole completion, expected `unit: chars` or `words` with `of`")


SPEC = BuiltIn(role="check", cost="nothing (words: one split)", check=_check)
_SHORT = Verdict(False, None, "too_short")
_LONG = Verdict(False, None, "too_long")


def length(
    sample: Sample,
    max: int | None = None,
    min: int | None = None,
    unit: Literal["tokens", "chars", "words"] = "tokens",
    of: Literal["completion", "final", "reasoning"] = "completion",
) -> Verdict:
    """Keep a completion of `min` to `max` units, both included. `length: 200` means at most 200 tokens.

    unit: tokens counts the sampled ids (only of the whole completion); chars and words count text.
    of: which part is measured. Dropped as `too_short` or `too_long`.
    """
    if unit == "tokens" and of == "completion":
        size = len(sample.completion_ids)
    else:
        text = sample.completion if of == "completion" else sample.final if of == "final" else sample.reasoning or ""
        size = len(text) if unit == "chars" else len(text.split())
    if min is not None and size < min:
        return _SHORT
    if max is not None and size > max:
        return _LONG
    return KEPT
