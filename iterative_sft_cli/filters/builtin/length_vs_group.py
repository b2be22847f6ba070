"""length_vs_group: drops completions that are much shorter or longer than their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.filters.builtin.spec import KEPT, BuiltIn
from iterative_sft_cli.types import Sample, Verdict

Unit = Literal["tokens", "chars", "words"]
_SHORT = Verdict(False, None, "shorter_than_group")
_LONG = Verdict(False, None, "longer_than_group")


def _check(arguments: Mapping[str, Any]) -> None:
    low, high = arguments.get("max_shorter"), arguments.get("max_longer")
    if low is None and high is None:
        raise ValueError("it needs `max_shorter`, `max_longer` or both")
    if (low is not None and low < 0) or (high is not None and high < 0):
        raise ValueError("`max_shorter` and `max_longer` must not be negative")
    if arguments.get("than", "longest") == "longest" and high is not None:
        raise ValueError("nothing is longer than the longest: `max_longer` needs `than: median`")


def _variant(arguments: Mapping[str, Any]) -> Callable[..., Any] | None:
    return None if arguments.get("scope", "prompt") == "prompt" else length_vs_round


SPEC = BuiltIn(role="selector", cost="nothing (words: one split)", check=_check, variant=_variant)


def _size(sample: Sample, unit: Unit) -> int:
    if unit == "tokens":
        return len(sample.completion_ids)
    return len(sample.completion) if unit == "chars" else len(sample.completion.split())


def length_vs_group(
    group: Sequence[Sample],
    max_shorter: int | None = None,
    max_longer: int | None = None,
    than: Literal["longest", "median"] = "longest",
    scope: Literal["prompt", "level", "round"] = "prompt",
    level: str = "level",
    unit: Unit = "tokens",
) -> list[Verdict]:
    """Keep completions at most `max_shorter` units shorter than the longest (or `than: median`) of their group, and at
    most `max_longer` longer than the median.

    scope: prompt = the samples of one prompt; level = samples of the round whose column `level` is equal (the length
    filter of Self-Improving Transformers); round = all. unit: tokens, chars or words. `length_vs_group: 1` drops what is 2 or more tokens shorter.
    Dropped as `shorter_than_group` or `longer_than_group`.
    """
    return _judge([_size(sample, unit) for sample in group], max_shorter, max_longer, than)


def length_vs_round(
    samples: Sequence[Sample],
    max_shorter: int | None = None,
    max_longer: int | None = None,
    than: Literal["longest", "median"] = "longest",
    scope: Literal["prompt", "level", "round"] = "round",
    level: str = "level",
    unit: Unit = "tokens",
) -> list[Verdict]:
    """`length_vs_group` over the round, or over each level of it."""
    groups: dict[Any, list[int]] = {}
    sizes: list[int] = []
    for index, sample in enumerate(samples):
        if scope == "level" and level not in sample.row:
            raise DataError(f"prompt {sample.prompt_id} has no column `{level}`", hint="name it with `level:`")
        groups.setdefault(str(sample.row[level]) if scope == "level" else "", []).append(index)
        sizes.append(_size(sample, unit))
    verdicts: list[Verdict] = [KEPT] * len(sizes)
    for members in groups.values():
        found = _judge([sizes[i] for i in members], max_shorter, max_longer, than)
        for index, verdict in zip(members, found, strict=True):
            verdicts[index] = verdict
    return verdicts


def _judge(sizes: list[int], max_shorter: int | None, max_longer: int | None, than: str) -> list[Verdict]:
    ordered = sorted(sizes)
    reference = ordered[-1] if than == "longest" else ordered[(len(ordered) - 1) // 2]
    return [
        _SHORT
        if max_shorter is not None and size < reference - max_shorter
        else _LONG
        if max_longer is not None and size > reference + max_longer
        else KEPT
        for size in sizes
    ]
