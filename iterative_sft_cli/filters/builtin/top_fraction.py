"""top_fraction: keeps the best share of the round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from iterative_sft_cli.filters.builtin.spec import KEPT, BuiltIn
from iterative_sft_cli.filters.builtin.top_k import ranked
from iterative_sft_cli.filters.scores import check_by
from iterative_sft_cli.types import Sample, Verdict


def _check(arguments: Mapping[str, Any]) -> None:
    check_by(arguments["by"])
    if not 0 < arguments["q"] <= 1:
        raise ValueError(f"argument `q` is {arguments['q']}, expected above 0, at most 1")


SPEC = BuiltIn(role="selector", cost="one evaluation a sample, one sort a round", expressions=("by",), check=_check)


def top_fraction(samples: Sequence[Sample], by: str, q: float) -> list[Verdict]:
    """Keep the `q` (0.2 = a fifth, rounded up) of the round's samples with the highest `by`, ties by order (RAFT top).

    by: arithmetic over the scores of earlier filters; `-num_tokens` with `q: 0.9` drops the longest tenth. Others are
    dropped as `not_in_top_fraction`, samples without a score as `no_score`.
    """
    best, missing = ranked(samples, by)
    verdicts = [Verdict(False, None, "not_in_top_fraction")] * len(samples)
    for index in best[: math.ceil(round(q * len(best), 9))]:
        verdicts[index] = KEPT
    for index in missing:
        verdicts[index] = Verdict(False, None, "no_score")
    return verdicts
