"""nonempty: keeps completions that say something."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iterative_sft_cli.filters.builtin.spec import KEPT, BuiltIn
from iterative_sft_cli.types import Sample, Verdict


def _check(arguments: Mapping[str, Any]) -> None:
    if arguments.get("min_chars", 1) < 1:
        raise ValueError(f"argument `min_chars` is {arguments['min_chars']}, expected at least 1")


SPEC = BuiltIn(role="check", cost="nothing", check=_check)
_EMPTY = Verdict(False, None, "empty")
_STUB = Verdict(False, None, "stub")


def nonempty(sample: Sample, min_chars: int = 1, drop_stubs: bool = False) -> Verdict:
    """Keep a completion whose final part has at least `min_chars` characters besides white space.

    drop_stubs: also drop one-line stubs of fewer than 10 characters (the SSD recipe). Dropped as `empty` or `stub`.
    """
    text = sample.final.strip()
    if len(text) < min_chars:
        return _EMPTY
    if drop_stubs and len(text) < 10 and "\n" not in text:
        return _STUB
    return KEPT
