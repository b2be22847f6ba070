"""contains: keeps completions that hold given texts, or none of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from iterative_sft_cli.filters.builtin.spec import BuiltIn, decide
from iterative_sft_cli.types import Sample, Verdict


def _check(arguments: Mapping[str, Any]) -> None:
    text = arguments["text"]
    if not text or (isinstance(text, list) and not all(text)):
        raise ValueError("argument `text` is empty")


SPEC = BuiltIn(role="verifier", cost="one search a text", check=_check)


def contains(
    sample: Sample,
    text: str | list[str],
    mode: Literal["any", "all", "none"] = "any",
    ignore_case: bool = False,
    of: Literal["final", "completion", "reasoning"] = "final",
    drop: bool = True,
) -> Verdict:
    """Keep a completion that contains `text` (a list: `mode` any, all, or none of them).

    ignore_case: capitals do not matter. Dropped as `text_missing`, or with `mode: none` as `text_found`.
    """
    said = sample.final if of == "final" else sample.completion if of == "completion" else sample.reasoning or ""
    wanted = [text] if isinstance(text, str) else text
    if ignore_case:
        said, wanted = said.casefold(), [one.casefold() for one in wanted]
    if mode == "none":
        return decide(not any(one in said for one in wanted), "text_found", drop=drop)
    found = (any if mode == "any" else all)(one in said for one in wanted)
    return decide(found, "text_missing", drop=drop)
