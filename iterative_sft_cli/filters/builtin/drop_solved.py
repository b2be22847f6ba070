"""drop_solved: drops prompts that are solved too often, or too seldom, to teach anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from iterative_sft_cli.filters.builtin.spec import KEPT, BuiltIn
from iterative_sft_cli.filters.scores import check_by, value_of
from iterative_sft_cli.types import Sample, Verdict


def _check(arguments: Mapping[str, Any]) -> None:
    check_by(arguments["by"])
    high, low = arguments.get("at_least", 1.0), arguments.get("at_most")
    if high is None and low is None:
        raise ValueError("it needs `at_least`, `at_most` or both")
    for name, value in (("at_least", high), ("at_most", low)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"argument `{name}` is {value}, expected 0 to 1")
    if high is not None and low is not None and low >= high:
        raise ValueError(f"`at_most` is {low}, not below `at_least`, which is {high}")


SPEC = BuiltIn(role="selector", cost="one evaluation a sample", expressions=("by",), check=_check)


def drop_solved(
    group: Sequence[Sample], by: str, at_least: float | None = 1.0, at_most: float | None = None, solved: float = 1.0
) -> list[Verdict]:
    """Drop all samples of a prompt of whose samples a share of at least `at_least` (or at most `at_most`) is solved.

    by: the score that tells, of a verifier with `drop: false` before it; a sample is solved when it is at least
    `solved`. `at_least: 1.0, at_most: 0.0` drops prompts without contrast (Reinforce-Rej). Dropped as `solved_too_often`
    or `solved_too_seldom`; extra `share`.
    """
    values = [value_of(by, sample) for sample in group]
    share = sum(value is not None and value >= solved for value in values) / len(group)
    if at_least is not None and share >= at_least:
        return [Verdict(False, None, "solved_too_often", {"share": share})] * len(group)
    if at_most is not None and share <= at_most:
        return [Verdict(False, None, "solved_too_seldom", {"share": share})] * len(group)
    return [KEPT] * len(group)
