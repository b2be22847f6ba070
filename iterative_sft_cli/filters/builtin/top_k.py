"""top_k: keeps each prompt's best samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from iterative_sft_cli.filters.builtin.spec import KEPT, BuiltIn
from iterative_sft_cli.filters.scores import check_by, value_of
from iterative_sft_cli.types import Sample, Verdict


def _check(arguments: Mapping[str, Any]) -> None:
    check_by(arguments["by"])
    if arguments.get("k", 1) < 1:
        raise ValueError(f"argument `k` is {arguments['k']}, expected at least 1")


SPEC = BuiltIn(role="selector", cost="one evaluation a sample, one sort a prompt", expressions=("by",), check=_check)


def ranked(samples: Sequence[Sample], by: str) -> tuple[list[int], list[int]]:
    """(indices from best to worst, indices without a score); ties keep sample order."""
    values: list[tuple[float, int]] = []
    missing: list[int] = []
    for index, sample in enumerate(samples):
        value = value_of(by, sample)
        if value is None:
            missing.append(index)
        else:
            values.append((-value, index))
    return [index for _, index in sorted(values)], missing


def top_k(group: Sequence[Sample], by: str, k: int = 1) -> list[Verdict]:
    """Keep each prompt's `k` samples with the highest `by`, ties by sample order.

    by: arithmetic over the scores of earlier filters, as in `threshold`. Others are dropped as `not_in_top_k`, samples
    without a score as `no_score`.
    """
    best, missing = ranked(group, by)
    verdicts = [Verdict(False, None, "not_in_top_k")] * len(group)
    for index in best[:k]:
        verdicts[index] = KEPT
    for index in missing:
        verdicts[index] = Verdict(False, None, "no_score")
    return verdicts
