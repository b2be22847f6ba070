"""regex: keeps completions that match a pattern, or that do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal

from iterative_sft_cli.errors import PluginError
from iterative_sft_cli.filters.builtin.spec import BuiltIn, decide
from iterative_sft_cli.types import Sample, Verdict

SECONDS_PER_MATCH = 2.0


@lru_cache(maxsize=64)
def compile_pattern(pattern: str, ignore_case: bool) -> Any:
    # `regex` (a dependency of transformers) has a time limit, which `re` has not
    import regex as regex_module  # type: ignore[import-untyped]

    flags = regex_module.MULTILINE | (regex_module.IGNORECASE if ignore_case else 0)
    return regex_module.compile(pattern, flags)


def search(pattern: str, text: str, ignore_case: bool = False) -> bool:
    """Whether the pattern is found. Raises PluginError when that takes too long."""
    compiled = compile_pattern(pattern, ignore_case)
    return _timed(pattern, lambda: compiled.search(text, timeout=SECONDS_PER_MATCH)) is not None


def full_match(pattern: str, text: str, ignore_case: bool = False) -> bool:
    """Whether the pattern matches the whole text. Raises PluginError when that takes too long."""
    compiled = compile_pattern(pattern, ignore_case)
    return _timed(pattern, lambda: compiled.fullmatch(text, timeout=SECONDS_PER_MATCH)) is not None


def last_match(pattern: str, text: str) -> str | None:
    """The first group (or the whole) of the last match. Raises PluginError when that takes too long."""
    compiled = compile_pattern(pattern, False)
    found = _timed(pattern, lambda: list(compiled.finditer(text, timeout=SECONDS_PER_MATCH)))
    if not found:
        return None
    said: str | None = found[-1][1] if compiled.groups else found[-1][0]
    return said


def _timed(pattern: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except TimeoutError as error:
        raise PluginError(
            f"the pattern {pattern!r} took over {SECONDS_PER_MATCH:.0f} s on one text",
            hint="nested quantifiers such as (a+)+ take exponential time; rewrite the pattern",
        ) from error


def _check(arguments: Mapping[str, Any]) -> None:
    try:
        compile_pattern(arguments["pattern"], arguments.get("ignore_case", False))
    except Exception as error:
        raise ValueError(f"argument `pattern` is not a regular expression ({error})") from error


SPEC = BuiltIn(
    role="verifier", cost="one search; a search of over 2 s stops the run with the pattern named", check=_check
)


def regex(
    sample: Sample,
    pattern: str,
    mode: Literal["search", "fullmatch"] = "search",
    invert: bool = False,
    ignore_case: bool = False,
    of: Literal["final", "completion", "reasoning"] = "final",
    drop: bool = True,
) -> Verdict:
    """Keep a completion in which `pattern` is found (`mode: fullmatch`: that it matches as a whole, outer space aside).

    invert: keep what does not match. ignore_case: capitals do not matter. `^` and `$` match at lines. Dropped as `no_match` or `match`.
    """
    text = sample.final if of == "final" else sample.completion if of == "completion" else sample.reasoning or ""
    found = search(pattern, text, ignore_case) if mode == "search" else full_match(pattern, text.strip(), ignore_case)
    return decide(found != invert, "match" if invert else "no_match", drop=drop)
