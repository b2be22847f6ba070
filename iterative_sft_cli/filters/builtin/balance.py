"""balance: keeps as many samples of each level, so that easy prompts do not crowd out hard ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.filters.builtin.spec import KEPT, BuiltIn
from iterative_sft_cli.filters.context import Context
from iterative_sft_cli.types import Sample, Verdict


def _check(arguments: Mapping[str, Any]) -> None:
    ratio, cap = arguments.get("ratio"), arguments.get("max_per_level")
    if ratio is None and cap is None:
        raise ValueError("it needs `ratio`, `max_per_level` or both")
    if ratio is not None and ratio < 1:
        raise ValueError(f"argument `ratio` is {ratio}, expected at least 1")
    if cap is not None and cap < 1:
        raise ValueError(f"argument `max_per_level` is {cap}, expected at least 1")


SPEC = BuiltIn(role="selector", cost="one draw a level, once a round", check=_check)


def balance(
    samples: Sequence[Sample],
    context: Context,
    ratio: float | None = None,
    max_per_level: int | None = None,
    level: str = "level",
) -> list[Verdict]:
    """Keep at most `max_per_level` samples of each level, and at most `ratio` times as many as the rarest level has.

    level: the column that holds the level. Which samples stay is drawn from (seed, round); the rest is dropped as
    `over_level`. `balance: 2` lets no level have more than twice the samples of the rarest.
    """
    groups: dict[str, list[int]] = {}
    count = 0
    for index, sample in enumerate(samples):
        if level not in sample.row:
            raise DataError(f"prompt {sample.prompt_id} has no column `{level}`", hint="name it with `level:`")
        groups.setdefault(str(sample.row[level]), []).append(index)
        count += 1
    limits = [] if max_per_level is None else [max_per_level]
    if ratio is not None and groups:
        limits.append(math.ceil(round(ratio * min(map(len, groups.values())), 9)))
    verdicts = [Verdict(False, None, "over_level")] * count
    for name in sorted(groups):
        members = groups[name]
        for index in context.rng.sample(members, min(len(members), *limits)):
            verdicts[index] = KEPT
    return verdicts
