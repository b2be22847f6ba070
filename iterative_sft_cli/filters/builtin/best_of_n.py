"""best_of_n: keeps each prompt's best samples by a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from iterative_sft_cli.filters.builtin.spec import BuiltIn
from iterative_sft_cli.filters.builtin.top_k import top_k
from iterative_sft_cli.filters.scores import check_by
from iterative_sft_cli.types import Sample, Verdict


def _check(arguments: Mapping[str, Any]) -> None:
    check_by(arguments["by"])
    if arguments.get("n", 1) < 1:
        raise ValueError(f"argument `n` is {arguments['n']}, expected at least 1")


SPEC = BuiltIn(role="selector", cost="one evaluation a sample, one sort a prompt", expressions=("by",), check=_check)


def best_of_n(group: Sequence[Sample], by: str, n: int = 1) -> list[Verdict]:
    """Keep the `n` of a prompt's samples with the highest `by`; `best_of_n: reward_model` keeps the best one (RAFT).

    by: arithmetic over the scores of earlier filters. The same as `top_k` with `k: n`, under the name people look for.
    """
    return top_k(group, by, n)
