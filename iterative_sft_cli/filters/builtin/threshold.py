"""threshold: keeps samples whose score is high enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iterative_sft_cli.filters.builtin.spec import KEPT, BuiltIn
from iterative_sft_cli.filters.scores import check_by, expression, value_of
from iterative_sft_cli.types import Sample, Verdict


def _check(arguments: Mapping[str, Any]) -> None:
    condition = check_by(arguments["by"]).is_condition
    low, high = arguments.get("min"), arguments.get("max")
    if condition and (low is not None or high is not None):
        raise ValueError(f"`{arguments['by']}` is a condition, which takes neither `min` nor `max`")
    if not condition and low is None and high is None:
        raise ValueError(f"it needs `min` or `max`, or a condition such as `{arguments['by']} >= 0.5`")
    if low is not None and high is not None and low > high:
        raise ValueError(f"`min` is {low}, greater than `max`, which is {high}")


SPEC = BuiltIn(role="check", cost="one evaluation", expressions=("by",), check=_check)


def threshold(sample: Sample, by: str, min: float | None = None, max: float | None = None) -> Verdict:
    """Keep a sample whose `by` is at least `min` and at most `max`, or for which the condition `by` holds.

    by: arithmetic over the scores of earlier filters (`reward + judge / 5`), also `logprob`, `logprob_per_token` and
    `num_tokens` of the sample itself; or a condition (`reward >= 0.7 and num_tokens < 200`). A sample without one of the scores is dropped as `no_score`, others as
    `below_threshold` or `above_threshold` with the value in extra.
    """
    value = value_of(by, sample)
    if value is None:
        return Verdict(False, None, "no_score")
    if expression(by).is_condition:
        return KEPT if value else Verdict(False, None, "below_threshold")
    if min is not None and value < min:
        return Verdict(False, None, "below_threshold", {"value": value})
    if max is not None and value > max:
        return Verdict(False, None, "above_threshold", {"value": value})
    return KEPT
